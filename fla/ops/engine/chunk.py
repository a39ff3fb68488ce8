# SPDX-License-Identifier: MIT
r"""The chunk form, fast, in plain torch: decay none or scalar, erase none or delta.

Per chunk of C tokens, with S its first state and G the inclusive cumulative log decay:
`D_ij = exp(G_i - G_j)` for i >= j, `e_i = exp(G_i)`, `d_j = exp(G_C - G_j)`; `tril` and `strict`
are the lower triangle with and without its diagonal.

    P = tril(q k^T D)        B = strict(k k^T D)        as one product [q; k] k^T
    x = v - e k S            (I + B diag(beta)) y = x
    u = beta y               (without erase: u = v)
    o = scale (e q S + P u)
    S <- e_C S + (d k)^T u

Backward, by hand, from the last chunk to the first, with `do` times scale and the gradient Z of
the chunk's final state:

    m = P^T do + (d k) Z
    dv = dy = (I + B diag(beta))^{-T} (beta m)          dbeta = y . (m - B^T dy)
    X = [do; -dy]                                       [dP; dB] = X u^T D
    [dq; dk] += [dP; dB] k + (e X) S^T                  dk += [dP; dB]^T [q; k] + d (u Z^T)
    Z <- e_C Z + [q; k]^T (e X)                         dg: `_decay_gradient`

Chunks of all heads and sequences march together (`plan.py`) through one workspace of a few
megabytes that stays in cache; nothing of the size of the sequence is stored but S, y and the
inverse per chunk. Keys and queries are normalised where they are loaded. The same code serves every
device; dtypes below fp32 are computed in fp32.

Rows: R = sequences still running x HV. Every product below is a batch of R matrices.
"""

from math import prod

import torch
from torch import Tensor

from fla.ops.engine.layout import boundaries_to_list
from fla.ops.engine.plan import Plan, Step, count_chunks, make_plan
from fla.ops.engine.recurrence import LOG_ZERO

