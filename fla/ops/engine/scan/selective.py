# SPDX-License-Identifier: MIT
r"""The selective scan: vector decay and V = 1, a state of N numbers per channel.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t        y_t = S_t C_t        S in R^{D x N}

Chunk by chunk: the factors and writes of a chunk are formed at once, its tokens are stepped through
in place, and its outputs read at once. Only the first state of every chunk is kept; the backward
forms a chunk again and runs the adjoint `l_t = dy_t C_t + exp(dt_{t+1} A) l_{t+1}` from its end.
Nothing of size T D N is ever stored.
"""

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import boundaries_to_list, count_sequences
from fla.core.operator import Schema, empty_gradients
from fla.core.precision import compute_dtype
from fla.ops.engine.recurrence.plan import Plan, Step, count_chunks, make_plan
from fla.ops.engine.recurrence.terms import CHUNK_SIZE


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """x, dt `[B, T, D]`, A `[D, N]`, B, C `[B, T, N]`; returns y `[B, T, D]` in x's dtype and the
    final state `[sequences, D, N]` in fp32 (fp64 for fp64 inputs). Differentiable in every tensor.
    """
    y, final, _ = operator.call(
        "selective_scan", x, dt, A, B, C, initial_state, cu_seqlens, chunk_size
    )
    return y, final


def _make_plan(x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Plan:
    bounds = None
    if cu_seqlens is not None:
        bounds = boundaries_to_list(cu_seqlens, x.shape[1], "selective_scan")
    return make_plan(x.shape[0], x.shape[1], bounds, chunk_size, x.device)


class _Chunk:
    """One step's tokens in the dtype of the arithmetic, time first: `[C, rows, D]`, `[C, rows, N]`;
    the factors and, after `run`, the states `[C, rows, D, N]`.
    """

    def __init__(self, step: Step, dtype: torch.dtype, A: Tensor, *tensors: Tensor):
        rows = (step.read(t).transpose(0, 1).to(dtype) for t in tensors)
        self.x, self.dt, self.B, self.C = rows
        self.A = A.to(dtype)
        self.factors = (self.dt.unsqueeze(-1) * self.A).exp_()
        self.states = (self.dt * self.x).unsqueeze(-1) * self.B.unsqueeze(2)

    def run(self, S: Tensor) -> None:
        for state, factor in zip(self.states, self.factors, strict=True):
            S = state.addcmul_(factor, S)

    def read(self) -> Tensor:
        return torch.einsum("trdn,trn->trd", self.states, self.C)

    def backward(self, dy: Tensor, first: Tensor, Z: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Gradients: (x, dt, B, C), A, and the first state."""
        adjoint = dy.unsqueeze(-1) * self.C.unsqueeze(2)
        for t in reversed(range(adjoint.shape[0])):
            Z = (
                adjoint[t].add_(Z)
                if t == adjoint.shape[0] - 1
                else adjoint[t].addcmul_(self.factors[t + 1], adjoint[t + 1])
            )
        dC = torch.einsum("trdn,trd->trn", self.states, dy)
        before = torch.cat([first.unsqueeze(0), self.states[:-1]])
        dlog = before.mul_(self.factors).mul_(adjoint)
        written = torch.einsum("trdn,trn->trd", adjoint, self.B)
        dB = torch.einsum("trdn,trd->trn", adjoint, self.dt * self.x)
        ddt = torch.einsum("trdn,dn->trd", dlog, self.A) + written * self.x
        dA = torch.einsum("trdn,trd->dn", dlog, self.dt)
        return [written * self.dt, ddt, dB, dC], dA, adjoint[0] * self.factors[0]


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the first state of every chunk."""
    y, final, firsts = _empty(x, dt, A, B, C, initial_state, cu_seqlens, chunk_size)
    plan = _make_plan(x, cu_seqlens, chunk_size)
    firsts[plan.chunks :].zero_()
    final = final.zero_() if initial_state is None else plan.sort(final.copy_(initial_state))
    for step in plan.steps:
        S = final[: step.rows]
        firsts[step.first : step.first + step.rows] = S
        chunk = _Chunk(step, final.dtype, A, x, dt, B, C)
        chunk.run(S)
        S.copy_(chunk.states[-1])
        step.write(y, chunk.read().transpose(0, 1))
    return y, plan.unsort(final), firsts


def _empty(x, dt, A, B, C, initial_state, cu_seqlens, chunk_size):
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else x.shape[0]
    final = x.new_empty(sequences, *A.shape, dtype=compute_dtype(x.dtype))
    chunks = count_chunks(x.shape[0], x.shape[1], sequences, chunk_size, packed)
    return x.new_empty(x.shape), final, final.new_empty(chunks, *A.shape)


def _backward(
    dy: Tensor, dfinal: Tensor | None, firsts: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
    C: Tensor, cu_seqlens: Tensor | None, chunk_size: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C and of the initial state."""
    grads = empty_gradients((x, dt, A, B, C))
    dstate = firsts.new_empty(count_sequences(x, cu_seqlens), *firsts.shape[1:])
    plan = _make_plan(x, cu_seqlens, chunk_size)
    dstate = dstate.zero_() if dfinal is None else plan.sort(dstate.copy_(dfinal))
    dx, ddt, dA, dB, dC = grads
    total = torch.zeros_like(A, dtype=dstate.dtype)
    for step in reversed(plan.steps):
        rows = slice(step.first, step.first + step.rows)
        chunk = _Chunk(step, dstate.dtype, A, x, dt, B, C)
        chunk.run(firsts[rows])
        gradient = step.read(dy).transpose(0, 1).to(dstate.dtype)
        results, own, Z = chunk.backward(gradient, firsts[rows], dstate[: step.rows])
        dstate[: step.rows] = Z
        total += own
        for out, grad in zip((dx, ddt, dB, dC), results, strict=True):
            step.write(out, grad.transpose(0, 1))
    return dx, ddt, dA.copy_(total), dB, dC, plan.unsort(dstate)


operator.define(
    "selective_scan",
    Schema(
        "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_state",
        "Tensor? cu_seqlens, int chunk_size",
        returns=3,
        saved=(2,),
    ),
    forward=_forward,
    fake=_empty,
    backward=_backward,
)
