# SPDX-License-Identifier: MIT
r"""# MesaNet: the least-squares solution at every token

von Oswald et al. (2025), *MesaNet: Sequence Modeling by Locally Optimal Test-Time Training*,
arXiv:2506.05233.

    A_t = exp(g_t) A_{t-1} + beta_t k_t k_t^T        S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T (A_t + diag(lambda))^{-1} q_t

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, H, V]` |
| g | `g` | `[B, T, H]`, natural log of the decay, any value <= 0 including -inf |
| beta | `beta` | `[B, T, H]` in [0, 1] |
| lambda | `lamb` | `[H, K]`, above 0 |
| A_0, A_T | `h_kk_init`, result | `[N, H, K, K]` fp32; its symmetric part counts |
| S_0, S_T | `h_kv_init`, result | `[N, H, K, V]` fp32 |

Returns three: (o, A, S). The chunk form solves for all tokens at once by conjugate gradients with
the diagonal as preconditioner, `max_CG_iteration` of them; the token form solves exactly.

Numerics: states and the solve in fp32 or wider. A product with A_t for every t is itself a member
of the family, so one iteration is one chunk form. The gradient of the solve is a second solve.

On the one equation: two states of scalar decay without erase, and between them a solve.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla._arguments import checked, shaped
from fla.core.boundaries import boundaries_to_list, count_sequences
from fla.core.checks import check_log_decay, check_sequences, check_tensors
from fla.core.parallel import refuse_sharded
from fla.core.precision import promote_to_fp32
from fla.core.stage import Form, Stage, first_tensor
from fla.ops.case import OpCase
from fla.ops.engine.recurrence.equation import per_sequence
from fla.ops.engine.recurrence.gates import l2norm
from fla.ops.engine.recurrence.recurrence import check_chunk_size, host_boundaries
from fla.ops.engine.recurrence.stages import CHUNK
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Switches, Terms

Result = tuple[Tensor, Tensor | None, Tensor | None]


@shaped(
    q="B T H K", k="B T H K", v="B T H V", g="B T H", beta="B T H", lamb="H K",
    h_kk_init="B H K K", h_kv_init="B H K V",
)  # fmt: skip
def naive_mesa_net_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    lamb: Tensor,
    beta: Tensor,
    h_kk_init: Tensor | None = None,
    h_kv_init: Tensor | None = None,
    output_final_state: bool = True,
) -> Result:
    """The equation, token by token, with an exact solve. Note the order g, lamb, beta."""
    B, T, H, K = k.shape
    A = k.new_zeros(B, H, K, K) if h_kk_init is None else (h_kk_init + h_kk_init.mT) / 2
    S = k.new_zeros(B, H, K, v.shape[-1]) if h_kv_init is None else h_kv_init
    out = []
    for t in range(T):
        decay, write = g[:, t, :, None, None].exp(), beta[:, t, :, None] * k[:, t]
        A = decay * A + torch.einsum("bhk,bhl->bhkl", write, k[:, t])
        S = decay * S + torch.einsum("bhk,bhv->bhkv", write, v[:, t])
        x = torch.linalg.solve(
            promote_to_fp32(A + torch.diag_embed(lamb)), promote_to_fp32(q[:, t])
        ).to(S.dtype)
        out.append(torch.einsum("bhkv,bhk->bhv", S, x))
    o = torch.stack(out, 1) if out else v
    return (o, A, S) if output_final_state else (o, None, None)


def _conjugate_gradients(product: Any, target: Tensor, diagonal: Tensor, iterations: int) -> Tensor:
    """x with `product(x) = target`, for a symmetric positive definite map of every row."""
    tiny = torch.finfo(target.dtype).tiny
    x = target / diagonal
    r = target - product(x)
    z = r / diagonal
    p, rz = z, (r * z).sum(-1, keepdim=True)
    for _ in range(iterations):
        Ap = product(p)
        alpha = rz / (p * Ap).sum(-1, keepdim=True).clamp_min(tiny)
        x, r = x + alpha * p, r - alpha * Ap
        z = r / diagonal
        new = (r * z).sum(-1, keepdim=True)
        p, rz = z + new / rz.clamp_min(tiny) * p, new
    return x


class LinearForm(NamedTuple):
    """Linear attention with a decay on a backend: `(q, k, v, g)` to o and the final state."""

    op: str
    backend: str | None
    chunk_size: int

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        switches = Switches(1.0, chunk_size=self.chunk_size)
        terms = Terms(q, k, v, g=g)
        return CHUNK(self.op, self.backend, terms, switches, initial_state, cu_seqlens)


class _Solve(torch.autograd.Function):
    """Zero, with the gradient of `(A_t + diag(lambda))^{-1} r_t` in r."""

    @staticmethod
    def forward(r, k, write, g, lamb, A, diagonal, cu_seqlens, iterations, form):
        return torch.zeros_like(r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:8])
        ctx.iterations, ctx.form = inputs[8:]

    @staticmethod
    def backward(ctx, grad):
        k, write, g, lamb, A, diagonal, cu_seqlens = ctx.saved_tensors

        def product(x: Tensor) -> Tensor:
            return _product(x, k, write, g, lamb, A, cu_seqlens, ctx.form)

        solved = _conjugate_gradients(product, grad, diagonal, ctx.iterations)
        return solved, *[None] * 9


def _product(
    x: Tensor,
    k: Tensor,
    write: Tensor,
    g: Tensor,
    lamb: Tensor,
    A: Tensor | None,
    cu_seqlens: Tensor | None,
    form: LinearForm,
) -> Tensor:
    """`(A_t + diag(lambda)) x_t` for every token."""
    o, _ = form(x, k, write, g, A, cu_seqlens)
    return o + lamb * x


def _solve(
    q: Tensor,
    k: Tensor,
    write: Tensor,
    g: Tensor,
    lamb: Tensor,
    A: Tensor | None,
    cu_seqlens: Tensor | None,
    iterations: int,
    form: LinearForm,
) -> Tensor:
    """x_t = (A_t + diag(lambda))^{-1} q_t, differentiable in every tensor: x is found without
    gradient, and `x + solve(q - A x)`, whose second term is 0, has the gradient of the solution.
    """
    with torch.no_grad():
        state = None if A is None else A.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        ones = torch.ones_like(k[..., :1])
        diagonal = lamb + form(ones, ones, write * k, g, state, cu_seqlens)[0]
        x = _conjugate_gradients(
            lambda p: _product(p, k, write, g, lamb, A, cu_seqlens, form),
            q,
            diagonal,
            iterations,
        )
    if not torch.is_grad_enabled():
        return x
    residual = q - _product(x, k, write, g, lamb, A, cu_seqlens, form)
    fixed = (y if y is None else y.detach() for y in (k, write, g, lamb, A))
    return x + _Solve.apply(residual, *fixed, diagonal, cu_seqlens, iterations, form)


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    states: tuple[Tensor | None, Tensor | None],
    cu_seqlens: Tensor | None,
) -> None:
    sizes = check_tensors(
        op,
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        g=(g, "B T H"),
        beta=(beta, "B T H"),
        lamb=(lamb, "H K"),
    )
    check_tensors(op, k=(k, "B T H K"), v=(v, "B T H V"), h_kv_init=(states[1], "N H K V"))
    check_tensors(op, k=(k, "B T H K"), h_kk_init=(states[0], "N H K L"))
    if states[0] is not None and states[0].shape[2] != states[0].shape[3]:
        raise ValueError(
            f"{op}: h_kk_init has shape {list(states[0].shape)}; [N, H, K, K] was expected"
        )
    for name, state in zip(("h_kk_init", "h_kv_init"), states, strict=True):
        check_sequences(op, sizes["B"], cu_seqlens, state, name)
    check_log_decay(op, g=g)
    refuse_sharded(op)


@checked
def chunk_mesa_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    h_kk_init: Tensor | None = None,
    h_kv_init: Tensor | None = None,
    output_final_state: bool = False,
    max_CG_iteration: int = 30,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> Result:
    """MesaNet chunk by chunk. Note the order g, beta, lamb.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 8).unbind()
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 100, 2)
        >>> o, A, S = chunk_mesa_net(q, k, v, g, beta, lamb=torch.ones(2, 8))
        >>> o.shape
        torch.Size([1, 100, 2, 8])
    """
    op = "chunk_mesa_net"
    states = (h_kk_init, h_kv_init)
    _check(op, q, k, v, g, beta, lamb, states, cu_seqlens)
    cu_seqlens = host_boundaries(op, cu_seqlens, cu_seqlens_cpu)
    check_chunk_size(op, chunk_size)
    form = LinearForm(op, backend, chunk_size)
    if max_CG_iteration < 1:
        raise ValueError(f"{op}: max_CG_iteration is {max_CG_iteration}; at least 1 was expected")
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    dtype = v.dtype
    q, k, v, g, lamb = (promote_to_fp32(x) for x in (q, k, v, g, lamb))
    write = promote_to_fp32(beta).unsqueeze(-1) * k
    A0 = (
        None
        if h_kk_init is None
        else (promote_to_fp32(h_kk_init) + promote_to_fp32(h_kk_init).mT) / 2
    )
    x = _solve(q, k, write, g, lamb, A0, cu_seqlens, max_CG_iteration, form)
    o, S = form(x, write, v, g, h_kv_init, cu_seqlens)
    if not output_final_state:
        return o.to(dtype), None, None
    _, A = form(k, write, k, g, A0, cu_seqlens)
    return o.to(dtype), A, S


def _exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    states: tuple[Tensor | None, Tensor | None],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o, and the final states side by side, `[N, H, K, K + V]`."""
    K, N = k.shape[-1], count_sequences(k, cu_seqlens)
    shapes = ((N, k.shape[2], K, K), (N, k.shape[2], K, v.shape[-1]))
    starts = [
        promote_to_fp32(k).new_zeros(s) if x is None else promote_to_fp32(x)
        for x, s in zip(states, shapes, strict=True)
    ]

    def form(state: Tensor, **rows: Any) -> tuple[Tensor, Tensor]:
        A, S = state[..., :K], state[..., K:]
        o, *final = naive_mesa_net_exact(
            **rows, lamb=promote_to_fp32(lamb), h_kk_init=A, h_kv_init=S
        )
        return o, torch.cat([x for x in final if x is not None], -1)

    tensors = dict(q=q, k=k, v=v, g=g, beta=beta)
    rows = {name: promote_to_fp32(x) for name, x in tensors.items()}
    bounds = None if cu_seqlens is None else boundaries_to_list(cu_seqlens, k.shape[1], "mesa_net")
    o, final = per_sequence(form, bounds, torch.cat(starts, -1), **rows)
    return o.to(v.dtype), final


