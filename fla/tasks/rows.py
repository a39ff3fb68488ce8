# SPDX-License-Identifier: MIT
"""The tasks. Each makes rows of tokens on the fly, from a generator, of any length:

| task | a row | asked |
|---|---|---|
| copy, reverse, sorting | symbols, a separator, and then | them again, from the last, in order |
| selective_copy | eight symbols among blanks, then markers | the symbols in their order |
| induction | symbols, one of them after a trigger; the trigger again | what followed it |
| mqar | pairs of key and value, then the keys in another order | the value of each |
| overwrite | every key is written twice, then asked | its last value |
| single_needle, multi_needle | one or four `mark key value` in noise, then `mark key` | the value |
| variables | assignments from values and other names, in chains | the value a chain's end has |
| parity, modular_addition | bits, digits below 7 | the sum so far, modulo 2 or 7 |
| s5 | permutations of five things | the product so far |

Arora et al. (2023), *Zoology*, arXiv:2312.04927 (mqar); Gu, Dao (2023), arXiv:2312.00752 (selective
copy, induction); Hsieh et al. (2024), *RULER*, arXiv:2404.06654 (needles, variables); Merrill et
al. (2024), arXiv:2404.08819 and Grazzi et al. (2024), arXiv:2411.12537 (state tracking).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Generator, Tensor

IGNORE = -100
BLANK, SEPARATOR, MARK, FIRST = 0, 1, 2, 4  # symbols begin at FIRST
SYMBOLS = 32
NAMES = 128  # keys, and names of variables
VALUES = 32


class Rows(NamedTuple):
    """`input_ids` and `labels` `[rows, tokens + 1]` as transformers' models take them: token t
    predicts `labels[t + 1]`, and nothing is asked where that is -100.
    """

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A task and the lengths it is learnt and tried at.

    Fields:
        make: (generator, rows, tokens) to `(inputs, answers)` `[rows, about tokens]`; an answer is
            to be given at its own position, -100 where none is asked.
        vocabulary: number of tokens; answers: how many an answer can be, so that guessing is right
            1 / answers of the time.
        length: the longest it is learnt at; most: the longest there is, for want of names.
        least: the shortest there is.
    """

    name: str
    make: Callable[[Generator, int, int], tuple[Tensor, Tensor]]
    vocabulary: int
    answers: int
    length: int = 64
    most: int | None = None
    least: int = 8

    def rows(self, count: int, length: int, seed: int) -> Rows:
        """Rows of about `length` tokens.

        Example:
            >>> rows = task_of("parity").rows(2, 5, seed=0)
            >>> rows.input_ids.shape, rows.labels[:, 0].tolist()
            (torch.Size([2, 6]), [-100, -100])
        """
        if length < self.least:
            raise ValueError(
                f"task {self.name}: length is {length}; at least {self.least} was expected"
            )
        if self.most is not None and length > self.most:
            raise ValueError(
                f"task {self.name}: length is {length}, but there are names for {self.most} tokens "
                "only; choose a shorter one"
            )
        inputs, answers = self.make(torch.Generator().manual_seed(seed), count, length)
        nothing = torch.full((count, 1), IGNORE)
        return Rows(
            torch.cat([inputs, torch.full((count, 1), BLANK)], 1), torch.cat([nothing, answers], 1)
        )


def _symbols(generator: Generator, *shape: int, of: int = SYMBOLS) -> Tensor:
    return FIRST + torch.randint(of, shape, generator=generator)


def _order(generator: Generator, rows: int, n: int) -> Tensor:
    """A permutation of n a row."""
    return torch.rand(rows, n, generator=generator).argsort(1)


def _unasked(*parts: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, IGNORE) for x in parts], 1)


