# SPDX-License-Identifier: MIT
"""Train small models on synthetic tasks and test them at longer lengths."""

from __future__ import annotations

from typing import Any

from fla.cli.common import command_parser


def main(argv: list[str]) -> int:
    from fla.tasks.rows import TASKS
    from fla.tasks.run import Recipe, compare

    parser = command_parser("task", __doc__)
    parser.add_argument("tasks", help=f"names, with commas between: {', '.join(TASKS)}")
    parser.add_argument(
        "--model", default="gated_deltanet,transformer",
        help="architectures, with commas between; NAME:field=value:... sets fields of one",
    )  # fmt: skip
    parser.add_argument("--output_dir", default="runs/tasks")
    parser.add_argument("--checkpoint", help="score this model of an earlier run, train none")
    for name, kind in (("hidden_size", int), ("layers", int), ("head_dim", int), ("steps", int),
                       ("batch_size", int), ("learning_rate", float), ("length", int),
                       ("trials", int), ("seed", int)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=getattr(Recipe, name))
    parser.add_argument("--trial_lengths", type=int, nargs="+", default=[], metavar="TOKENS")
    args = vars(parser.parse_args(argv))

    from rich.console import Console

    from fla.core.errors import UsageError

    console = Console(highlight=False, soft_wrap=True)
    names, models, folder, checkpoint = (
        args.pop(n) for n in ("tasks", "model", "output_dir", "checkpoint")
    )
    recipe = Recipe(**args)
    try:
        if checkpoint:
            return _score_tasks(checkpoint, names.split(","), recipe, console)
        compare(names.split(","), models.split(","), recipe, folder, console)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0


def _score_tasks(folder: str, names: list[str], recipe: Any, console: Any) -> int:
    from transformers import AutoModelForCausalLM

    import fla.models  # noqa: F401  registers the architectures
    from fla.tasks.report import show
    from fla.tasks.rows import task_of
    from fla.tasks.scores import score_task
    from fla.training.checkpoints import require_model
    from fla.training.saved import load_checked
    from fla.utils import get_available_device

    model: Any = load_checked(AutoModelForCausalLM, require_model(folder))
    model.to(device=get_available_device())
    for name in names:
        lengths = recipe.lengths(task_of(name))
        show(name, {folder: score_task(model, name, lengths, recipe.trials, recipe.seed)}, console)
    return 0
