# SPDX-License-Identifier: MIT
"""What is refused of a run before anything is built: numbers out of their range, folders that
cannot be written, optimizers and reports whose packages are missing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fla.core.errors import UsageError

if TYPE_CHECKING:  # transformers takes seconds to load, and every command reads this module
    from transformers import TrainingArguments

# [least, most] of the numbers of a run; those that are not here are not checked.
RANGES: dict[str, tuple[float, float]] = {
    "seq_len": (2, math.inf),
    "sample_tokens": (1, math.inf),
    "max_minutes": (1e-9, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_train_epochs": (1e-9, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "logging_steps": (1e-9, math.inf),
    "save_steps": (1e-9, math.inf),
    "eval_steps": (1e-9, math.inf),
    "save_total_limit": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Raise `UsageError` unless a flag's number is finite and in [low, high]. A `low` that is close
    to 0 stands for any number above it.
    """
    if low <= value <= high and math.isfinite(value):
        return
    least = "above 0" if 0 < low < 1e-6 else f"from {low:g}"
    most = ("" if "above" in least else " on") if high == math.inf else f" to {high:g}"
    raise UsageError(f"--{name}: {value} is out of range; expected a number {least}{most}")


def check_numbers(*arguments: Any) -> None:
    """Raise `UsageError` for a number out of its range."""
    for values in arguments:
        for name, (low, high) in RANGES.items():
            value = getattr(values, name, None)
            if isinstance(value, int | float):
                check_number(name, value, low, high)
    for values in arguments:
        steps = getattr(values, "max_steps", None)
        if steps is not None and steps != -1 and steps < 1:
            raise UsageError(f"--max_steps: {steps} is out of range; expected 1 on, or -1 for none")


def check_folder(folder: Path) -> None:
    """Raise `UsageError` unless files can be written into a folder, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.part"
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output_dir: {folder} cannot be written: {error.strerror}") from None


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder; raise `UsageError` while another process holds it."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            who = lock.read().strip() or "unknown"
            raise UsageError(
                f"--output_dir: {folder} is being written by another run (process {who}); choose "
                "another folder, or wait for it"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def refusals(args: TrainingArguments) -> Iterator[None]:
    """What transformers' Trainer refuses when it is made is the fault of a flag."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:
        if isinstance(error, UsageError):
            raise
        problem = " ".join(str(error).split())
        values = {"report_to": args.report_to or (), "optim": [str(args.optim).rpartition(".")[2]]}
        named = [n for n, found in values.items() if any(str(x) in problem for x in found)]
        named += [n for n in ("use_liger_kernel", "optim") if n.split("_")[-2:][0] in problem]
        raise UsageError(f"--{named[0]}: {problem}" if named else problem) from error
