# SPDX-License-Identifier: MIT
"""`fla task`: small models learn a task and are tried at lengths they never saw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from fla.core.errors import UsageError
from fla.tasks.models import small_config
from fla.tasks.report import report
from fla.tasks.rows import Task, task_of
from fla.tasks.scores import TRIALS, Scores, score_task
from fla.training.callbacks import say
from fla.training.checkpoints import newest_whole, seal
from fla.training.run import make_trainer, run_trainer, short_run


@dataclass
class Recipe:
    """How a model is built and learns.

    Fields:
        length: the longest rows of the training, the task's own if absent; rows of a batch are
            of one length, drawn between a quarter of it and it.
        trial_lengths: lengths of the trials; once, twice and four times `length` if absent.
        trials: rows of each.
    """

    hidden_size: int = 64
    layers: int = 2
    head_dim: int = 32
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 4e-3
    length: int | None = None
    trial_lengths: list[int] = field(default_factory=list)
    trials: int = 256
    seed: int = 0

    def lengths(self, task: Task) -> list[int]:
        first = self.length or task.length
        found = self.trial_lengths or [first, 2 * first, 4 * first]
        return [n for n in found if task.most is None or n <= task.most or self.trial_lengths]


class _Batches:
    """Collates the numbers of rows into rows: every batch is made from the seed and its first
    number, so that a run that resumes sees the same batches.
    """

    def __init__(self, task: Task, recipe: Recipe):
        self.task, self.recipe = task, recipe

    def __call__(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        longest = self.recipe.length or self.task.length
        shortest = min(longest, max(self.task.least, longest // 4))
        seed = self.recipe.seed * (TRIALS >> 16) + numbers[0]
        generator = torch.Generator().manual_seed(seed)
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return self.task.rows(len(numbers), length, seed)._asdict()


def train_task(
    task: str | Task, model: str, recipe: Recipe, folder: str | Path, console: Console | None = None
) -> Scores:
    """Train `NAME:field=value:...` of `small_config` on a task, save it in a folder and score it. A
    folder with the results of the same recipe is read; an interrupted run resumes.
    """
    task, folder = task_of(task) if isinstance(task, str) else task, Path(folder)
    results = folder / "results.json"
    told: dict[str, Any] = dict(task=task.name, model=model, recipe=asdict(recipe))
    if results.exists():
        found = json.loads(results.read_text())
        if {n: found[n] for n in told} == json.loads(json.dumps(told)):
            return Scores(**{n: _by_length(x) for n, x in found["scores"].items()})
        raise UsageError(
            f"{folder} holds another recipe's results; choose another --output_dir, or delete it"
        )
    config = small_config(
        model, recipe.hidden_size, recipe.layers, task.vocabulary, head_dim=recipe.head_dim
    )
    torch.manual_seed(recipe.seed)
    network = AutoModelForCausalLM.from_config(config)
    args = short_run(
        folder, recipe.steps, recipe.batch_size, recipe.learning_rate, 1 / 10, recipe.seed
    )
    numbers = range(recipe.steps * recipe.batch_size)
    trainer, interruption = make_trainer(
        args, network, numbers, console or Console(), data_collator=_Batches(task, recipe)
    )
    run_trainer(trainer, interruption, newest_whole(folder))
    if interruption.asked:
        say(f"stopped; saved {newest_whole(folder)}. The same command continues")
        raise SystemExit(130)
    trainer.save_model(str(folder))
    seal(folder)
    trained: Any = trainer.model
    scores = score_task(trained, task, recipe.lengths(task), recipe.trials)
    seconds = sum(log.get("train_runtime", 0.0) for log in trainer.state.log_history)
    told |= dict(
        scores=asdict(scores), seconds=round(seconds, 1), parameters=trained.num_parameters()
    )
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    results.write_text(json.dumps(told, indent=1) + "\n")
    return scores


def _by_length(x: dict[str, float]) -> dict[int, float]:
    return {int(n): share for n, share in x.items()}


def compare(
    tasks: Sequence[str],
    models: Sequence[str],
    recipe: Recipe,
    folder: str | Path,
    console: Console,
) -> dict[str, dict[str, Scores]]:
    """Every model on every task, a folder each (finished ones are kept), and in the end
    `results.md` and `results.png`.
    """
    folder = Path(folder)
    wanted = [task_of(name) for name in tasks]
    for model in models:  # before any of them trains
        for task in wanted:
            small_config(
                model, recipe.hidden_size, recipe.layers, task.vocabulary, head_dim=recipe.head_dim
            )
    found: dict[str, dict[str, Scores]] = {}
    for task in wanted:
        for model in models:
            console.print(f"{model} learns {task.name}")
            cell = folder / task.name / model.replace(":", "-")
            scores = train_task(task, model, recipe, cell, console)
            found.setdefault(task.name, {})[model] = scores
            at = ", ".join(f"{share:.0%} at {n}" for n, share in scores.answers.items())
            console.print(f"  answers right: {at}")
    report(found, folder, console)
    return found
