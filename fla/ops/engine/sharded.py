# SPDX-License-Identifier: MIT
"""The one recurrence, and its relatives, on a sequence that lies on several ranks.

A recurrence is linear in the state it starts from. Every rank computes what its tokens do to a
state that arrives, `A`, and what they add, `S`; the state itself then goes through the ranks in
turn, one message of its size from each to the next, and each corrects its outputs. The gradient
goes the same way back.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla.ops.engine.chunk import compute_dtype
from fla.ops.engine.parallel import (
    Own,
    SequenceParallel,
    Shard,
    carry,
    gather,
    halo,
    tie,
    total,
    using,
)


class Pieces(NamedTuple):
    """Of one call: this rank's shard, its pieces of sequences, and the boundaries of all."""

    shard: Shard
    own: Own
    bounds: list[int]
    packed: bool

    @classmethod
    def of(
        cls, op: str, parallel: SequenceParallel, x: Tensor, cu_seqlens: Tensor | None,
        length: int | None = None,
    ) -> "Pieces":  # fmt: skip
        shard = parallel.of(op, x.shape[1] if length is None else length)
        bounds = shard.bounds(op, cu_seqlens)
        return cls(shard, shard.own(bounds), bounds, cu_seqlens is not None)

    @property
    def continued(self) -> bool:
        """Whether the first piece goes on with what an earlier rank began."""
        return self.own.continued if self.packed else self.shard.rank > 0

    @property
    def cuts(self) -> Tensor | None:
        """Boundaries of the pieces; None for rows that are one piece each."""
        return torch.tensor(self.own.cuts) if self.packed else None

    def starts(self, states: Tensor | None, like: Tensor) -> Tensor:
        """States `[N, ...]` of sequences as those of the pieces, zeros where one goes on; `like` is
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
        """Last states `[N, ...]` of all sequences on every rank, of those of the pieces."""
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


Run = Callable[..., tuple[Tensor, Tensor]]


def recurrence(
    run: Run,
    op: str,
    parallel: SequenceParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gv: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    read_before: bool,
    keep: bool,
    **gates: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`run(q, k, v, ..., initial_state=, cu_seqlens=)` of the engine over all ranks; states `[N,
    HV, K, V]`. Without a decay of value channels, A comes out of the same run as S: on value
    channels `[0, v]` from the state `[1, S]`.
    """
    pieces = Pieces.of(op, parallel, v, cu_seqlens)
    wide = compute_dtype(q.dtype)
    shape = (1 if pieces.packed else v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    zero = torch.zeros(shape, dtype=wide, device=v.device)
    # a rank without tokens may get its state back as it is
    state = tie(pieces.starts(initial_state, zero), q, k, v, gv, initial_state, *gates.values())
    if gv is None:
        if gates["beta"] is not None and gates["beta"].dim() == 4:
            raise ValueError(
                f"{op}: inside sequence_parallel beta is one number a head; pass [B, T, HV], or "
                "call it outside"
            )
        o, ends = _rows(run, pieces, q, k, v, state, zero, gates)
    else:
        if any(x is not None for x in gates.values()):
            raise ValueError(
                f"{op}: inside sequence_parallel a decay of value channels comes alone; call it "
                "outside"
            )
        o, ends = _columns(run, pieces, q, k, v, gv, state, zero, scale, read_before)
    return o, pieces.finals(ends, initial_state, zero[:1]) if keep else None


def _rows(
    run: Run, pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, state: Tensor, zero: Tensor,
    gates: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, and the last states of the pieces."""
    K = q.shape[3]
    unit = torch.eye(K, dtype=state.dtype, device=state.device).expand(*zero.shape[:3], K)
    none = torch.zeros_like(state[..., :1]).expand(*state.shape[:3], K)
    first = unit if pieces.continued else none[: len(unit)]
    start = torch.cat([torch.cat([first, none[len(unit) :]]), state], -1)
    values = torch.cat([v.new_zeros(*v.shape[:3], K), v], -1)
    with using(None):
        o, ends = run(q, k, values, **gates, initial_state=start, cu_seqlens=pieces.cuts)
    last = ends[-1:] if pieces.packed else ends
    arrived = carry(pieces.shard.parallel, last[..., :K], last[..., K:])
    o = o[..., K:] + torch.einsum("bthk,bhkv->bthv", o[..., :K].to(arrived), arrived).to(o.dtype)
    return o, ends[..., K:] + ends[..., :K] @ arrived


def _columns(
    run: Run, pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, gv: Tensor, state: Tensor,
    zero: Tensor, scale: float, read_before: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same where value channels decay: what arrives is multiplied, channel by channel."""
    with using(None):
        o, ends = run(q, k, v, gv=gv, initial_state=state, cu_seqlens=pieces.cuts)
    seen, first, whole = pieces.decays(gv.to(zero.dtype), read_before)
    last = ends[-1:] if pieces.packed else ends
    arrived = carry(pieces.shard.parallel, whole.unsqueeze(2), last, True)
    rows = q.repeat_interleave(v.shape[2] // q.shape[2], 2).to(zero.dtype)
    read = scale * torch.einsum("bthk,bhkv->bthv", rows, arrived) * seen
    head = ends[: len(zero)] + first.unsqueeze(2) * arrived
    return o + read.to(o.dtype), torch.cat([head, ends[len(zero) :]])


def scan(
    run: Run, op: str, parallel: SequenceParallel, x: Tensor, g: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The vector scan `run(x, g, initial_state, cu_seqlens)` over all ranks: h, and the last h of
    every sequence.
    """
    pieces = Pieces.of(op, parallel, x, cu_seqlens)
    wide = compute_dtype(x.dtype)
    shape = (1 if pieces.packed else len(x), *x.shape[2:])
    zero = torch.zeros(shape, dtype=wide, device=x.device)
    with using(None):
        state = tie(pieces.starts(initial_state, zero), x, g, initial_state)
        h, ends = run(x, g, state, pieces.cuts)
    seen, first, whole = pieces.decays(g.to(wide))
    arrived = carry(parallel, whole, ends[-1:] if pieces.packed else ends, True)
    head = ends[: len(zero)] + first * arrived
    ends = torch.cat([head, ends[len(zero) :]])
    finals = pieces.finals(ends, initial_state, zero[:1])
    return h + (seen * arrived.unsqueeze(1)).to(h.dtype), finals


def tokens_before(
    op: str, parallel: SequenceParallel, x: Tensor, cu_seqlens: Tensor | None, n: int,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The n tokens before every piece of x `[B, T, ...]`, `[pieces or B, n, ...]`, `first` `[N,
    ...]` (zeros where absent) before the start of a sequence; and the boundaries of the pieces.
    """
    pieces = Pieces.of(op, parallel, x, cu_seqlens)
    found = halo(pieces.shard, x, n)
    if pieces.packed and pieces.own.numbers and pieces.continued:
        reach = pieces.shard.begin - pieces.bounds[pieces.own.numbers[0]]
        keep = torch.arange(n, device=x.device) >= n - reach
        found = found * keep.view(1, -1, *[1] * (x.dim() - 2))
    start = None if first is None else first.to(x.dtype).unsqueeze(1)
    if start is None and pieces.packed:
        start = found.new_zeros(len(pieces.bounds) - 1, *found.shape[1:])
    return tie(pieces.starts(start, found), found), pieces.cuts


def lasts(
    op: str, parallel: SequenceParallel, x: Tensor, first: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """The last token of every sequence, `first` of one without any, on every rank."""
    pieces = Pieces.of(op, parallel, x, cu_seqlens)
    zero = x.new_zeros(1 if pieces.packed else len(x), *x.shape[2:])
    if pieces.packed:
        ends = [x[0, cut - 1] if cut else zero[0] for cut in pieces.own.cuts[1:]]
        return pieces.finals(tie(torch.stack(ends), x, first), first, zero)
    lengths = parallel.lengths or ()
    holds = max((p for p, length in enumerate(lengths) if length), default=-1)
    if holds < 0:
        return first
    return total(parallel, x[:, -1] if holds == pieces.shard.rank else zero, x)


MERGE: dict[str, Any] = {
    "sum": (0.0, lambda x: x.sum(0), torch.add),
    "logsumexp": (-torch.inf, lambda x: x.logsumexp(0), torch.logaddexp),
    "max": (-torch.inf, lambda x: x.amax(0), torch.maximum),
}


def running(kind: str, pieces: Pieces, x: Tensor) -> Tensor:
    """Running values `[B, T, ...]` within the pieces, of which the first goes on with what its
    sequence came to on the ranks before.
    """
    neutral, merge, join = MERGE[kind]
    shard, rank = pieces.shard, pieces.shard.rank
    last = x[:, -1] if x.shape[1] else x.new_full((len(x), *x.shape[2:]), neutral)
    every = gather(shard.parallel, tie(last, x))
    ranks = []
    for p in reversed(range(rank if pieces.continued else 0)):
        there = shard.own(pieces.bounds, p)
        if shard.ends[p] < shard.ends[p + 1]:
            ranks.append(p)
        if pieces.packed and (len(there.numbers) > 1 or not there.continued):
            break
    if not ranks:
        return tie(x, every)
    end = pieces.own.cuts[1] if pieces.packed else x.shape[1]
    head = join(x[:, :end], merge(every[ranks]).unsqueeze(1))
    return torch.cat([head, x[:, end:]], 1)


def selective(
    run: Run, op: str, parallel: SequenceParallel, x: Tensor, dt: Tensor, A: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The selective scan `run(initial_state, cu_seqlens)` over all ranks: once for what the tokens
    add to a state, and once more from the state that arrives.
    """
    pieces = Pieces.of(op, parallel, x, cu_seqlens)
    wide = compute_dtype(x.dtype)
    shape = (1 if pieces.packed else len(x), *A.shape)
    zero = torch.zeros(shape, dtype=wide, device=x.device)
    with using(None):
        _, ends = run(tie(pieces.starts(initial_state, zero), x, dt, A, initial_state), pieces.cuts)
        alone = not pieces.packed or len(pieces.own.numbers) <= 1
        through = (A.to(wide) * dt.to(wide).sum(1).unsqueeze(-1)).exp()
        whole = through * (pieces.continued and alone)
        arrived = carry(parallel, whole, ends[-1:] if pieces.packed else ends, True)
        y, ends = run(tie(pieces.starts(initial_state, arrived), arrived), pieces.cuts)
    return y, pieces.finals(ends, initial_state, zero[:1])
