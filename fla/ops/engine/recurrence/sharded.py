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

from fla.core.parallel import SequenceParallel, tie, using
from fla.core.precision import compute_dtype
from fla.ops.engine.recurrence.terms import Switches, Terms
from fla.ops.engine.sharding import LocalSequences, carry

Form = Callable[..., tuple[Tensor, Tensor]]  # takes terms, switches, first state and boundaries


def recurrence(
    op: str,
    parallel: SequenceParallel,
    form: Form,
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A form of the engine over all ranks; states `[N, HV, K, V]`. Without a decay of value
    channels, A comes out of the same call as S: on value channels `[0, v]` from the state `[1, S]`.
    """
    q, v = terms.q, terms.v
    local = LocalSequences.of(op, parallel, v, cu_seqlens)
    wide = compute_dtype(q.dtype)
    shape = terms.state_shape(1 if local.packed else v.shape[0])
    zero = torch.zeros(shape, dtype=wide, device=v.device)
    # a rank without tokens may get its state back as it is
    state = tie(local.starts(initial_state, zero), *terms, initial_state)
    if terms.gv is None:
        if terms.beta is not None and terms.beta.dim() == 4:
            raise ValueError(
                f"{op}: inside sequence_parallel beta is one number per head; pass [B, T, HV], or "
                "call it outside"
            )
        o, ends = _rows(form, local, terms, switches, state, zero)
    else:
        if any(x is not None for x in terms._replace(gv=None)[3:]):
            raise ValueError(
                f"{op}: inside sequence_parallel a decay of value channels comes alone; call it "
                "outside"
            )
        o, ends = _columns(form, local, terms, switches, state, zero)
    return o, local.finals(ends, initial_state, zero[:1]) if switches.keep_final else None


def _rows(
    form: Form, local: LocalSequences, terms: Terms, switches: Switches, state: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """o, and the last states of this rank's parts of sequences."""
    K, v = terms.q.shape[3], terms.v
    unit = torch.eye(K, dtype=state.dtype, device=state.device).expand(*zero.shape[:3], K)
    none = torch.zeros_like(state[..., :1]).expand(*state.shape[:3], K)
    first = unit if local.continued else none[: len(unit)]
    start = torch.cat([torch.cat([first, none[len(unit) :]]), state], -1)
    values = torch.cat([v.new_zeros(*v.shape[:3], K), v], -1)
    with using(None):
        o, ends = form(terms._replace(v=values), switches, start, local.cuts)
    last = ends[-1:] if local.packed else ends
    arrived = carry(local.shard.parallel, last[..., :K], last[..., K:])
    o = o[..., K:] + torch.einsum("bthk,bhkv->bthv", o[..., :K].to(arrived), arrived).to(o.dtype)
    return o, ends[..., K:] + ends[..., :K] @ arrived


def _columns(
    form: Form, local: LocalSequences, terms: Terms, switches: Switches, state: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """The same where value channels decay: what arrives is multiplied, channel by channel."""
    q, gv = terms.q, terms.gv
    assert gv is not None
    with using(None):
        o, ends = form(terms, switches, state, local.cuts)
    seen, first, whole = local.decays(gv.to(zero.dtype), switches.read_before)
    last = ends[-1:] if local.packed else ends
    arrived = carry(local.shard.parallel, whole.unsqueeze(2), last, True)
    rows = q.repeat_interleave(terms.v.shape[2] // q.shape[2], 2).to(zero.dtype)
    read = switches.scale * torch.einsum("bthk,bhkv->bthv", rows, arrived) * seen
    head = ends[: len(zero)] + first.unsqueeze(2) * arrived
    return o + read.to(o.dtype), torch.cat([head, ends[len(zero) :]])
