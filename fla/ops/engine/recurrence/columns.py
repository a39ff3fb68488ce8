# SPDX-License-Identifier: MIT
r"""Decay on the columns of the state: the chunk form without erase, and its gradient by hand.

    S_t = S_{t-1} diag(exp(g_t)) + k_t v_t^T        o_t = scale S_t^T q_t

so `o_i = scale (exp(G_i) (S_0^T q_i) + sum_{j <= i} (q_i . k_j) exp(G_i - G_j) v_j)`, channel by
channel of v. It is the dual of a decay on the rows: what that does to form its scores this does to
form its gradient, and the other way round, so both stand on `VectorDecay`.
"""

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import count_sequences
from fla.core.operator import Schema, empty_gradients, needs_gradient
from fla.core.precision import compute_dtype
from fla.ops.engine.recurrence.chunk import _by_token, _plan
from fla.ops.engine.recurrence.decay.vector import VectorDecay
from fla.ops.engine.recurrence.plan import Plan, Step, count_chunks
from fla.ops.engine.recurrence.terms import AFTER_WRITE, Switches, Terms
from fla.ops.engine.recurrence.workspace import Workspace


def chunk_columns(
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunk form for q, k `[B, T, H, K]`, v, gv `[B, T, H, V]`, where gv is the only gate;
    returns o `[B, T, H, V]` in q's dtype and the final state `[N, H, K, V]` in fp32 (fp64 for fp64
    inputs). Differentiable in every tensor.
    """
    inputs = (terms.q, terms.k, terms.v, terms.gv, initial_state)
    save = needs_gradient(*inputs)
    o, final, _ = operator.call(
        "chunk_columns", *inputs, cu_seqlens, float(switches.scale), switches.chunk_size, save
    )
    return o, final


class _Step:
    """The rows of one step: q, k `[R, P, K]`, v `[R, P, V]`, their decay, and `q k^T`."""

    def __init__(self, ws: Workspace, step: Step, q: Tensor, k: Tensor, v: Tensor, g: Tensor):
        n = 1 << (step.size - 1).bit_length()
        self.q, self.k, self.v = (
            ws.load(name, step.read(x), n) for name, x in (("q", q), ("k", k), ("v", v))
        )
        self.decay = VectorDecay(ws, ws.load("factors", step.read(g), n).exp_(), [AFTER_WRITE])
        self.weights = torch.bmm(self.q, self.k.mT, out=ws("weights", self.q.shape[0], n, n))

    def forward(self, S: Tensor) -> Tensor:
        decay = self.decay
        o = decay.spread_rows(self.weights, self.v)
        o.addcmul_(torch.bmm(self.q, S), decay.prefix)
        S.mul_(decay.prefix[:, -1:]).baddbmm_(self.k.mT, decay.leaving(self.v))
        return o

    def backward(self, do: Tensor, S: Tensor, Z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v and g; Z becomes the gradient of the first state in place."""
        decay = self.decay
        dweights = decay.scores(do, self.v)
        drows, dv, logs = decay.spread(self.weights, do, self.v)
        entering, leaving = decay.entering(do), decay.leaving(self.v)
        read, written = torch.bmm(self.q, S), torch.bmm(self.k, Z)
        prefix, suffix = decay.edge_gradients(entering, leaving, read, written, drows, dv)
        last = decay.prefix[:, -1]
        prefix[:, -1] += last * (S * Z).sum(1)
        dq = torch.bmm(entering, S.mT).baddbmm_(dweights, self.k)
        dk = torch.bmm(leaving, Z.mT).baddbmm_(dweights.mT, self.q)
        Z.mul_(last.unsqueeze(1)).baddbmm_(self.q.mT, entering)
        return dq, dk, dv, decay.log_gradient(prefix, suffix, logs)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, chunk_size: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the final state, and where `save` the first state of every chunk."""
    o, final, states = _empty(q, k, v, g, initial_state, cu_seqlens, scale, chunk_size, save)
    plan, ws = _plan(q, cu_seqlens, chunk_size), Workspace(final)
    states[plan.chunks :].zero_()
    final = _start(plan, final, initial_state)
    for step in plan.steps:
        if save:
            states[step.first : step.first + step.rows] = final[: step.rows]
        S = final[: step.rows].view(-1, *final.shape[2:])
        out = _Step(ws, step, q, k, v, g).forward(S)
        step.write(o, _by_token(out.mul_(scale), step))
    return o, plan.unsort(final), states


def _start(plan: Plan, out: Tensor, state: Tensor | None) -> Tensor:
    return out.zero_() if state is None else plan.sort(out.copy_(state))


def _empty(q, k, v, g, initial_state, cu_seqlens, scale, chunk_size, save):
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else q.shape[0]
    shape = (v.shape[2], q.shape[3], v.shape[3])
    final = q.new_empty(sequences, *shape, dtype=compute_dtype(q.dtype))
    chunks = count_chunks(q.shape[0], q.shape[1], sequences, chunk_size, packed)
    return q.new_empty(v.shape), final, final.new_empty((chunks, *shape) if save else (0,))


def _backward(
    do: Tensor, dfinal: Tensor | None, states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor,
    cu_seqlens: Tensor | None, scale: float, chunk_size: int, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, g and of the initial state."""
    grads = empty_gradients((q, k, v, g))
    dstate = states.new_empty(count_sequences(q, cu_seqlens), *states.shape[1:])
    plan, ws = _plan(q, cu_seqlens, chunk_size), Workspace(dstate)
    dstate = _start(plan, dstate, dfinal)
    with torch.autocast(q.device.type, enabled=False):
        for step in reversed(plan.steps):
            rows = _Step(ws, step, q, k, v, g)
            results = rows.backward(
                ws.load("do", step.read(do), rows.q.shape[1]).mul_(scale),
                states[step.first : step.first + step.rows].flatten(0, 1),
                dstate[: step.rows].view(-1, *dstate.shape[2:]),
            )
            for out, grad in zip(grads, results, strict=True):
                step.write(out, _by_token(grad, step))
    return *grads, plan.unsort(dstate)


operator.define(
    "chunk_columns",
    Schema(
        "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state",
        "Tensor? cu_seqlens, float scale, int chunk_size, bool save",
        returns=3,
        saved=(2,),
    ),
    forward=_forward,
    fake=_empty,
    backward=_backward,
)