def _again(change: Callable[[Tensor], Tensor]) -> Callable:
    def make(generator: Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
        x = _symbols(generator, rows, length // 2)
        y = change(x)
        inputs = torch.cat([x, torch.full((rows, 1), SEPARATOR), y[:, :-1]], 1)
        return inputs, torch.cat([_unasked(x), y], 1)

    return make


def selective_copy(generator: Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
    n = min(8, length // 4)
    body = torch.full((rows, length - n), BLANK)
    wanted = _symbols(generator, rows, n)
    places = _order(generator, rows, length - n)[:, :n].sort(1).values
    body.scatter_(1, places, wanted)
    marks = torch.full((rows, n), SEPARATOR)
    return torch.cat([body, marks], 1), torch.cat([_unasked(body), wanted], 1)


def induction(generator: Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
    x = _symbols(generator, rows, length)
    place = torch.randint(length - 3, (rows, 1), generator=generator)
    x.scatter_(1, place, MARK)
    x[:, -1] = MARK
    answers = torch.full_like(x, IGNORE)
    answers[:, -1:] = x.gather(1, place + 1)
    return x, answers


def _keys(generator: Generator, rows: int, n: int) -> tuple[Tensor, Tensor]:
    """Different names, and what they are asked in the end: an order of them."""
    return FIRST + _order(generator, rows, NAMES)[:, :n], _order(generator, rows, n)


def _values(generator: Generator, rows: int, n: int) -> Tensor:
    return NAMES + _symbols(generator, rows, n, of=VALUES)


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], 2).flatten(1)


def mqar(generator: Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
    n = length // 3
    keys, order = _keys(generator, rows, n)
    values = _values(generator, rows, n)
    told = _pairs(keys, values)
    return (
        torch.cat([told, keys.gather(1, order)], 1),
        torch.cat([_unasked(told), values.gather(1, order)], 1),
    )


def overwrite(generator: Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
    n = length // 5
    keys, order = _keys(generator, rows, n)
    writes = _order(generator, rows, 2 * n)  # write i is of key i modulo n
    values = _values(generator, rows, 2 * n)
    told = _pairs(keys.gather(1, writes % n), values)
    when = writes.argsort(1).view(rows, 2, n).max(1).values  # the later one's place
    last = values.gather(1, when)
    return (
        torch.cat([told, keys.gather(1, order)], 1),
        torch.cat([_unasked(told), last.gather(1, order)], 1),
    )


def _needles(count: int) -> Callable:
    def make(generator: Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
        n = min(count, length // 5)
        noise = length - 5 * n
        keys, order = _keys(generator, rows, n)
        values = _values(generator, rows, n)
        needle = torch.stack([torch.full_like(keys, MARK), keys, values], 2)
        text = NAMES + VALUES + _symbols(generator, rows, noise)
        # places among the noise: needle i begins after so much of it
        before = torch.randint(noise + 1, (rows, n), generator=generator).sort(1).values
        at = before + 3 * torch.arange(n)
        body = torch.full((rows, noise + 3 * n), -1)
        body.scatter_(1, (at[:, :, None] + torch.arange(3)).flatten(1), needle.flatten(1))
        body[body < 0] = text.flatten()
        asked = keys.gather(1, order)
        questions = _pairs(torch.full_like(asked, MARK), asked)
        answers = _pairs(torch.full_like(asked, IGNORE), values.gather(1, order))
        return torch.cat([body, questions], 1), torch.cat([_unasked(body), answers], 1)

    return make


def variables(generator: Generator, rows: int, length: int, hops: int = 3) -> tuple[Tensor, Tensor]:
    """Chains of `hops` names: the first gets a value, each other the one before it."""
    n = length // (2 * hops + 2)
    names, _ = _keys(generator, rows, n * hops)
    names = names.view(rows, n, hops)
    values = _values(generator, rows, n)
    sources = torch.cat([values[:, :, None], names[:, :, :-1]], 2)
    # chains interleave, each in its own order
    when = torch.rand(rows, n, hops, generator=generator).sort(2).values.flatten(1).argsort(1)
    told = _pairs(names.flatten(1).gather(1, when), sources.flatten(1).gather(1, when))
    order = _order(generator, rows, n)
    asked = names[:, :, -1].gather(1, order)
    questions = _pairs(torch.full_like(asked, MARK), asked)
    answers = _pairs(torch.full_like(asked, IGNORE), values.gather(1, order))
    return torch.cat([told, questions], 1), torch.cat([_unasked(told), answers], 1)


def _sums(modulus: int) -> Callable:
    def make(generator: Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(modulus, (rows, length), generator=generator)
        return FIRST + x, FIRST + x.cumsum(1) % modulus

    return make


def s5(generator: Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
    elements = torch.tensor(list(permutations(range(5))))
    number = {tuple(p): i for i, p in enumerate(elements.tolist())}
    product = torch.tensor(
        [[number[tuple(a[x] for x in b)] for b in elements.tolist()] for a in elements.tolist()]
    )
    x = torch.randint(120, (rows, length), generator=generator)
    so_far = [x[:, 0]]
    for t in range(1, length):
        so_far.append(product[x[:, t], so_far[-1]])
    return FIRST + x, FIRST + torch.stack(so_far, 1)


TEXT = FIRST + SYMBOLS
RECALL = FIRST + NAMES + VALUES
TASKS = {
    task.name: task
    for task in (
        Task("copy", _again(lambda x: x), TEXT, SYMBOLS),
        Task("reverse", _again(lambda x: x.flip(1)), TEXT, SYMBOLS),
        Task("sorting", _again(lambda x: x.sort(1).values), TEXT, SYMBOLS),
        Task("selective_copy", selective_copy, TEXT, SYMBOLS),
        Task("induction", induction, TEXT, SYMBOLS),
        Task("mqar", mqar, RECALL, VALUES, length=24, most=3 * NAMES),
        Task("overwrite", overwrite, RECALL, VALUES, length=40, most=5 * NAMES),
        Task("single_needle", _needles(1), RECALL + SYMBOLS, VALUES),
        Task("multi_needle", _needles(4), RECALL + SYMBOLS, VALUES),
        Task("variables", variables, RECALL, VALUES, most=8 * (NAMES // 3)),
        Task("parity", _sums(2), FIRST + 2, 2, length=40, least=1),
        Task("modular_addition", _sums(7), FIRST + 7, 7, length=40, least=1),
        Task("s5", s5, FIRST + 120, 120, length=40, least=1),
    )
}


def task_of(name: str) -> Task:
    """The task of that name, or `ValueError` with those that are near."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"task {name!r} is not known{hint} There are {', '.join(TASKS)}")
    return TASKS[name]
