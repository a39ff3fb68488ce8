# SPDX-License-Identifier: MIT
"""One sequence over several processes: the context, and what its ranks say to each other.

Rank p holds the tokens after those of the ranks before it, any number of them. Inside
`sequence_parallel` operators take and return a rank's own tokens, and boundaries (`cu_seqlens`) of
the whole row. What a rank sends is counted in `sent`, in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fla.core.boundaries import boundaries_to_list


@dataclass
class SequenceParallel:
    """Processes that hold every sequence together.

    Fields:
        group: the processes; rank, size: this one among them.
        lengths: tokens of every rank; learnt from the first operator where not given.
        sent: bytes that this rank sent, forward and backward.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    lengths: tuple[int, ...] | None = None
    sent: int = 0

    def of(self, op: str, T: int) -> Shard:
        """This rank's place, for an operator on T tokens here."""
        if self.lengths is None:
            nccl = dist.get_backend(self.group) == "nccl"
            device = torch.device("cuda" if nccl else "cpu")
            count = torch.tensor([T], device=device)
            every = [torch.empty_like(count) for _ in range(self.size)]
            dist.all_gather(every, count, group=self.group)
            self.lengths = tuple(int(x) for x in every)
        mine = self.lengths[self.rank]
        steps = T // mine if mine else 1  # an operator may take several steps per token
        if mine * steps != T or (T and not steps):
            raise ValueError(
                f"{op}: {T} tokens on rank {self.rank}, but sequence_parallel holds "
                f"{self.lengths[self.rank]} there (of {list(self.lengths)}); pass the shard that "
                "`shard` gives, and open a new context for sequences of another length"
            )
        return Shard(self, [x * steps for x in accumulate(self.lengths, initial=0)])

    def peer(self, rank: int) -> int:
        """The number of a rank of the group among all processes."""
        return dist.get_global_rank(self.group, rank % self.size)

    def count(self, *tensors: Tensor) -> None:
        self.sent += sum(x.numel() * x.element_size() for x in tensors)


@dataclass(frozen=True)
class Shard:
    """The tokens of a rank: `ends[p]` to `ends[p + 1]` of the whole row."""

    parallel: SequenceParallel
    ends: list[int]

    @property
    def rank(self) -> int:
        return self.parallel.rank

    @property
    def begin(self) -> int:
        return self.ends[self.rank]

    @property
    def end(self) -> int:
        return self.ends[self.rank + 1]

    @property
    def total(self) -> int:
        return self.ends[-1]

    def bounds(self, op: str, cu_seqlens: Tensor | None) -> list[int]:
        """The boundaries of the whole row, on the host; without cu_seqlens it is one sequence."""
        if cu_seqlens is None:
            return [0, self.total]
        return boundaries_to_list(cu_seqlens, self.total, op)

    def own(self, bounds: list[int], rank: int | None = None) -> Own:
        """The sequences that have tokens here, or on another rank."""
        rank = self.rank if rank is None else rank
        begin, end = self.ends[rank], self.ends[rank + 1]
        found = [
            (n, min(b, end))
            for n, (a, b) in enumerate(pairwise(bounds))
            if max(a, begin) < min(b, end)
        ]
        cuts = [begin, *(b for _, b in found)] if found else [begin, begin]
        numbers = [n for n, _ in found]
        continued = bounds[numbers[0]] < begin if numbers else rank > 0
        return Own([x - begin for x in cuts], numbers, continued)


@dataclass(frozen=True)
class Own:
    """The parts of sequences that a rank holds.

    Fields:
        cuts: their boundaries, from 0.
        numbers: the sequences they belong to; empty if the rank has no tokens.
        continued: whether the first part began on an earlier rank, or would have without tokens.
    """

    cuts: list[int]
    numbers: list[int]
    continued: bool


_active: SequenceParallel | None = None


def current() -> SequenceParallel | None:
    """The `SequenceParallel` that is active, or None."""
    return _active


@contextmanager
def using(parallel: SequenceParallel | None) -> Iterator[None]:
    """Make `parallel` the active context inside the block; None makes none active."""
    global _active
    previous, _active = _active, parallel
    try:
        yield
    finally:
        _active = previous


def refuse_sharded(op: str, why: str = "it has no sequence-parallel form") -> None:
    """Raise `ValueError` inside `sequence_parallel`."""
    if _active is not None:
        raise ValueError(f"{op}: called inside sequence_parallel, but {why}; call it outside")


def sharded_by(form: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Inside `sequence_parallel`, call `form(parallel, function, *args)` in its place."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any) -> Any:
            return function(*args) if _active is None else form(_active, function, *args)

        return call

    return decorate


def exchange(
    parallel: SequenceParallel,
    sends: Sequence[tuple[Tensor, int]],
    receives: Sequence[tuple[Tensor, int]],
) -> None:
    """Send and receive point to point, all at once; ranks are numbered within the group."""
    work = [dist.P2POp(dist.isend, x, parallel.peer(to), parallel.group) for x, to in sends]
    work += [dist.P2POp(dist.irecv, x, parallel.peer(by), parallel.group) for x, by in receives]
    for request in dist.batch_isend_irecv(work) if work else []:
        request.wait()
    parallel.count(*(x for x, _ in sends))


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor | None) -> Tensor:
        ctx.shapes = [None if y is None else y.shape for y in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *(s if s is None else grads[0].new_zeros(s) for s in ctx.shapes)


def tie(x: Tensor, *others: Tensor | None) -> Tensor:
    """x, with a gradient of zero for `others`: a rank that does not use what it received, or has no
    tokens, still has to take part in sending the gradient back.
    """
    return _Tie.apply(x, *others)
