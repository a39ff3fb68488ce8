# SPDX-License-Identifier: MIT
"""Scans, running sums and shifts by a token on a sequence that lies on several ranks; see
`recurrence/sharded.py` for how a state goes through them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fla.core.parallel import SequenceParallel, carry, gather, halo, tie, total, using
from fla.core.precision import compute_dtype
from fla.ops.engine.sharding import LocalSequences

Run = Callable[..., tuple[Tensor, Tensor]]


def scan(
    run: Run, op: str, parallel: SequenceParallel, x: Tensor, g: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The vector scan `run(x, g, initial_state, cu_seqlens)` over all ranks: h, and the last h of
    every sequence.
    """
    local = LocalSequences.of(op, parallel, x, cu_seqlens)
    wide = compute_dtype(x.dtype)
    shape = (1 if local.packed else len(x), *x.shape[2:])
    zero = torch.zeros(shape, dtype=wide, device=x.device)
    with using(None):
        state = tie(local.starts(initial_state, zero), x, g, initial_state)
        h, ends = run(x, g, state, local.cuts)
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
    """The n tokens before every piece of x `[B, T, ...]`, `[local or B, n, ...]`, `first` `[N,
    ...]` (zeros where absent) before the start of a sequence; and the boundaries of the local.
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


def lasts(
    op: str, parallel: SequenceParallel, x: Tensor, first: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """The last token of every sequence, `first` of one without any, on every rank."""
    local = LocalSequences.of(op, parallel, x, cu_seqlens)
    zero = x.new_zeros(1 if local.packed else len(x), *x.shape[2:])
    if local.packed:
        ends = [x[0, cut - 1] if cut else zero[0] for cut in local.own.cuts[1:]]
        return local.finals(tie(torch.stack(ends), x, first), first, zero)
    lengths = parallel.lengths or ()
    holds = max((p for p, length in enumerate(lengths) if length), default=-1)
    if holds < 0:
        return first
    return total(parallel, x[:, -1] if holds == local.shard.rank else zero, x)


MERGE: dict[str, Any] = {
    "sum": (0.0, lambda x: x.sum(0), torch.add),
    "logsumexp": (-torch.inf, lambda x: x.logsumexp(0), torch.logaddexp),
    "max": (-torch.inf, lambda x: x.amax(0), torch.maximum),
}


def running(kind: str, local: LocalSequences, x: Tensor) -> Tensor:
    """Running values `[B, T, ...]` within the local, of which the first goes on with what its
    sequence came to on the ranks before.
    """
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
    run: Run, op: str, parallel: SequenceParallel, x: Tensor, dt: Tensor, A: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The selective scan `run(initial_state, cu_seqlens)` over all ranks: once for what the tokens
    add to a state, and once more from the state that arrives.
    """
    local = LocalSequences.of(op, parallel, x, cu_seqlens)
    wide = compute_dtype(x.dtype)
    shape = (1 if local.packed else len(x), *A.shape)
    zero = torch.zeros(shape, dtype=wide, device=x.device)
    with using(None):
        _, ends = run(tie(local.starts(initial_state, zero), x, dt, A, initial_state), local.cuts)
        alone = not local.packed or len(local.own.numbers) <= 1
        through = (A.to(wide) * dt.to(wide).sum(1).unsqueeze(-1)).exp()
        whole = through * (local.continued and alone)
        arrived = carry(parallel, whole, ends[-1:] if local.packed else ends, True)
        y, ends = run(tie(local.starts(initial_state, arrived), arrived), local.cuts)
    return y, local.finals(ends, initial_state, zero[:1])
