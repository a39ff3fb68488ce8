# SPDX-License-Identifier: MIT
"""The one recurrence on a sequence that lies on several ranks.

A recurrence is linear in the state it starts from. Every rank computes what its tokens do to a
state that arrives, `A`, and what they add, `S`; the state itself then goes through the ranks in
turn, one message of its size from each to the next, and each corrects its outputs. The gradient
goes the same way back.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fla.core.parallel import SequenceParallel, carry, tie, using
from fla.core.precision import compute_dtype
from fla.ops.engine.sharding import LocalSequences

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
    local = LocalSequences.of(op, parallel, v, cu_seqlens)
    wide = compute_dtype(q.dtype)
    shape = (1 if local.packed else v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    zero = torch.zeros(shape, dtype=wide, device=v.device)
    # a rank without tokens may get its state back as it is
    state = tie(local.starts(initial_state, zero), q, k, v, gv, initial_state, *gates.values())
    if gv is None:
        if gates["beta"] is not None and gates["beta"].dim() == 4:
            raise ValueError(
                f"{op}: inside sequence_parallel beta is one number a head; pass [B, T, HV], or "
                "call it outside"
            )
        o, ends = _rows(run, local, q, k, v, state, zero, gates)
    else:
        if any(x is not None for x in gates.values()):
            raise ValueError(
                f"{op}: inside sequence_parallel a decay of value channels comes alone; call it "
                "outside"
            )
        o, ends = _columns(run, local, q, k, v, gv, state, zero, scale, read_before)
    return o, local.finals(ends, initial_state, zero[:1]) if keep else None


def _rows(
    run: Run, local: LocalSequences, q: Tensor, k: Tensor, v: Tensor, state: Tensor, zero: Tensor,
    gates: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, and the last states of the local."""
    K = q.shape[3]
    unit = torch.eye(K, dtype=state.dtype, device=state.device).expand(*zero.shape[:3], K)
    none = torch.zeros_like(state[..., :1]).expand(*state.shape[:3], K)
    first = unit if local.continued else none[: len(unit)]
    start = torch.cat([torch.cat([first, none[len(unit) :]]), state], -1)
    values = torch.cat([v.new_zeros(*v.shape[:3], K), v], -1)
    with using(None):
        o, ends = run(q, k, values, **gates, initial_state=start, cu_seqlens=local.cuts)
    last = ends[-1:] if local.packed else ends
    arrived = carry(local.shard.parallel, last[..., :K], last[..., K:])
    o = o[..., K:] + torch.einsum("bthk,bhkv->bthv", o[..., :K].to(arrived), arrived).to(o.dtype)
    return o, ends[..., K:] + ends[..., :K] @ arrived


def _columns(
    run: Run, local: LocalSequences, q: Tensor, k: Tensor, v: Tensor, gv: Tensor, state: Tensor,
    zero: Tensor, scale: float, read_before: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same where value channels decay: what arrives is multiplied, channel by channel."""
    with using(None):
        o, ends = run(q, k, v, gv=gv, initial_state=state, cu_seqlens=local.cuts)
    seen, first, whole = local.decays(gv.to(zero.dtype), read_before)
    last = ends[-1:] if local.packed else ends
    arrived = carry(local.shard.parallel, whole.unsqueeze(2), last, True)
    rows = q.repeat_interleave(v.shape[2] // q.shape[2], 2).to(zero.dtype)
    read = scale * torch.einsum("bthk,bhkv->bthv", rows, arrived) * seen
    head = ends[: len(zero)] + first.unsqueeze(2) * arrived
    return o + read.to(o.dtype), torch.cat([head, ends[len(zero) :]])
