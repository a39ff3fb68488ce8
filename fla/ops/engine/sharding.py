# SPDX-License-Identifier: MIT
"""The sequences of one rank, for operators on a sequence that lies on several ranks."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fla.core.parallel import Own, SequenceParallel, Shard, total


class LocalSequences(NamedTuple):
    """Of one call: this rank's shard, its local of sequences, and the boundaries of all."""

    shard: Shard
    own: Own
    bounds: list[int]
    packed: bool

    @classmethod
    def of(
        cls, op: str, parallel: SequenceParallel, x: Tensor, cu_seqlens: Tensor | None,
        length: int | None = None,
    ) -> "LocalSequences":  # fmt: skip
        shard = parallel.of(op, x.shape[1] if length is None else length)
        bounds = shard.bounds(op, cu_seqlens)
        return cls(shard, shard.own(bounds), bounds, cu_seqlens is not None)

    @property
    def continued(self) -> bool:
        """Whether the first piece goes on with what an earlier rank began."""
        return self.own.continued if self.packed else self.shard.rank > 0

    @property
    def cuts(self) -> Tensor | None:
        """Boundaries of the local; None for rows that are one piece each."""
        return torch.tensor(self.own.cuts) if self.packed else None

    def starts(self, states: Tensor | None, like: Tensor) -> Tensor:
        """States `[N, ...]` of sequences as those of the local, zeros where one goes on; `like` is
        a zero state `[1, ...]` or, for rows, `[B, ...]`.
        """
        if not self.packed:
            return like if states is None or self.continued else states.to(like.dtype)
        count = max(1, len(self.own.numbers))
        if states is None or not self.own.numbers:
            return like.expand(count, *like.shape[1:])
        found = states.to(like.dtype)[self.own.numbers]
        return torch.cat([like, found[1:]]) if self.own.continued else found

    def decays(self, g: Tensor, early: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """What log decays `[B, T, ...]` leave of a state that arrives: at every token (`early`:
        before it), behind the first piece, and behind all; 0 where it does not reach.
        """
        end = (self.own.cuts[1] if self.packed else g.shape[1]) if self.continued else 0
        ones = torch.ones_like(g[:, :1]) if g.shape[1] else g.new_ones(len(g), 1, *g.shape[2:])
        left = torch.cat([ones, g[:, :end].cumsum(1).exp()], 1)
        seen = left[:, :-1] if early else left[:, 1:]
        first = left[:, -1] * self.continued
        alone = not self.packed or len(self.own.numbers) <= 1
        return torch.cat([seen, torch.zeros_like(g[:, end:])], 1), first, first * alone

    def finals(self, ends: Tensor, starts: Tensor | None, like: Tensor) -> Tensor:
        """Last states `[N, ...]` of all sequences on every rank, of those of the local."""
        shard, bounds = self.shard, self.bounds
        if not self.packed:
            last = shard.rank + 1 == shard.parallel.size
            return total(shard.parallel, ends if last else torch.zeros_like(ends), ends)
        rows: list[Tensor] = []
        where = {n: j for j, n in enumerate(self.own.numbers)}
        for n, (a, b) in enumerate(pairwise(bounds)):
            if a == b:  # no tokens: it keeps its first state
                there = shard.rank == 0 and starts is not None
                rows.append(starts[n : n + 1].to(like.dtype) if there else like)  # type: ignore[index]
            else:
                here = n in where and b <= shard.end
                rows.append(ends[where[n]][None] if here else like)
        return total(shard.parallel, torch.cat(rows), ends)
