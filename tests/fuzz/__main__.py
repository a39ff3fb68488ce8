# SPDX-License-Identifier: MIT
"""What public functions, modules, layers and models make of bad input: `make fuzz`, or
`python -m tests.fuzz --every 1 --groups ops layers`.

Every target is a call that works. One argument at a time is replaced by something wrong: another
type, dtype, rank, size or device, NaN, a negative or zero count, an unknown string. What comes back
is counted as

    clear    a ValueError or TypeError that names the argument
    unclear  any other error
    silent   a result
    crash    the process ended, or did not answer within `TIMEOUT` seconds

The last three are to be zero. Replacements that are right after all (`ok`) are listed in the
tables below, by argument. `--every n` tries each n-th replacement, from a seeded order.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import pickle
import random
import select
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.targets import GROUPS, Target, targets

TIMEOUT = 20.0
OUTCOMES = ("clear", "ok", "unclear", "silent", "crash")


@dataclass(frozen=True)
class Trial:
    """One replacement: `value` for the argument `name` of a target; `right` if it is no mistake."""

    target: str
    name: str
    label: str
    value: Any
    right: bool = False


@dataclass
class Report:
    counts: Counter = field(default_factory=Counter)
    bad: list[tuple[str, Trial, str]] = field(default_factory=list)

    def add(self, outcome: str, trial: Trial, said: str) -> None:
        self.counts[outcome] += 1
        if outcome not in ("clear", "ok"):
            self.bad.append((outcome, trial, said))


def tensor_trials(target: Target, name: str, x: Tensor) -> Iterator[tuple[str, Any, bool]]:
    """(label, value, whether it is right) for a tensor argument."""
    yield "text", "x", False
    yield "list", [1.0, 2.0], False
    yield "number", 3, False
    if name not in target.optional:
        yield "None", None, False
    if x.is_floating_point():
        yield "int64", x.long(), False
        yield "bool", x > 0, False
        yield "complex", x.to(torch.complex64), False
        yield "lazily negated", torch._neg_view(-x), True
    else:
        yield "floats", x.double() + 0.25, False
        yield "complex", x.to(torch.complex64), False
    yield "meta", x.to("meta"), False
    rows = x.dim() in target.free.get(name, ())
    if x.dim():
        yield "rank - 1", x[0], rows
    yield "rank + 1", x[None], rows
    for axis in range(x.dim()):
        free = axis in target.free.get(name, ())
        if x.shape[axis] > 1:
            yield f"axis {axis} - 1", x.narrow(axis, 0, x.shape[axis] - 1), free
        if not free:
            yield f"axis {axis} empty", x.narrow(axis, 0, 0), False
            yield f"axis {axis} + 1", torch.cat([x, x.narrow(axis, 0, 1)], axis), False


def scalar_trials(
    target: Target, name: str, value: Any, kind: str
) -> Iterator[tuple[str, Any, bool]]:
    """The same for another argument, of the annotation `kind`."""
    options = [part.strip() for part in kind.split("|")]
    if "None" not in options:
        yield "None", None, False
    yield "object", object(), False
    if "str" in options:
        yield "unknown", "nosuch", False
        yield "number", 3, False
    elif "list" not in kind and "dict" not in kind:
        yield "text", "3", False
    if "bool" in options:
        yield "2", 2, False
    if "int" in options and "float" not in options:
        yield "fraction", 1.5, False
        yield "negative", -1, (name, "negative") in RIGHT
        yield "zero", 0, (name, "zero") in RIGHT
    if "float" in options:
        yield "nan", math.nan, False
        yield "infinite", math.inf, (name, "infinite") in RIGHT


RIGHT: set[tuple[str, str]] = {
    ("layer_idx", "zero"),
    ("logits_to_keep", "zero"),
    ("ignore_index", "negative"),
    ("ignore_index", "zero"),
    ("num_items_in_batch", "zero"),
    ("seed", "zero"),
    ("pad_token_id", "zero"),
    ("pad_token_id", "negative"),
    ("bos_token_id", "zero"),
    ("bos_token_id", "negative"),
    ("eos_token_id", "zero"),
    ("eos_token_id", "negative"),
    ("dt_rank", "number"),
    ("input_gate_low_rank", "number"),
    ("time_step_rank", "number"),
}


def trials(target: Target) -> Iterator[Trial]:
    hints, off = annotations(target.function), flags_off(target.function)
    for name, value in target.arguments.items():
        if isinstance(value, Tensor):
            found = tensor_trials(target, name, value)
        else:
            found = scalar_trials(target, name, value, hints.get(name, ""))
        for label, bad, right in found:
            right = right or (name, label) in RIGHT or label in target.right
            right = right or (label == "None" and name in off)  # a flag that is off by default
            yield Trial(target.name, name, label, bad, right)
    for name, label, bad in target.further:
        yield Trial(target.name, name, label, bad)


def flags_off(function: Callable) -> set[str]:
    """The parameters whose default is False."""
    function = function.forward if isinstance(function, torch.nn.Module) else function
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is False and "bool" in str(p.annotation)}


def annotations(function: Callable) -> dict[str, str]:
    """Annotations of the parameters as text."""
    if is_dataclass(inspect.unwrap(function)):
        return {f.name: str(f.type) for f in fields(inspect.unwrap(function))}
    if isinstance(function, torch.nn.Module):
        function = function.forward
    function = function.__init__ if inspect.isclass(function) else function
    parameters = inspect.signature(function).parameters
    return {
        n: p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)
        for n, p in parameters.items()
    }


def attempt(target: Target, trial: Trial) -> tuple[str, str]:
    """(outcome, what was said)."""
    try:
        result = target.call(**{trial.name: trial.value})
    except (ValueError, TypeError) as error:
        named = target.names(trial.name, str(error))
        if isinstance(target.arguments.get(trial.name), Tensor) or trial.name == "cu_seqlens":
            # sizes and devices that disagree are told of either argument
            others = [n for n in target.tensors() if target.names(n, str(error))]
            said = any(word in str(error) for word in ("expected", "move "))
            named = named or (said and bool(others))
        return ("clear" if named else "unclear"), f"{type(error).__name__}: {error}"[:300]
    except Exception as error:
        return "unclear", f"{type(error).__name__}: {error}"[:300]
    if trial.right:
        return "ok", ""
    return "silent", f"{type(result).__name__}"


def run(target: Target, chosen: list[Trial], report: Report) -> None:
    """All trials of a target, in children that may end."""
    begin = 0
    while begin < len(chosen):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _answer(target, chosen[begin:], writer)
        os.close(writer)
        begin += _collect(reader, child, chosen[begin:], report)


def _answer(target: Target, chosen: list[Trial], writer: int) -> None:
    """In the child: outcomes one by one, as pickles behind their length."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for trial in chosen:
        data = pickle.dumps(attempt(target, trial))
        os.write(writer, len(data).to_bytes(4, "little") + data)
    os._exit(0)


