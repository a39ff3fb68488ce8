# SPDX-License-Identifier: MIT
"""One softmax in pieces on a sequence that lies on several ranks: queries stay where they are, and
the rows of keys and values that they meet are fetched, no others. The backward fetches them again,
and sends their gradients home.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fla.core.parallel import SequenceParallel, Shard, exchange
from fla.ops.engine.attention import pieces
from fla.ops.engine.attention.pieces import Piece

# rank, batch, tokens of keys -> its problems: rows of queries (b l + t) HQ + h, t counted on the
# rank, and of keys (b S + t) H + h, t counted in the whole row
Plan = Callable[[int, int, tuple[int, int]], Iterator[Piece]]


class Fetch:
    """Which rows of keys (t H + h) this rank needs of others, and they of it: at offset s it gets
    those of rank - s and sends to rank + s.
    """

    def __init__(self, shard: Shard, plan: Plan, heads: int, batch: int, offsets: list[int]):
        self.parallel, self.plan, self.shard = shard.parallel, plan, shard
        self.heads, self.batch = heads, batch
        size, rank = self.parallel.size, shard.rank
        self.needed, self.wanted = {}, {}
        for s in offsets:
            source, to = (rank - s) % size, (rank + s) % size
            self.needed[source] = self.rows(rank, source)
            self.wanted[to] = self.rows(to, rank) - shard.begin * heads
        self.sources = sorted(self.needed)
        self.every = torch.cat([self.needed[p] for p in self.sources])

    def span(self, rank: int) -> tuple[int, int]:
        return self.shard.ends[rank], self.shard.ends[rank + 1]

    def rows(self, rank: int, source: int) -> Tensor:
        """Rows of keys that a rank needs of another, sorted."""
        found = [piece.k.flatten().unique() for piece in self.plan(rank, 1, self.span(source))]
        return torch.cat(found).unique() if found else torch.empty(0, dtype=torch.long)

    def problems(self) -> Iterator[Piece]:
        """The problems of this rank, with keys numbered as `get` lays them out."""
        length = self.shard.total * self.heads
        for source in self.sources:
            for piece in self.plan(self.shard.rank, self.batch, self.span(source)):
                row, batch = piece.k % length, piece.k // length
                place = torch.searchsorted(self.every.to(row.device), row)
                yield replace(piece, k=batch * len(self.every) + place)

    def get(self, x: Tensor) -> Tensor:
        """Rows of keys `[B, l, H, D]` of all ranks that are needed here, `[B n, 1, D]`."""
        own = x.flatten(1, 2)
        sends = [(own[:, rows.to(x.device)].contiguous(), to) for to, rows in self.wanted.items()]
        found = {p: x.new_empty(len(x), len(rows), x.shape[3]) for p, rows in self.needed.items()}
        self.trade(sends, found)
        return torch.cat([found[p] for p in self.sources], 1).reshape(-1, 1, x.shape[3])

    def give_back(self, grad: Tensor, total: Tensor) -> None:
        """Send home the gradients of what `get` returned; adds them to `[B, l, H, D]`."""
        D = grad.shape[-1]
        parts = grad.view(self.batch, len(self.every), D)
        sizes = [len(self.needed[p]) for p in self.sources]
        sends = [
            (x.contiguous(), p) for p, x in zip(self.sources, parts.split(sizes, 1), strict=True)
        ]
        found = {p: grad.new_empty(self.batch, len(rows), D) for p, rows in self.wanted.items()}
        self.trade(sends, found)
        for p, rows in self.wanted.items():
            total.flatten(1, 2).index_add_(1, rows.to(total.device), found[p])

    def trade(self, sends: list[tuple[Tensor, int]], found: dict[int, Tensor]) -> None:
        rank = self.shard.rank
        for x, to in sends:
            if to == rank:
                found[rank].copy_(x)
        exchange(
            self.parallel,
            [(x, to) for x, to in sends if to != rank and x.numel()],
            [(x, p) for p, x in found.items() if p != rank and x.numel()],
        )


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, fetches: list[Fetch], scale: float
    ) -> tuple[Tensor, Tensor]:
        rows, into = _flat(q), None
        for fetch in fetches:
            keys = (pieces.compute(fetch.get(x)) for x in (k, v))
            into = pieces.forward(pieces.Blocks(rows, *keys), fetch.problems, scale, into)
        assert into is not None
        o, lse = into
        o = o.view(*q.shape[:3], v.shape[3]).to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.fetches, ctx.scale = fetches, scale
        ctx.mark_non_differentiable(lse)
        return o, lse.view(q.shape[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        rows, do, out = _flat(q), _flat(grads[0]), _flat(o)
        found = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v)]
        for fetch in ctx.fetches:
            keys = (pieces.compute(fetch.get(x)) for x in (k, v))
            given = pieces.Blocks(rows, *keys)
            part = pieces.backward(do, given, out, lse, fetch.problems, ctx.scale)
            found[0] += part[0].view(q.shape)
            for grad, total in zip(part[1:], found[1:], strict=True):
                fetch.give_back(grad, total)
        return *(g.to(x.dtype) for g, x in zip(found, (q, k, v), strict=True)), None, None


def _flat(x: Tensor) -> Tensor:
    return pieces.compute(x).reshape(-1, 1, x.shape[-1])


def attend_sharded(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, plan: Plan, scale: float, in_turn: bool
) -> tuple[Tensor, Tensor]:
    """o `[B, l, HQ, V]` and the log-sum-exp `[B, l, HQ]` of this rank's queries; `in_turn` fetches
    from one rank at a time, and holds no more.
    """
    offsets = list(range(shard.parallel.size))
    make = partial(Fetch, shard, plan, k.shape[2], len(k))
    fetches = [make([s]) for s in offsets] if in_turn else [make(offsets)]
    return _Sharded.apply(q, k, v, fetches, scale)


class _AllToAll(torch.autograd.Function):
    """`[B, l, H, D]` of a rank's tokens to `[B, T, H / P, D]` of its heads, or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, to_heads: bool) -> Tensor:
        ctx.shard, ctx.to_heads = shard, to_heads
        return _exchanged(x, shard, to_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _exchanged(grads[0], ctx.shard, not ctx.to_heads), None, None


def _exchanged(x: Tensor, shard: Shard, to_heads: bool) -> Tensor:
    parallel, rank = shard.parallel, shard.rank
    lengths = [b - a for a, b in pairwise(shard.ends)]
    parts = x.chunk(parallel.size, 2) if to_heads else x.split(lengths, 1)
    sends = [part.contiguous() for part in parts]
    heads = sends[0].shape[2]
    sizes = lengths if to_heads else [lengths[rank]] * parallel.size
    found = [x.new_empty(len(x), n, heads, x.shape[3]) for n in sizes]
    found[rank].copy_(sends[rank])
    others = [p for p in range(parallel.size) if p != rank]
    exchange(
        parallel,
        [(sends[p], p) for p in others if sends[p].numel()],
        [(found[p], p) for p in others if found[p].numel()],
    )
    return torch.cat(found, 1 if to_heads else 2)


def all_to_all(x: Tensor, shard: Shard, to_heads: bool = True) -> Tensor:
    """All tokens of this rank's share of the heads, of this rank's tokens of all heads; or back."""
    return _AllToAll.apply(x, shard, to_heads)


def check_heads(op: str, parallel: SequenceParallel, heads: int) -> None:
    """Raise `ValueError` where heads cannot be shared out."""
    if heads % parallel.size:
        raise ValueError(
            f"{op}: mode='heads' cannot divide {heads} heads of k evenly among {parallel.size} "
            "ranks; use mode='gather' or 'ring', which take any number"
        )


class _AllGather(torch.autograd.Function):
    """`[B, l, ...]` of every rank as `[B, T, ...]`; each gets the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        others = [p for p in range(shard.parallel.size) if p != shard.rank]
        sizes = [b - a for a, b in pairwise(shard.ends)]
        found = [x.new_empty(len(x), n, *x.shape[2:]) for n in sizes]
        found[shard.rank].copy_(x)
        sends = [(found[shard.rank], p) for p in others if x.numel()]
        exchange(shard.parallel, sends, [(found[p], p) for p in others if found[p].numel()])
        return torch.cat(found, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shard = ctx.shard
        others = [p for p in range(shard.parallel.size) if p != shard.rank]
        parts = grads[0].split([b - a for a, b in pairwise(shard.ends)], 1)
        own = parts[shard.rank].contiguous()
        found = [torch.empty_like(own) for _ in others]
        sends = [(parts[p].contiguous(), p) for p in others if parts[p].numel()]
        exchange(
            shard.parallel, sends, list(zip(found, others, strict=True)) if own.numel() else []
        )
        return sum(found, own.clone()), None


def all_gather(x: Tensor, shard: Shard) -> Tensor:
    """The tokens of all ranks."""
    return _AllGather.apply(x, shard)


def among_all(x: Tensor, shard: Shard) -> Tensor:
    """A rank's tokens where they lie in the whole row, zeros elsewhere."""
    room = [0, 0] * (x.dim() - 2) + [shard.begin, shard.total - shard.end]
    return torch.nn.functional.pad(x, room)
