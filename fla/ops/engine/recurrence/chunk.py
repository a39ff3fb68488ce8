# SPDX-License-Identifier: MIT
r"""The chunk form, fast, in plain torch: decay none, scalar or vector; erase none, delta, low rank.

Chunks of all heads and sequences march together (`plan.py`) through one workspace of a few
megabytes that stays in cache; nothing of the size of the sequence is stored but the first state,
the solution and the inverse of every chunk. `step.py` is the algebra of one chunk, `decay/` what
its decay does. Keys and queries are normalised where they are loaded. The same code serves every
device; dtypes below fp32 are computed in fp32.

Rows: R = sequences still running x HV. Every product is a batch of R matrices.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import boundaries_to_list, count_sequences
from fla.core.operator import empty_gradients, needs_gradient
from fla.core.precision import compute_dtype
from fla.ops.engine.recurrence.decay.scalar import ScalarDecay
from fla.ops.engine.recurrence.decay.vector import VectorDecay
from fla.ops.engine.recurrence.equation import LOG_ZERO
from fla.ops.engine.recurrence.operators import CHUNK_TERMS, chunk_schema
from fla.ops.engine.recurrence.plan import Plan, Step, count_chunks, make_plan
from fla.ops.engine.recurrence.step import ChunkRows, backward, forward
from fla.ops.engine.recurrence.terms import (
    AFTER_DECAY,
    AFTER_WRITE,
    BEFORE_DECAY,
    DELTA,
    L2_EPS,
    LOW_RANK,
    NONE,
    Switches,
    Terms,
)
from fla.ops.engine.recurrence.workspace import Workspace


def chunk(
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunk form of `S <- diag(exp(g)) S + a (b^T S) + k v^T`, `o = scale S^T q`.

    Returns o `[B, T, HV, V]` in q's dtype and the final state `[N, HV, K, V]` in fp32 (fp64 for
    fp64 inputs). Differentiable in every tensor.

    With beta `[B, T, HV]` the erase is a delta: `k beta (v - b^T S)^T` is written, where b defaults
    to `exp(g) k`. With a and b it is the low-rank term as it stands. Value channels do not decay
    here; `columns.py` has that form.
    """
    inputs = (*terms.named(CHUNK_TERMS), initial_state)
    save = needs_gradient(*inputs)
    o, final, *_ = operator.call(
        "chunk", *inputs, cu_seqlens, float(switches.scale), switches.chunk_size, switches.l2norm,
        switches.read_before, save,
    )  # fmt: skip
    return o, final


@dataclass(slots=True)
class _Call:
    """The inputs of one call, and how a step of its plan loads them.

    Fields:
        norms: inverse norms `[B, T, H, 1]` of q and k, or None.
    """

    q: Tensor
    k: Tensor
    g: Tensor | None
    beta: Tensor | None
    a: Tensor | None
    b: Tensor | None
    groups: int
    reads: list[str]
    norms: tuple[Tensor | None, Tensor | None]
    ws: Workspace
    like: Tensor

    @classmethod
    def of(
        cls, ws: Workspace, like: Tensor, tensors: list, groups: int, l2norm: bool, before: bool
    ) -> "_Call":
        q, k, g, beta, a, b = tensors
        reads = [BEFORE_DECAY if before else AFTER_WRITE]
        if beta is not None or a is not None:
            reads.append(AFTER_DECAY if b is None else BEFORE_DECAY)
        if g is not None and g.dim() == 3:
            # in fp64 cumulative decays of -1e4 do not swallow the small ones beside them
            g = g.to(torch.float64).clamp(min=LOG_ZERO)
        norms = _inverse_norms(q, k, l2norm)
        return cls(q, k, g, beta, a, b, groups, reads, norms, ws, like)

    @property
    def erase(self) -> str:
        return LOW_RANK if self.a is not None else NONE if self.beta is None else DELTA

    @property
    def vector(self) -> bool:
        return self.g is not None and self.g.dim() == 4

    def size(self, step: Step) -> int:
        """The rows a step's chunk takes: its tokens, or for vector decay the next power of two."""
        return 1 << (step.size - 1).bit_length() if self.vector else step.size

    def decay(self, step: Step) -> ScalarDecay | VectorDecay:
        if self.g is not None and self.g.dim() == 4:
            factors = self.ws.load("factors", step.read(self.g), self.size(step))
            return VectorDecay(self.ws, factors.exp_(), self.reads)
        G = None if self.g is None else step.read(self.g).mT.cumsum(-1).flatten(0, 1)
        return ScalarDecay(self.ws, G, self.reads, self.like, step.size)

    def rows(self, step: Step) -> ChunkRows:
        """The rows of one step. Where the erase key is the key, `right` is a view of `left`."""
        n, heads = self.size(step), self.q.shape[2] * self.groups
        left = self.ws("left", step.rows, heads, len(self.reads) * n, self.q.shape[3])
        self._load(left[:, :, :n], step, self.q, self.norms[0])
        shared = len(self.reads) == 2 and self.b is None
        if shared:
            self._load(left[:, :, n:], step, self.k, self.norms[1])
            right = left[:, :, n:]
        else:
            r = 1 if self.a is None else 2
            right = self.ws("right", step.rows, heads, r * n, self.k.shape[3])
            self._load(right[:, :, :n], step, self.k, self.norms[1])
            if self.b is not None:
                self._load(left[:, :, n:], step, self.b, None)
            if self.a is not None:
                self._load(right[:, :, n:], step, self.a, None)
        beta = None
        if self.beta is not None and self.erase == DELTA:
            beta = self.ws.load("beta", step.read(self.beta).unsqueeze(-1), n)
        return ChunkRows(self.erase, left.flatten(0, 1), right.flatten(0, 1), beta)

    def _load(self, out: Tensor, step: Step, x: Tensor, norm: Tensor | None) -> None:
        """A step's rows of x into out `[rows, HV, n, K]`, times the inverse norms if any."""
        heads = x.shape[2]
        out = out.unflatten(1, (heads, -1))
        tokens = step.read(x).transpose(1, 2).unsqueeze(2)
        real = out[:, :, :, : step.size]
        if norm is None:
            real.copy_(tokens)
        else:
            norm = step.read(norm).transpose(1, 2).unsqueeze(2)
            torch.mul(tokens.to(out.dtype).expand_as(real), norm, out=real)
        out[:, :, :, step.size :].zero_()

    def gradient(
        self, step: Step, rows: Tensor, grad: Tensor, x: Tensor, norm: Tensor | None
    ) -> Tensor:
        """`[R, n, K]` to `[rows, C, heads of x, K]`: summed over groups, and taken back through the
        norm; `rows` are what was loaded.
        """
        heads = x.shape[2]
        shape = (step.rows, heads, -1, *grad.shape[1:])
        grad = grad.view(shape)[:, :, :, : step.size]
        grad = grad.sum(2) if grad.shape[2] > 1 else grad[:, :, 0]
        if norm is not None:
            unit = rows.view(shape)[:, :, 0, : step.size]
            inverse = step.read(norm).transpose(1, 2)
            grad = (grad - unit * (unit * grad).sum(-1, keepdim=True)) * inverse
        return grad.transpose(1, 2)


