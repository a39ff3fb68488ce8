# SPDX-License-Identifier: MIT
r"""The vector scan: the recurrence of K = V = 1, channel by channel.

    h_t = exp(g_t) h_{t-1} + x_t

The chunks of all sequences march through their tokens together, each from a state of zero; then the
states are passed from chunk to chunk, and reach each token times the decay since its chunk began.
That is `C + T / C` steps for T tokens in chunks of C, and no quotient or difference of decays.

Backward, with dh the gradient of h: `l_t = dh_t + exp(g_{t+1}) l_{t+1}`, the same scan from the
end; `dx_t = l_t`, `dg_t = l_t exp(g_t) h_{t-1}`.
"""

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import boundaries_to_list, count_sequences
from fla.core.operator import Schema, empty_gradients
from fla.core.precision import compute_dtype
from fla.ops.engine.recurrence.plan import Plan, count_chunks, make_plan
from fla.ops.engine.recurrence.terms import CHUNK_SIZE


def scan(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """x, g `[B, T, ...]`; returns h `[B, T, ...]` in x's dtype and the last h of every sequence
    `[N, ...]` in fp32 (fp64 for fp64 inputs). Differentiable in every tensor.
    """
    h, final, _ = operator.call("scan", x, g, initial_state, cu_seqlens, chunk_size)
    return h, final


def _make_plan(x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Plan:
    batch, length = x.shape[:2]
    bounds = None if cu_seqlens is None else boundaries_to_list(cu_seqlens, length, "scan")
    return make_plan(batch, length, bounds, chunk_size, x.device)


def _chunks(plan: Plan, x: Tensor, like: Tensor) -> Tensor:
    """x `[B, T, ...]` as `[chunks, C, ...]`, zero behind the tokens of a chunk."""
    width = max((step.size for step in plan.steps), default=0)
    out = like.new_zeros(plan.chunks, width, *x.shape[2:])
    for step in plan.steps:
        out[step.first : step.first + step.rows, : step.size] = step.read(x)
    return out


def _forward(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the final state, and the first state of every chunk."""
    out, final, states = _empty(x, g, initial_state, cu_seqlens, chunk_size)
    plan = _make_plan(x, cu_seqlens, chunk_size)
    states[plan.chunks :].zero_()
    final = final.zero_() if initial_state is None else plan.sort(final.copy_(initial_state))
    h, decay = _chunks(plan, x, final), _chunks(plan, g, final).exp_()
    for t in range(1, h.shape[1]):
        h[:, t].addcmul_(decay[:, t], h[:, t - 1])
        decay[:, t] *= decay[:, t - 1]
    for step in plan.steps:
        chunks = slice(step.first, step.first + step.rows)
        state = final[: step.rows]
        states[chunks] = state
        h[chunks].addcmul_(decay[chunks], state.unsqueeze(1))
        state.copy_(h[chunks, -1])
        step.write(out, h[chunks, : step.size])
    return out, plan.unsort(final), states


def _empty(x, g, initial_state, cu_seqlens, chunk_size):
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else x.shape[0]
    final = x.new_empty(sequences, *x.shape[2:], dtype=compute_dtype(x.dtype))
    chunks = count_chunks(x.shape[0], x.shape[1], sequences, chunk_size, packed)
    return x.new_empty(x.shape), final, final.new_empty(chunks, *x.shape[2:])


def _backward(
    dh: Tensor, dfinal: Tensor | None, states: Tensor, x: Tensor, g: Tensor,
    cu_seqlens: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, g and of the initial state."""
    dx, dg = empty_gradients((x, g))
    dstate = states.new_empty(count_sequences(x, cu_seqlens), *x.shape[2:])
    plan = _make_plan(g, cu_seqlens, chunk_size)
    dstate = dstate.zero_() if dfinal is None else plan.sort(dstate.copy_(dfinal))
    h, decay = _chunks(plan, x, dstate), _chunks(plan, g, dstate).exp_()
    for t in range(h.shape[1]):  # the states again, from each chunk's first
        h[:, t].addcmul_(decay[:, t], h[:, t - 1] if t else states[: plan.chunks])
    adjoint, leave = _chunks(plan, dh, dstate), decay.clone()
    for t in reversed(range(adjoint.shape[1] - 1)):
        adjoint[:, t].addcmul_(decay[:, t + 1], adjoint[:, t + 1])
        leave[:, t] *= leave[:, t + 1]
    for step in reversed(plan.steps):
        chunks = slice(step.first, step.first + step.rows)
        carry, now = dstate[: step.rows], adjoint[chunks]
        now[:, :-1].addcmul_(leave[chunks, 1:], carry.unsqueeze(1))
        now[:, -1] += carry
        torch.mul(now[:, 0], decay[chunks, 0], out=carry)
        step.write(dx, now[:, : step.size])
        before = torch.cat([states[chunks].unsqueeze(1), h[chunks, :-1]], 1)
        step.write(dg, before.mul_(decay[chunks]).mul_(now)[:, : step.size])
    return dx, dg, plan.unsort(dstate)


operator.define(
    "scan",
    Schema(
        "Tensor x, Tensor g, Tensor? initial_state",
        "Tensor? cu_seqlens, int chunk_size",
        returns=3,
        saved=(2,),
    ),
    forward=_forward,
    fake=_empty,
    backward=_backward,
)