EXACT = Stage(
    "mesa_net.token",
    {"torch": Form(_exact, "token form with an exact solve, under plain autograd")},
    first_tensor,
)


@checked
def fused_recurrent_mesa_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    h_kk_init: Tensor | None = None,
    h_kv_init: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """MesaNet token by token, with an exact solve."""
    op = "fused_recurrent_mesa_net"
    _check(op, q, k, v, g, beta, lamb, (h_kk_init, h_kv_init), cu_seqlens)
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    K = k.shape[-1]
    o, final = EXACT(op, backend, q, k, v, g, beta, lamb, (h_kk_init, h_kv_init), cu_seqlens)
    if not output_final_state:
        return o, None, None
    return o, final[..., :K], final[..., K:]


@checked
def mesa_net_decoding_one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    lamb: Tensor,
    beta: Tensor,
    prev_h_kk: Tensor,
    prev_h_kv: Tensor,
    max_CG_iteration: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token q, k `[B, H, K]`, v `[B, H, V]`, g, beta `[B, H]` by conjugate gradients: (o, A,
    S). Note the order g, lamb, beta.
    """
    decay, write = g[..., None, None].exp(), beta.unsqueeze(-1) * k
    A = decay * prev_h_kk + torch.einsum("bhk,bhl->bhkl", write, k)
    S = decay * prev_h_kv + torch.einsum("bhk,bhv->bhkv", write, v)
    full = A + torch.diag_embed(lamb)
    x = _conjugate_gradients(
        lambda p: torch.einsum("bhkl,bhl->bhk", full, p),
        q,
        full.diagonal(dim1=-2, dim2=-1),
        max_CG_iteration,
    )
    return torch.einsum("bhkv,bhk->bhv", S, x), A, S


naive_mesa_net_decoding_one_step = mesa_net_decoding_one_step


CASES = [
    OpCase(
        "mesa_net",
        "MesaNet",
        "arXiv:2506.05233",
        "states that solve or learn",
        chunk_mesa_net,
        fused_recurrent_mesa_net,
        naive_mesa_net_exact,
        dict(
            q="B T H K",
            k="B T H K unit",
            v="B T H V",
            g="B T H decay",
            beta="B T H rate",
            lamb="H K positive",
        ),
        state=dict(h_kk_init="N H K K squares", h_kv_init="N H K V"),
    ),
]