def _inverse_norms(q: Tensor, k: Tensor, l2norm: bool) -> tuple[Tensor | None, Tensor | None]:
    """`1 / sqrt(sum(x^2) + eps)` of q and k, `[B, T, H, 1]`; None without l2norm."""
    if not l2norm:
        return None, None
    dtype = compute_dtype(q.dtype)

    def inverse(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        return norm.square_().add_(L2_EPS).rsqrt_()

    return inverse(q), inverse(k)


def _plan(q: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Plan:
    batch, length = q.shape[:2]
    bounds = None if cu_seqlens is None else boundaries_to_list(cu_seqlens, length, "chunk")
    return make_plan(batch, length, bounds, chunk_size, q.device)


def _by_token(x: Tensor, step: Step) -> Tensor:
    """`[R, n, D]` to `[rows, C, HV, D]`, without the rows behind the C tokens."""
    return x.unflatten(0, (step.rows, -1))[:, :, : step.size].transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, a: Tensor | None,
    b: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    chunk_size: int, l2norm: bool, read_before: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """o, the final state, and where `save`: the first state, solution and inverse of every
    chunk.
    """
    o, final, *saved = _empty_outputs(
        q, k, v, g, beta, a, b, initial_state, cu_seqlens,
        scale, chunk_size, l2norm, read_before, save,
    )  # fmt: skip
    plan, ws = _plan(q, cu_seqlens, chunk_size), Workspace(final)
    for x in saved:  # the bound on their rows may exceed the chunks there are
        x[plan.chunks :].zero_()
    final = final.zero_() if initial_state is None else plan.sort(final.copy_(initial_state))
    groups = v.shape[2] // q.shape[2]
    call = _Call.of(ws, final, [q, k, g, beta, a, b], groups, l2norm, read_before)
    for step in plan.steps:
        S = final[: step.rows].view(-1, *final.shape[2:])
        if save:
            saved[0][step.first : step.first + step.rows] = final[: step.rows]
        rows = call.rows(step)
        values = ws.load("values", step.read(v), rows.right.shape[1])
        out, solution, inverse = forward(ws, call.decay(step), rows, values, S)
        if save and solution is not None and inverse is not None:
            _store(saved[1:], [solution, inverse], step)
        step.write(o, _by_token(out.mul_(scale), step))
    return o, plan.unsort(final), *saved


def _store(saved: list[Tensor], solved: list[Tensor], step: Step) -> None:
    """The solution and the inverse of one step, zeros behind its tokens."""
    n = step.size
    for out, x in zip(saved, solved, strict=True):
        out = out[step.first : step.first + step.rows]
        x = x.unflatten(0, (step.rows, -1))[:, :, :n]
        if n < out.shape[2]:
            out.zero_()
        width = min(x.shape[3], out.shape[3])  # an inverse may be padded to a power of two
        out[:, :, :n, :width] = x[..., :width]


def _empty_outputs(
    q, k, v, g, beta, a, b, initial_state, cu_seqlens, scale, chunk_size, l2norm, before, save
):
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else q.shape[0]
    dtype = compute_dtype(q.dtype)
    o = q.new_empty(v.shape)
    final = q.new_empty(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    chunks = count_chunks(q.shape[0], q.shape[1], sequences, chunk_size, packed)
    size = chunk_size if beta is not None or a is not None else 0
    shapes = [final.shape[1:], (v.shape[2], size, v.shape[3]), (v.shape[2], size, size)]
    return o, final, *(final.new_empty((chunks, *s) if save else (0,)) for s in shapes)


def _backward(
    do: Tensor, dfinal: Tensor | None, states: Tensor, solutions: Tensor, inverses: Tensor,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, a: Tensor | None,
    b: Tensor | None, cu_seqlens: Tensor | None, scale: float, chunk_size: int, l2norm: bool,
    read_before: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, g, beta, a, b (empty if absent) and of the initial state."""
    grads = empty_gradients((q, k, v, g, beta, a, b))
    dstate = states.new_empty(count_sequences(q, cu_seqlens), *states.shape[1:])
    plan, ws = _plan(q, cu_seqlens, chunk_size), Workspace(dstate)
    dstate = dstate.zero_() if dfinal is None else plan.sort(dstate.copy_(dfinal))
    groups = v.shape[2] // q.shape[2]
    call = _Call.of(ws, dstate, [q, k, g, beta, a, b], groups, l2norm, read_before)
    # the caller's autocast is not for this arithmetic
    with torch.autocast(q.device.type, enabled=False):
        for step in reversed(plan.steps):
            first = slice(step.first, step.first + step.rows)
            values, inverse = _solved(call, step, v, solutions[first], inverses[first])
            rows = call.rows(step)
            results = backward(
                ws,
                call.decay(step),
                rows,
                ws.load("do", step.read(do), call.size(step)).mul_(scale),
                states[first].flatten(0, 1),
                dstate[: step.rows].view(-1, *dstate.shape[2:]),
                values,
                inverse,
            )
            _write_gradients(call, step, rows, grads, *results)
    if g is not None and g.dim() == 3:
        # a decay that was clamped is a factor of exactly zero, and so is its gradient
        grads[3].masked_fill_(g <= LOG_ZERO, 0)
    return *grads, plan.unsort(dstate)


def _solved(
    call: _Call, step: Step, v: Tensor, solutions: Tensor, inverses: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The `values` and the inverse that `backward` takes."""
    n, size = step.size, call.size(step)
    if call.erase == NONE:
        return call.ws.load("values", step.read(v), size), None
    inverse = call.ws.load("inverse", inverses[:, :, :n, :n].transpose(1, 2), size)
    if n < size:
        inverse = torch.nn.functional.pad(inverse, (0, size - n))
    solution = solutions[:, :, :n].transpose(1, 2)
    if call.erase == DELTA:
        return call.ws.load("values", solution, size), inverse
    values = call.ws.load("values", step.read(v), 2 * size)
    values.unflatten(0, (step.rows, -1))[:, :, size : size + n].copy_(solution.transpose(1, 2))
    return values, inverse


def _write_gradients(
    call: _Call,
    step: Step,
    rows: ChunkRows,
    grads: list[Tensor],
    dleft: Tensor,
    dright: Tensor,
    dv: Tensor,
    dg: Tensor | None,
    dbeta: Tensor | None,
) -> None:
    """Gradients of one step's rows to those of the tensors they were loaded from."""
    n = call.size(step)
    dq, dk, dv_out, dg_out, dbeta_out, da, db = grads
    if call.b is None and len(call.reads) == 2:
        dright.add_(dleft[:, n:])
    pairs: list[tuple[Any, ...]] = [
        (dq, rows.left[:, :n], dleft[:, :n], call.q, call.norms[0]),
        (dk, rows.right[:, :n], dright[:, :n], call.k, call.norms[1]),
        (da, None, dright[:, n:], call.a, None),
        (db, None, dleft[:, n:], call.b, None),
    ]
    for out, loaded, grad, x, norm in pairs:
        if x is not None:
            step.write(out, call.gradient(step, loaded, grad, x, norm))
    step.write(dv_out, _by_token(dv, step))
    for out, grad in ((dg_out, dg), (dbeta_out, dbeta)):
        if grad is not None:
            step.write(out, _by_token(grad, step))


operator.define(
    "chunk",
    chunk_schema(
        CHUNK_TERMS,
        "float scale, int chunk_size, bool l2norm, bool read_before, bool save",
        saved=3,
    ),
    forward=_forward,
    fake=_empty_outputs,
    backward=_backward,
)