CHUNK_SIZE = 64
L2_EPS = 1e-6


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Chunk form of the recurrence with scalar decay g (or none) and delta erase beta (or none).

    q, k `[B, T, H, K]`, v `[B, T, HV, V]`, g and beta `[B, T, HV]`; returns o `[B, T, HV, V]` in
    q's dtype and the final state `[N, HV, K, V]` in fp32 (fp64 for fp64 inputs). Differentiable in
    every tensor. `l2norm` divides q and k by their norms first.
    """
    inputs = (q, k, v, g, beta, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final, *_ = torch.ops.fla.chunk(*inputs, cu_seqlens, float(scale), chunk_size, l2norm, save)
    return o, final


class _Workspace:
    """Named scratch buffers, allocated at the first and largest step and reused by all others."""

    def __init__(self, like: Tensor):
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size)
        return buffer[:size].view(shape)

    def constant(self, name: str, n: int) -> Tensor:
        """An `[n, n]` matrix, built once: `"eye"`; `"above"`, -inf above the diagonal, else 0;
        `"up to"`, 1 on and above the diagonal; `"below"`, 1 below it.
        """
        key = f"{name} {n}"
        if key not in self._buffers:
            ones = self._like.new_ones(n, n)
            build = {
                "eye": lambda: torch.eye(n, dtype=ones.dtype, device=ones.device),
                "above": lambda: (ones * -torch.inf).triu(1),
                "up to": ones.triu,
                "below": lambda: ones.tril(-1),
            }
            self._buffers[key] = build[name]()
        return self._buffers[key]

    def load(self, name: str, x: Tensor) -> Tensor:
        """`[rows, C, HV, D]` copied to `[R, C, D]`."""
        rows, size, heads, width = x.shape
        out = self(name, rows, heads, size, width).copy_(x.transpose(1, 2))
        return out.view(-1, size, width)


class _Inputs:
    """What one step reads: `qk` = [q; k] as `[R, 2C, K]`, times the inverse norms `[rows, H, C, 1]`
    if any.
    """

    def __init__(
        self,
        ws: _Workspace,
        step: Step,
        q: Tensor,
        k: Tensor,
        norms: tuple[Tensor | None, ...],
        groups: int,
    ):
        n, (heads, width) = step.size, q.shape[2:]
        rows = ws("qk", step.rows, heads, groups, 2 * n, width)
        self.norms: list[Tensor | None] = []
        halves = (rows[..., :n, :], rows[..., n:, :])
        for x, norm, half in zip((q, k), norms, halves, strict=True):
            x = step.read(x).transpose(1, 2).unsqueeze(2)
            if norm is None:
                half.copy_(x)
            else:
                norm = step.read(norm).transpose(1, 2)
                torch.mul(x.to(half.dtype).expand_as(half), norm.unsqueeze(2), out=half)
            self.norms.append(norm)
        self.by_head = rows
        self.qk = rows.view(-1, 2 * n, width)
        self.keys = self.qk[:, n:]

    def gradient(self, half: int, grad: Tensor) -> Tensor:
        """`[R, C, D]` to `[rows, C, H, D]`: summed over groups, and taken back through the norm."""
        rows, heads, groups, n2, width = self.by_head.shape
        n = n2 // 2
        grad = grad.view(rows, heads, groups, n, width)
        grad = grad.sum(2) if groups > 1 else grad[:, :, 0]
        norm = self.norms[half]
        if norm is not None:
            unit = self.by_head[:, :, 0, half * n : (half + 1) * n]
            grad = (grad - unit * (unit * grad).sum(-1, keepdim=True)) * norm
        return grad.transpose(1, 2)


class _Decay:
    """The decay factors of one step; everything but `pair` is None without decay.

    Fields:
        pair: D, and where erase needs it strict D below it, `[R, C or 2C, C]`.
        enter: e for the rows of q, and of k where erase needs it, `[R, C or 2C, 1]`.
        leave, last: d `[R, C, 1]` and e_C `[R, 1, 1]`.
    """

    def __init__(self, ws: _Workspace, step: Step, g: Tensor | None, erase: bool, like: Tensor):
        n, dtype = step.size, like.dtype
        self.enter = self.leave = self.last = None
        if g is None:
            lower = torch.ones(n, n, dtype=dtype, device=like.device).tril_()
            self.pair = torch.cat([lower, lower.tril(-1)]) if erase else lower
            return
        G = step.read(g).mT.cumsum(-1).flatten(0, 1)  # fp64, kept as high + low
        high = G.to(dtype)
        low = (G - high).to(dtype)
        self.pair = ws("pair", G.shape[0], 2 * n if erase else n, n)
        lower = self.pair[:, :n]
        torch.sub(high[:, :, None], high[:, None, :], out=lower)
        lower.add_(low[:, :, None]).sub_(low[:, None, :])
        lower.add_(ws.constant("above", n)).exp_()
        if erase:
            self.pair[:, n:] = lower
            self.pair[:, n:].diagonal(dim1=1, dim2=2).zero_()
        self.enter = G.exp().to(dtype).unsqueeze(-1)
        self.last = self.enter[:, -1:]
        self.leave = (G[:, -1:] - G).exp_().to(dtype).unsqueeze(-1)
        if erase:
            self.enter = torch.cat([self.enter, self.enter], 1)


def _inverse_norms(q: Tensor, k: Tensor, l2norm: bool) -> tuple[Tensor | None, ...]:
    """`1 / sqrt(sum(x^2) + eps)` of q and k, `[B, T, H, 1]`; None without l2norm."""
    if not l2norm:
        return None, None
    dtype = compute_dtype(q.dtype)
    norms = (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype) for x in (q, k))
    return tuple(x.square_().add_(L2_EPS).rsqrt_() for x in norms)


def _clamped(g: Tensor | None) -> Tensor | None:
    """g in fp64, where cumulative decays of -1e4 do not swallow the small ones beside them."""
    return None if g is None else g.to(torch.float64).clamp(min=LOG_ZERO)


def _scale_(x: Tensor, factor: Tensor | None) -> Tensor:
    """x times a decay factor, in place."""
    return x if factor is None else x.mul_(factor)


def _plan(q: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Plan:
    batch, length = q.shape[:2]
    bounds = None if cu_seqlens is None else boundaries_to_list(cu_seqlens, length, "chunk")
    return make_plan(batch, length, bounds, chunk_size, q.device)


def _rows_first(x: Tensor, step: Step) -> Tensor:
    """`[R, C, D]` to `[rows, C, HV, D]`."""
    return x.unflatten(0, (step.rows, -1)).transpose(1, 2)


@torch.library.custom_op("fla::chunk", mutates_args=())
def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    l2norm: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final state, and where `save`: the first state, y and the inverse of every chunk."""
    o, final, *saved = _empty_outputs(
        q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size, l2norm, save
    )
    plan, ws = _plan(q, cu_seqlens, chunk_size), _Workspace(final)
    for x in saved:  # the bound on their rows may exceed the chunks there are
        x[plan.chunks :].zero_()
    final = final.zero_() if initial_state is None else plan.sort(final.copy_(initial_state))
    heads, groups, erase = v.shape[2], v.shape[2] // q.shape[2], beta is not None
    norms, decays = _inverse_norms(q, k, l2norm), _clamped(g)
    for step in plan.steps:
        S = final[: step.rows].view(-1, *final.shape[2:])
        chunks = slice(step.first, step.first + step.rows)
        if save:
            saved[0][chunks] = final[: step.rows]
        inputs = _Inputs(ws, step, q, k, norms, groups)
        out, y, inverse = _step_forward(
            ws,
            inputs,
            _Decay(ws, step, decays, erase, final),
            ws.load("values", step.read(v)),
            step.read(beta).mT.flatten(0, 1).unsqueeze(-1).to(final.dtype) if erase else None,
            S,
        )
        if save and erase:
            if step.size < chunk_size:
                saved[1][chunks] = saved[2][chunks] = 0
            saved[1][chunks, :, : step.size] = y.view(step.rows, heads, *y.shape[1:])
            saved[2][chunks, :, : step.size, : step.size] = inverse.view(
                step.rows, heads, *inverse.shape[1:]
            )
        step.write(o, _rows_first(out.mul_(scale), step))
    return o, plan.unsort(final), *saved


