# SPDX-License-Identifier: MIT
"""Train a language model. Flags are the fields of `fla.training.run.RunArguments` and of
transformers' `TrainingArguments`; the defaults fit a small run on this machine. `--config FILE`
(YAML or JSON, names as the flags) sets any of them; flags win over the file.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from fla.cli.common import CommandParser


def main(argv: list[str]) -> int:
    from transformers import HfArgumentParser, TrainingArguments

    from fla.core.errors import UsageError
    from fla.training import run

    kinds: Any = (run.RunArguments, TrainingArguments)

    class Parser(CommandParser, HfArgumentParser):
        """Hugging Face's parser, which refuses with one line."""

    parser = Parser(kinds, prog="fla train", description=__doc__)
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
        flags, muon = without_muon(from_file(argv))
        arguments, training, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True
        )
        training.muon = muon
        if unknown:
            known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; fla train --help lists all"
            raise UsageError(f"there is no flag {unknown[0]}{hint}")
    except (ValueError, ImportError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(str(error)) from error
    run.train(arguments, training, argv)
    return 0


def without_muon(argv: list[str]) -> tuple[list[str], bool]:
    """The flags without `--optim muon`, which transformers does not know, and whether it was the
    last `--optim` among them.
    """
    parser = CommandParser(prog="fla train", add_help=False, allow_abbrev=False)
    parser.add_argument("--optim")
    found, others = parser.parse_known_args(argv)
    if found.optim in (None, "muon"):
        return others, found.optim == "muon"
    return [*others, "--optim", found.optim], False


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
