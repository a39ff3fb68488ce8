# SPDX-License-Identifier: MIT
"""Scans, running sums and shifts by a token on a sequence that lies on several ranks; see
`recurrence/sharded.py` for how a state goes through them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fla.core.parallel import SequenceParallel, tie, using
from fla.core.precision import compute_dtype
from fla.ops.engine.sharding import LocalSequences, carry, gather, halo, total

Form = Callable[..., tuple[Tensor, Tensor]]


def scan(
    op: str, parallel: SequenceParallel, form: Form, x: Tensor, g: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A form of the vector scan over all ranks: h, and the last h of every sequence."""
    local = LocalSequences.of(op, parallel, x, cu_seqlens)
    wide = compute_dtype(x.dtype)
    shape = (1 if local.packed else len(x), *x.shape[2:])
    zero = torch.zeros(shape, dtype=wide, device=x.device)
    with using(None):
        state = tie(local.starts(initial_state, zero), x, g, initial_state)
        h, ends = form(x, g, state, local.cuts, chunk_size)
    seen, first, whole = local.decays(g.to(wide))
    arrived = carry(parallel, whole, ends[-1:] if local.packed else ends, True)
    head = ends[: len(zero)] + first * arrived
    ends = torch.cat([head, ends[len(zero) :]])
    finals = local.finals(ends, initial_state, zero[:1])
    return h + (seen * arrived.unsqueeze(1)).to(h.dtype), finals


def tokens_before(
    op: str, parallel: SequenceParallel, x: Tensor, cu_seqlens: Tensor | None, n: int,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The n tokens before every part of a sequence on this rank, `[parts or B, n, ...]` of x
    `[B, T, ...]`, and the boundaries of the parts. Before the start of a sequence lies `first`
    `[N, ...]`, or zeros where it is absent.
    """
    local = LocalSequences.of(op, parallel, x, cu_seqlens)
    found = halo(local.shard, x, n)
    if local.packed and local.own.numbers and local.continued:
        reach = local.shard.begin - local.bounds[local.own.numbers[0]]
        keep = torch.arange(n, device=x.device) >= n - reach
        found = found * keep.view(1, -1, *[1] * (x.dim() - 2))
    start = None if first is None else first.to(x.dtype).unsqueeze(1)
    if start is None and local.packed:
        start = found.new_zeros(len(local.bounds) - 1, *found.shape[1:])
    return tie(local.starts(start, found), found), local.cuts


def starts(
    parallel: SequenceParallel, alone: Callable[..., Tensor], x: Tensor, first: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """`running.starts` over all ranks."""
    before, cuts = tokens_before("a shift of tokens", parallel, x, cu_seqlens, 1, first)
    with using(None):
        return tie(alone(x, before[:, 0], cuts), before)


def lasts(
    parallel: SequenceParallel, alone: Callable[..., Tensor], x: Tensor, first: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """The last token of every sequence, `first` of one without any, on every rank."""
    local = LocalSequences.of("the last tokens", parallel, x, cu_seqlens)
    zero = x.new_zeros(1 if local.packed else len(x), *x.shape[2:])
    if local.packed:
        ends = [x[0, cut - 1] if cut else zero[0] for cut in local.own.cuts[1:]]
        return local.finals(tie(torch.stack(ends), x, first), first, zero)
    lengths = parallel.lengths or ()
    holds = max((p for p, length in enumerate(lengths) if length), default=-1)
    if holds < 0:
        return first
    return total(parallel, x[:, -1] if holds == local.shard.rank else zero, x)


def repeat_rows(
    parallel: SequenceParallel, alone: Callable[..., Tensor], first: Tensor, length: int,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """`running.repeat_rows` for the tokens of this rank."""
    if cu_seqlens is not None:
        local = LocalSequences.of("a state per token", parallel, first, cu_seqlens, length)
        first, cu_seqlens = first[local.own.numbers or [0]], local.cuts
    return alone(first, length, cu_seqlens)


MERGE: dict[str, Any] = {
    "sum": (0.0, lambda x: x.sum(0), torch.add),
    "logsumexp": (-torch.inf, lambda x: x.logsumexp(0), torch.logaddexp),
    "max": (-torch.inf, lambda x: x.amax(0), torch.maximum),
}


def running(
    parallel: SequenceParallel, alone: Callable[..., Tensor], kind: str, x: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """Running values `[B, T, ...]` over all ranks: those of this rank's parts of sequences, of
    which the first continues what its sequence came to on the ranks before.
    """
    local = LocalSequences.of(f"a running {kind}", parallel, x, cu_seqlens)
    with using(None):
        x = alone(kind, x, local.cuts)
    neutral, merge, join = MERGE[kind]
    shard, rank = local.shard, local.shard.rank
    last = x[:, -1] if x.shape[1] else x.new_full((len(x), *x.shape[2:]), neutral)
    every = gather(shard.parallel, tie(last, x))
    ranks = []
    for p in reversed(range(rank if local.continued else 0)):
        there = shard.own(local.bounds, p)
        if shard.ends[p] < shard.ends[p + 1]:
            ranks.append(p)
        if local.packed and (len(there.numbers) > 1 or not there.continued):
            break
    if not ranks:
        return tie(x, every)
    end = local.own.cuts[1] if local.packed else x.shape[1]
    head = join(x[:, :end], merge(every[ranks]).unsqueeze(1))
    return torch.cat([head, x[:, end:]], 1)


def selective(
    op: str, parallel: SequenceParallel, form: Form, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
    C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A form of the selective scan over all ranks: once for what the tokens add to a state, and
    once more from the state that arrives.
    """
    local = LocalSequences.of(op, parallel, x, cu_seqlens)
    wide = compute_dtype(x.dtype)
    shape = (1 if local.packed else len(x), *A.shape)
    zero = torch.zeros(shape, dtype=wide, device=x.device)
    with using(None):
        start = tie(local.starts(initial_state, zero), x, dt, A, initial_state)
        _, ends = form(x, dt, A, B, C, start, local.cuts, chunk_size)
        alone = not local.packed or len(local.own.numbers) <= 1
        through = (A.to(wide) * dt.to(wide).sum(1).unsqueeze(-1)).exp()
        whole = through * (local.continued and alone)
        arrived = carry(parallel, whole, ends[-1:] if local.packed else ends, True)
        start = tie(local.starts(initial_state, arrived), arrived)
        y, ends = form(x, dt, A, B, C, start, local.cuts, chunk_size)
    return y, local.finals(ends, initial_state, zero[:1])