def _step_forward(
    ws: _Workspace, inputs: _Inputs, decay: _Decay, values: Tensor, b: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One step: (o, y, inverse), with S advanced in place."""
    R, n, V = values.shape
    left = inputs.qk[:, :n] if b is None else inputs.qk
    scores = torch.bmm(left, inputs.keys.mT, out=ws("scores", R, left.shape[1], n)).mul_(decay.pair)
    inter = _scale_(torch.bmm(left, S, out=ws("inter", R, left.shape[1], V)), decay.enter)
    u, y, inverse = values, None, None
    if b is not None:
        system = torch.mul(scores[:, n:], b.mT, out=ws("system", R, n, n))
        # substitution, not a Neumann series: equal keys make the powers of B grow, their sum stays
        # small
        eye = ws.constant("eye", n).expand(R, n, n)
        inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
        y = torch.bmm(inverse, values.sub_(inter[:, n:]), out=ws("y", R, n, V))
        u = torch.mul(y, b, out=values)
    out = torch.bmm(scores[:, :n], u, out=ws("o", R, n, V)).add_(inter[:, :n])
    _scale_(S, decay.last).baddbmm_(_scale_(inputs.keys, decay.leave).mT, u)
    return out, y, inverse


@_chunk.register_fake
def _empty_outputs(q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size, l2norm, save):
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else q.shape[0]
    dtype = compute_dtype(q.dtype)
    o = q.new_empty(v.shape)
    final = q.new_empty(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    chunks = count_chunks(q.shape[0], q.shape[1], sequences, chunk_size, packed)
    size = chunk_size if beta is not None else 0
    shapes = [final.shape[1:], (v.shape[2], size, v.shape[3]), (v.shape[2], size, size)]
    return o, final, *(final.new_empty((chunks, *s) if save else (0,)) for s in shapes)


@torch.library.custom_op("fla::chunk_backward", mutates_args=())
def _chunk_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    ys: Tensor,
    inverses: Tensor,
    scale: float,
    chunk_size: int,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta (empty where absent) and of the initial state."""
    dq, dk, dv, dg, dbeta, dstate = _empty_gradients(
        do, dfinal, q, k, v, g, beta, cu_seqlens, states, ys, inverses, scale, chunk_size, l2norm
    )
    plan, ws = _plan(q, cu_seqlens, chunk_size), _Workspace(dstate)
    dstate = dstate.zero_() if dfinal is None else plan.sort(dstate.copy_(dfinal))
    # the caller's autocast is not for this arithmetic
    autocast = torch.autocast(q.device.type, enabled=False)
    groups, erase = v.shape[2] // q.shape[2], beta is not None
    norms, decays = _inverse_norms(q, k, l2norm), _clamped(g)
    for step in reversed(plan.steps):
        n, chunks = step.size, slice(step.first, step.first + step.rows)
        inputs = _Inputs(ws, step, q, k, norms, groups)
        if erase:
            y = ws.load("y", ys[chunks, :, :n].transpose(1, 2))
            inverse = inverses[chunks, :, :n, :n].flatten(0, 1)
            b = step.read(beta).mT.flatten(0, 1).unsqueeze(-1).to(dstate.dtype)
        else:
            y, inverse, b = ws.load("y", step.read(v)), None, None
        with autocast:
            grads = _step_backward(
                ws,
                inputs,
                _Decay(ws, step, decays, erase, dstate),
                ws.load("do", step.read(do)).mul_(scale),
                states[chunks].flatten(0, 1),
                dstate[: step.rows].view(-1, *dstate.shape[2:]),
                (y, inverse, b),
            )
        step.write(dq, inputs.gradient(0, grads[0]))
        step.write(dk, inputs.gradient(1, grads[1]))
        step.write(dv, _rows_first(grads[2], step))
        for gate, grad in ((dg, grads[3]), (dbeta, grads[4])):
            if grad is not None:
                step.write(gate, grad.view(step.rows, -1, n).mT)
    if g is not None:
        # a decay that was clamped is a factor of exactly zero, and so is its gradient
        dg.masked_fill_(g <= LOG_ZERO, 0)
    return dq, dk, dv, dg, dbeta, plan.unsort(dstate)


def _step_backward(
    ws: _Workspace,
    inputs: _Inputs,
    decay: _Decay,
    do: Tensor,
    S: Tensor,
    Z: Tensor,
    solved: tuple[Tensor, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dg, dbeta) of one step; Z becomes the gradient of the step's first state in
    place.
    """
    y, inverse, b = solved
    R, n, V = do.shape
    K, keys = S.shape[1], inputs.keys
    left = inputs.qk[:, :n] if b is None else inputs.qk
    scores = torch.bmm(left, keys.mT, out=ws("scores", R, left.shape[1], n)).mul_(decay.pair)
    leaving_keys = (
        keys if decay.leave is None else torch.mul(keys, decay.leave, out=ws("kd", R, n, K))
    )
    m = torch.bmm(scores[:, :n].mT, do, out=ws("m", R, n, V)).baddbmm_(leaving_keys, Z)
    X = ws("X", R, left.shape[1], V)
    X[:, :n] = do
    dv, dbeta, u = m, None, y
    if b is not None:
        torch.bmm(inverse.mT, torch.mul(m, b, out=do), out=X[:, n:])
        dv = do.copy_(X[:, n:])
        X[:, n:].neg_()
        dbeta = torch.mul(m.baddbmm_(scores[:, n:].mT, X[:, n:]), y, out=m).sum(-1)
        u = y.mul_(b)
    dscores = torch.bmm(X, u.mT, out=ws("dscores", R, left.shape[1], n))
    pairs = scores.mul_(dscores)
    dscores.mul_(decay.pair)
    _scale_(X, decay.enter)
    dleft = torch.bmm(X, S.mT, out=ws("dleft", R, left.shape[1], K))
    leaving = _scale_(torch.bmm(u, Z.mT, out=ws("leaving", R, n, K)), decay.leave)
    dg = None
    if decay.last is not None:
        through = decay.last[:, 0] * torch.bmm(S.reshape(R, 1, -1), Z.view(R, -1, 1))[:, 0]
        entered = torch.mul(left, dleft, out=ws("product", R, left.shape[1], K)).sum(-1)
        left_over = torch.mul(keys, leaving, out=ws("product", R, n, K)).sum(-1)
        dg = _decay_gradient(ws, pairs, entered, left_over) + through
        Z.mul_(decay.last)
    dkeys = torch.bmm(dscores.mT, left, out=ws("dkeys", R, n, K)).add_(leaving)
    dleft.baddbmm_(dscores, keys)
    Z.baddbmm_(left.mT, X)
    if b is not None:
        dkeys.add_(dleft[:, n:])
    return dleft[:, :n], dkeys, dv, dg, dbeta


def _decay_gradient(ws: _Workspace, pairs: Tensor, entered: Tensor, left_over: Tensor) -> Tensor:
    """dg `[R, C]` of one step, but for the state that passes through it.

    g_t decays whatever goes from before t to t or later, so dg_t sums what those ways carry:
    `pairs` `[R, C or 2C, C]` from key j < t to row i >= t, `entered` `[R, C or 2C]` from the first
    state to row i >= t, `left_over` `[R, C]` from key j < t to the last state. No term is added and
    taken away again, which sums of row . drow - key . dkey would do.
    """
    R, _, n = pairs.shape
    pairs = pairs.view(R, -1, n, n).sum(1)
    entered = entered.view(R, -1, n).sum(1)
    up_to = ws.constant("up to", n)
    before = torch.matmul(pairs, up_to).mul_(ws.constant("below", n)).sum(1) + left_over @ up_to
    dg = entered.flip(-1).cumsum(-1).flip(-1)
    dg[:, 1:] += before[:, :-1]
    return dg


@_chunk_backward.register_fake
def _empty_gradients(
    do, dfinal, q, k, v, g, beta, cu_seqlens, states, ys, inverses, scale, chunk_size, l2norm
):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    inputs = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, g, beta))
    return *inputs, states.new_empty(sequences, *states.shape[1:])


def _setup_context(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, *ctx.options, save = inputs
    ctx.set_materialize_grads(False)
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    if save:
        ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, *output[2:])


def _backward(ctx, do, dfinal, *_unused):
    q, k, v, g, beta, cu_seqlens, *saved = ctx.saved_tensors
    do = q.new_zeros(v.shape) if do is None else do
    dq, dk, dv, dg, dbeta, dstate = torch.ops.fla.chunk_backward(
        do, dfinal, q, k, v, g, beta, cu_seqlens, *saved, *ctx.options
    )
    dg, dbeta = (None if x is None else d for x, d in ((g, dg), (beta, dbeta)))
    dstate = None if ctx.state_dtype is None else dstate.to(ctx.state_dtype)
    return dq, dk, dv, dg, dbeta, dstate, None, None, None, None, None


_chunk.register_autograd(_backward, setup_context=_setup_context)