def _collect(reader: int, child: int, chosen: list[Trial], report: Report) -> int:
    """How many trials a child answered, or ended with."""
    done = 0
    with os.fdopen(reader, "rb") as stream:
        while done < len(chosen):
            ready, _, _ = select.select([stream], [], [], TIMEOUT)
            size = stream.read(4) if ready else b""
            if len(size) < 4:
                os.kill(child, signal.SIGKILL)
                report.add("crash", chosen[done], "the process ended" if ready else "no answer")
                done += 1
                break
            outcome, said = pickle.loads(stream.read(int.from_bytes(size, "little")))
            report.add(outcome, chosen[done], said)
            done += 1
    os.waitpid(child, 0)
    return done


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--every", type=int, default=1, help="try each n-th replacement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=20, help="bad outcomes to print of each kind")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    bad = 0
    for group in args.groups:
        report = Report()
        for target in targets(group):
            chosen = list(trials(target))
            random.Random(f"{args.seed} {target.name}").shuffle(chosen)
            run(target, chosen[:: args.every], report)
        print(group, sum(report.counts.values()), *(f"{n} {report.counts[n]}" for n in OUTCOMES))
        for kind in OUTCOMES[2:]:
            for _, trial, said in [x for x in report.bad if x[0] == kind][: args.show]:
                print(f"  {kind}: {trial.target}({trial.name}={trial.label}) {said}")
        bad += len(report.bad)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
