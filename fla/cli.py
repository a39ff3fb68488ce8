# SPDX-License-Identifier: MIT
"""The `fla` command: train, generate, eval, linearize, task, study, doctor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

USAGE = 2
EXTRAS = ("accelerate", "datasets", "matplotlib", "rich", "tensorboard", "yaml")


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0, 1 where training broke off, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        print(HELP)
        return 0
    if verb not in VERBS:
        print(f"fla: {verb!r} is not a command\n\n{HELP}", file=sys.stderr)
        return USAGE
    from fla.core.errors import TrainingDiverged, UsageError

    try:
        return VERBS[verb](argv[1:])
    except UsageError as error:
        print(f"fla {verb}: {error}", file=sys.stderr)
        return USAGE
    except TrainingDiverged as error:
        print(f"fla {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fla {verb}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRAS:
            raise
        print(
            f"fla {verb}: the package {error.name} is not installed; "
            "pip install 'flash-linear-attention[train]'",
            file=sys.stderr,
        )
        return USAGE


def from_file(argv: list[str]) -> list[str]:
    """Replace `--config FILE` (YAML or JSON, names as the flags) by its flags, before the others so
    that these win.
    """
    import yaml

    from fla.core.errors import UsageError

    if "--config" not in argv:
        return argv
    at = argv.index("--config")
    if at + 1 == len(argv) or argv[at + 1].startswith("--"):
        raise UsageError("--config needs a file")
    path, rest = Path(argv[at + 1]), argv[:at] + argv[at + 2 :]
    if not path.is_file():
        raise UsageError(f"--config: {str(path)!r} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"--config: {path} is not YAML or JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(
            f"--config: {path} must hold names and values, as in 'learning_rate: 1e-3'"
        )
    flags: list[str] = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, items)]
    return flags + rest


def train(argv: list[str]) -> int:
    """`fla train`: every RunArguments and TrainingArguments flag; defaults fit a small run on this
    machine.
    """
    from transformers import HfArgumentParser, TrainingArguments

    from fla.core.errors import UsageError
    from fla.training import run

    kinds: Any = (run.RunArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, prog="fla train")
    parser.set_defaults(
        output_dir="runs/train",
        report_to=["tensorboard"],
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        logging_steps=10,
        save_total_limit=3,
    )
    try:
        arguments, training = parser.parse_args_into_dataclasses(from_file(argv))
    except (ValueError, ImportError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(str(error)) from error
    run.train(arguments, training)
    return 0


def _load(folder: str, device: str | None, tokenizer: str | None = None) -> tuple[Any, Any]:
    from fla.training.saved import load_saved
    from fla.utils import get_available_device

    model, own = load_saved(folder, tokenizer)
    return model.eval().to(device=device or get_available_device()), own


def generate(argv: list[str]) -> int:
    """`fla generate CHECKPOINT`: stream text to the terminal."""
    parser = argparse.ArgumentParser(prog="fla generate", description=generate.__doc__)
    parser.add_argument("checkpoint", help="folder of a saved model")
    parser.add_argument("--tokenizer", help="'byte' or one of Hugging Face; else the checkpoint's")
    parser.add_argument("--prompt", default="def ", help="text to go on from")
    parser.add_argument("--max_new_tokens", type=int, default=300)
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, ...; the best available by default")
    args = parser.parse_args(argv)

    import torch
    from transformers import TextStreamer

    from fla.data.tokens import encode

    model, tokenizer = _load(args.checkpoint, args.device, args.tokenizer)
    torch.manual_seed(args.seed)
    ids = torch.from_numpy(encode(tokenizer, args.prompt)).long().unsqueeze(0).to(model.device)
    sampling = (
        dict(do_sample=True, temperature=args.temperature, top_p=args.top_p)
        if args.temperature > 0
        else dict(do_sample=False)
    )
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
    return 0


def _eval_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fla eval", description=evaluate.__doc__)
    parser.add_argument("checkpoint", help="folder of a saved model")
    parser.add_argument(
        "--data", default="stdlib", help="as for fla train; its held-out part is scored"
    )
    parser.add_argument("--data_column", default="text")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument(
        "--bucket", type=int, help="also perplexity by position, in buckets of this size"
    )
    parser.add_argument("--recall", type=int, help="also recall probes of so many characters")
    parser.add_argument("--tokenizer", help="'byte' or one of Hugging Face; else the checkpoint's")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="tasks of `fla task` it was trained on, alone"
    )
    parser.add_argument("--harness", nargs="+", metavar="TASK", help="tasks of lm-eval, alone")
    parser.add_argument("--harness_folder", help="folder of lm-eval tasks of one's own")
    parser.add_argument("--limit", type=int, help="examples of an lm-eval task")
    parser.add_argument("--device", help="cpu, cuda, ...; the best available by default")
    return parser


def evaluate(argv: list[str]) -> int:
    """`fla eval CHECKPOINT`: perplexity and bits per byte of held-out text, by position too."""
    args = _eval_parser().parse_args(argv)
    if args.tasks:
        return task([",".join(args.tasks), "--checkpoint", args.checkpoint])

    from rich.console import Console
    from rich.table import Table

    from fla.data.corpus import load_corpus
    from fla.evals.harness import run_harness
    from fla.training import run

    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        from accelerate import PartialState

        args.device = args.device or str(PartialState().device)
    console = Console(highlight=False, quiet=int(os.environ.get("RANK", 0)) > 0)
    model, tokenizer = _load(args.checkpoint, args.device, args.tokenizer)
    if args.harness:
        results = run_harness(model, tokenizer, args.harness, args.harness_folder, args.limit)
        figures = Table("task", "measure", "value")
        for name, values in results.items():
            for measure, value in values.items():
                figures.add_row(name, measure, f"{value:.4f}")
        console.print(figures)
        return 0
    corpus = load_corpus(args.data, args.data_column)
    if several:
        scored = run.evaluate_together(model, tokenizer, corpus, args.length, args.bucket)
    else:
        scored = run.evaluate(model, tokenizer, corpus, args.length, args.bucket, console)
    if not console.quiet:
        console.print(_scores(args, model, tokenizer, corpus, scored))
    return 0


def _scores(args: argparse.Namespace, model: Any, tokenizer: Any, corpus: Any, scored: Any) -> Any:
    """The table of `fla eval`."""
    from rich.table import Table

    from fla.data.corpus import compressed_bits_per_byte
    from fla.data.probes import PROBES
    from fla.evals.recall import recall

    table = Table(
        title=f"held-out text of {corpus.name}: {scored.bytes / 1e6:.2f} MB, {scored.tokens} tokens"
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("bits per byte", f"{scored.bits_per_byte:.4f}")
    table.add_row("perplexity per token", f"{scored.perplexity:.4f}")
    for name, bits in compressed_bits_per_byte(corpus.held_out).items():
        table.add_row(f"bits per byte, {name}", f"{bits:.4f}")
    for start, perplexity in scored.by_position().items():
        table.add_row(f"perplexity at {start}..{start + args.bucket - 1}", f"{perplexity:.4f}")
    for kind in PROBES if args.recall else ():
        found = recall(model, tokenizer, kind, characters=args.recall)
        table.add_row(f"recall, {kind}: exact answers", f"{found.exact:.0%}")
        table.add_row(f"recall, {kind}: nats a token of it", f"{found.nats:.4f}")
    return table


def task(argv: list[str]) -> int:
    """`fla task NAME,...`: small models learn synthetic tasks and are tried at longer ones."""
    from fla.tasks.rows import TASKS
    from fla.tasks.run import Recipe, compare

    parser = argparse.ArgumentParser(prog="fla task", description=task.__doc__)
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


def study(argv: list[str]) -> int:
    """`fla study CONFIG`: train many small models alike, compare them in a table and a picture."""
    parser = argparse.ArgumentParser(prog="fla study", description=study.__doc__)
    parser.add_argument("config", help="YAML file, as in examples/studies")
    parser.add_argument("--output_dir", help="runs/NAME of the file where absent; it goes on there")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="as in tokens=100000"
    )
    args = parser.parse_args(argv)

    from rich.console import Console

    from fla.studies.config import load
    from fla.studies.run import run_study

    wanted = load(args.config, args.set)
    folder = args.output_dir or f"runs/{Path(args.config).stem}"
    run_study(wanted, folder, Console(highlight=False, soft_wrap=True))
    return 0


def _score_tasks(folder: str, names: list[str], recipe: Any, console: Any) -> int:
    from transformers import AutoModelForCausalLM

    import fla.models  # noqa: F401  registers the architectures
    from fla.tasks.report import show
    from fla.tasks.rows import task_of
    from fla.tasks.scores import score_task
    from fla.training.checkpoints import require_model
    from fla.utils import get_available_device

    model: Any = AutoModelForCausalLM.from_pretrained(require_model(folder))
    model.to(device=get_available_device())
    for name in names:
        lengths = recipe.lengths(task_of(name))
        show(name, {folder: score_task(model, name, lengths, recipe.trials, recipe.seed)}, console)
    return 0


def linearize(argv: list[str]) -> int:
    """`fla linearize TEACHER OUT`: a softmax transformer in, a hybrid with linear attention out."""
    parser = argparse.ArgumentParser(prog="fla linearize", description=linearize.__doc__)
    parser.add_argument("teacher", help="folder or hub name of a Llama, Qwen, Mistral, ...")
    parser.add_argument("out", help="folder of the conversion; the same command goes on in it")
    parser.add_argument("--config", help="YAML or JSON file, fields as in fla/linearize/config.py")
    parser.add_argument("--stage", help="run one stage alone")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="as in align.tokens=1e6"
    )
    parser.add_argument("--compare", metavar="A,B,...", help="rules side by side, small budget")
    parser.add_argument("--dry_run", action="store_true", help="print what it would take")
    parser.add_argument("--tflops", type=float, default=989, help="peak of the device, for that")
    parser.add_argument("--memory", type=float, default=80, help="GB of the device, for that")
    args = parser.parse_args(argv)

    from rich.console import Console

    from fla.linearize import config, plan
    from fla.linearize.compare import compare
    from fla.linearize.run import Conversion, Stopped

    wanted = config.load(args.config, args.set)
    console = Console(highlight=False, soft_wrap=True)
    if args.dry_run:
        return 0 if plan.show(args.teacher, wanted, args.tflops, args.memory, console) else 1
    try:
        if args.compare:
            compare(args.teacher, args.out, args.compare.split(","), wanted, console)
        else:
            Conversion(args.teacher, args.out, wanted, console).run(args.stage)
    except Stopped:
        print("fla linearize: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def doctor(argv: list[str]) -> int:
    """`fla doctor`: versions, devices, what each operator would run and why, which transformers
    models use us.
    """
    argparse.ArgumentParser(prog="fla doctor", description=doctor.__doc__).parse_args(argv)
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import fla
    from fla.models.provider import report
    from fla.ops.engine.dispatch import explain
    from fla.ops.engine.native import library
    from fla.ops.registry import OPS
    from fla.utils import get_available_device

    def line(name: str, value: object) -> None:
        print(f"  {name:<34} {value}")

    print("versions")
    line("fla", fla.__version__)
    line("python", platform.python_version())
    for package in ("torch", "transformers", "triton", "accelerate", "datasets", "tensorboard"):
        try:
            line(package, version(package))
        except PackageNotFoundError:
            line(package, "not installed")
    device = get_available_device()
    print("device")
    line("used by default", device)
    line("native kernels", library.MISSING or library.instruction_set_name())
    line("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for i in range(torch.cuda.device_count()):
        line(f"cuda:{i}", torch.cuda.get_device_name(i))
    print("operators")
    for op in OPS:
        inputs = op.inputs(1, 8, 1, 4, 4, device=device)
        for function in (op.chunk, op.token):
            found = explain(function, next(iter(inputs.values())))
            line(found.op, f"{found.backend}: {found.form}")
    print(f"  because: {found.why}")
    for name, reason in found.rejected.items():
        print(f"  not {name}: {reason}")
    print("transformers models")
    for use in report():
        line(use.model, f"{use.function}: {use.runs} ({use.why})")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "generate": generate,
    "eval": evaluate,
    "linearize": linearize,
    "task": task,
    "study": study,
    "doctor": doctor,
}
HELP = "usage: fla COMMAND ...\n\n" + "\n".join(
    f"  {name:<10} {(verb.__doc__ or '').partition(': ')[2].rstrip('.')}"
    for name, verb in VERBS.items()
)

if __name__ == "__main__":
    sys.exit(main())
