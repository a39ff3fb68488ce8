# SPDX-License-Identifier: MIT
"""Prompts whose answer stands in them: `fla.evals.recall` scores them, and `load_corpus("recall")`
is made of them.

    single    one line `the pin of NAME is NUMBER`, among filler, then `the pin of NAME is`
    multi     many such lines and no filler: which one is asked for
    variable  a chain of assignments `b = a`, and the number at its start
    mqar      pairs `k=7`, then all of them again in another order: the digit of the last

Everything is made from a seed; nothing is downloaded.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

FILLER = "the grass is green and the sky is blue; here we go, there and back again.\n"


@dataclass
class Prompt:
    """A context that ends where the answer begins."""

    text: str
    answer: str


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=5))


def _number(rng: random.Random) -> str:
    return "".join(rng.choices(string.digits, k=4))


def single(rng: random.Random, characters: int) -> Prompt:
    name, number = _name(rng), _number(rng)
    lines = [FILLER] * max(1, characters // len(FILLER))
    lines.insert(rng.randrange(len(lines) + 1), f"the pin of {name} is {number}.\n")
    return Prompt("".join(lines) + f"the pin of {name} is ", number)


def multi(rng: random.Random, characters: int) -> Prompt:
    line = "the pin of {} is {}.\n"
    pairs = [(_name(rng), _number(rng)) for _ in range(max(2, characters // 24))]
    name, number = rng.choice(pairs)
    return Prompt("".join(line.format(*p) for p in pairs) + f"the pin of {name} is ", number)


def variable(rng: random.Random, characters: int) -> Prompt:
    lines, names, number = [], [_name(rng) for _ in range(4)], _number(rng)
    lines.append(f"{names[0]} = {number}\n")
    lines += [f"{new} = {old}\n" for old, new in pairwise(names)]
    others = [f"{_name(rng)} = {_number(rng)}\n" for _ in range(max(1, characters // 13))]
    for i, line in enumerate(lines):  # in their order, among the others
        low = 0 if i == 0 else others.index(lines[i - 1]) + 1
        others.insert(rng.randint(low, len(others)), line)
    return Prompt("".join(others) + f"print({names[-1]})  # ", number)


def mqar(rng: random.Random, characters: int) -> Prompt:
    keys = rng.sample(string.ascii_letters, max(2, min(50, characters // 8)))
    digits = dict(zip(keys, rng.choices(string.digits, k=len(keys)), strict=True))
    first = " ".join(f"{k}={d}" for k, d in digits.items())
    rng.shuffle(keys)
    *asked, last = keys
    again = "".join(f"{k}={digits[k]} " for k in asked)
    return Prompt(f"{first}\n{again}{last}=", digits[last])


PROBES: dict[str, Callable[[random.Random, int], Prompt]] = {
    "single": single,
    "multi": multi,
    "variable": variable,
    "mqar": mqar,
}


def prompts(kind: str, count: int, characters: int, seed: int = 0) -> list[Prompt]:
    """`count` recall prompts of about `characters` characters each.

    Example:
        >>> prompt = prompts("multi", 1, 60)[0]
        >>> prompt.answer in prompt.text
        True
    """
    if kind not in PROBES:
        raise ValueError(f"recall: probe is {kind!r}; expected one of {', '.join(PROBES)}")
    rng = random.Random(f"{seed} {kind} {characters}")
    return [PROBES[kind](rng, characters) for _ in range(count)]
