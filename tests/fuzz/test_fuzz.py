# SPDX-License-Identifier: MIT
"""Bad input is an error that names its argument: a seeded sample of `make fuzz`, and that the tool sees
what it is to see."""

import os
import re
import time

import pytest
import torch
from torch import Tensor

from fla._arguments import checked, shaped
from tests import processes
from tests.fuzz import __main__ as fuzz
from tests.fuzz.targets import Target


def test_a_sample_of_all_groups():
    ended = processes.run("-m", "tests.fuzz", "--every", "6")
    said = ended.stdout
    counts = re.findall(
        r"^(\w+) (\d+) clear (\d+) ok (\d+) unclear 0 silent 0 crash 0$", said, re.MULTILINE
    )
    assert [name for name, *_ in counts] == ["ops", "functions", "modules", "layers", "models"], (
        said
    )
    assert sum(int(n) for _, n, *_ in counts) > 5000


def careless(x: Tensor, scale: float = 1.0) -> Tensor:
    return x


def crashing(x: Tensor) -> Tensor:
    os.abort()


def hanging(x: Tensor) -> Tensor:
    time.sleep(60)
    return x


def vague(x: Tensor) -> Tensor:
    raise ValueError("something is wrong")


@pytest.mark.parametrize(
    ("function", "outcome"),
    [(careless, "silent"), (crashing, "crash"), (hanging, "crash"), (vague, "unclear")],
)
def test_what_is_counted(function, outcome, monkeypatch):
    monkeypatch.setattr(fuzz, "TIMEOUT", 0.3)
    target, report = Target(function.__name__, function, dict(x=torch.ones(2, 3))), fuzz.Report()
    chosen = [trial for trial in fuzz.trials(target) if not trial.right][:3]
    fuzz.run(target, chosen, report)
    assert report.counts == {outcome: 3}


@checked
def typed(x: Tensor, heads: int, rate: float = 0.1, on: bool = False, name: str | None = None,
          layer_idx: int | None = None, pair: tuple[float, float] = (0.0, 1.0), sizes: list[int] | None = None):  # fmt: skip
    return heads


X = torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=None), "x is None; expected a torch.Tensor"),
        (dict(heads=0), "heads is 0; expected a whole number from 1 on"),
        (dict(heads=True), "heads is True; expected a whole number"),
        (dict(heads=1.5), "heads is 1.5; expected a whole number"),
        (dict(rate=float("nan")), "rate is nan; expected a finite number"),
        (dict(rate=X), "rate is a Tensor; expected a number"),
        (dict(on=1), "on is 1; expected True or False"),
        (dict(name=3), "name is 3; expected a string or None"),
        (dict(layer_idx=-1), "layer_idx is -1; expected a whole number from 0 on"),
        (dict(pair=(1.0,)), "pair is a tuple; expected 2 numbers"),
        (dict(sizes=3), "sizes is 3; expected a list or None"),
    ],
)
def test_annotations_are_held(arguments, message):
    assert (
        typed(X, 1, 2, True, "a", 0, [0, 1], (3,))
        == typed(X, 1, on=None)
        == typed(X, 1, 0.5, None)
        == 1
    )
    with pytest.raises((ValueError, TypeError), match=re.escape(f"typed: {message}")):
        typed(**{"x": X, "heads": 2} | arguments)


@shaped(x="... D", g="<... D", weight="V D")
def rows(x: Tensor, g: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=torch.ones(3, 4, dtype=torch.long)), "x has dtype torch.int64"),
        (dict(g=torch.ones(5, 3, 4)), r"g has shape [5, 3, 4]; expected [3, D=4], as x has"),
        (dict(weight=torch.ones(4)), r"weight has shape [4]; expected [V, D=4], as x has"),
        (dict(weight=torch.ones(2, 3)), r"weight has shape [2, 3]; expected"),
        (dict(g=torch.ones(3, 4, device="meta")), "g is on meta and x on cpu; move one of them"),
    ],
)
def test_shape_strings_are_held(arguments, message):
    good = dict(x=torch.ones(3, 4), g=torch.ones(1, 4), weight=torch.ones(2, 4))
    assert rows(**good).shape == (3, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        rows(**good | arguments)


def test_checks_disappear_in_a_compiled_graph():
    compiled = torch.compile(
        lambda x: typed(x, 2) * rows(x, x), fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.ones(2, 3)).sum() == 12
