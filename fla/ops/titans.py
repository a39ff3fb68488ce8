# SPDX-License-Identifier: MIT
r"""# Titans, linear: TTT with momentum and weight decay

Behrouz, Zhong, Mirrokni (2024), *Titans: Learning to Memorize at Test Time*, arXiv:2501.00663.

The memory S is trained as in TTT-linear (`ttt`), without a bias and with gradients taken at the
first state S_0 of a mini-batch of `chunk_size` tokens; M is the momentum:

    u_t = d/dz |LN(z) - (v_t - k_t)|^2 / 2   at   z = S_0^T k_t
    M_t = eta_t M_{t-1} - theta_t k_t u_t^T
    S_t = (1 - alpha_t) S_{t-1} + M_t            o_t = f(S_t^T q_t),  f(z) = z + LN(z)

| symbol | argument | shape |
|---|---|---|
| q, k, v | `q`, `k`, `v` | `[B, T, H, D]` |
| w, b | `w`, `b` | `[H, D]`, of LN |
| theta, alpha, eta | the same | `[B, T, H, 1]` in [0, 1]: step, forgetting, momentum |
| S, M | `initial_state`, result | `([N, H, D, D], [N, H, D, D])` fp32 |

Mini-batches as in `ttt`. `chunk_titans_linear_ref` of other packages is head-first; all here is
not. Numerics: fp32 or wider.

On the one equation: outside, since u depends on S; within a mini-batch two chained linear
recurrences, whose joint weights are a product of two triangular matrices of decays.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.boundaries import boundaries_to_list
from fla.core.checks import check_parts, check_sequences, check_tensors
from fla.core.precision import promote_to_fp32
from fla.core.stage import Form, Stage, first_tensor
from fla.ops.case import OpCase, literal
from fla.ops.engine.recurrence.recurrence import check_chunk_size
from fla.ops.ttt import normalisation_gradient, residual_norm

State = tuple[Tensor, Tensor]


@literal()
def naive_recurrent_titans_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    eps: float = 1e-6,
    chunk_size: int = 16,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The equations, token by token."""
    B, T, H, D = q.shape
    S, M = initial_state or (q.new_zeros(B, H, D, D), q.new_zeros(B, H, D, D))
    out = []
    for t in range(T):
        if t % chunk_size == 0:
            S_0 = S
        z = torch.einsum("bhkv,bhk->bhv", S_0, k[:, t])
        u = normalisation_gradient(z, v[:, t] - k[:, t], w, b, eps)
        write = torch.einsum("bhk,bhv->bhkv", theta[:, t] * k[:, t], u)
        M = eta[:, t, :, None] * M - write
        S = (1 - alpha[:, t, :, None]) * S + M
        read = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append(residual_norm(read, w, b, eps))
    return torch.stack(out, 1), (S, M) if output_final_state else None


def _products(decay: Tensor) -> Tensor:
    """`P_ij = prod_{s = j + 1 .. i} decay_s` for i >= j, else 0: `[N, H, C]` to `[N, H, C, C]`."""
    n = decay.shape[-1]
    eye = torch.eye(n, dtype=decay.dtype, device=decay.device)
    rows = [eye[0].expand(*decay.shape[:2], n)]
    for i in range(1, n):
        rows.append(decay[..., i : i + 1] * rows[-1] + eye[i])
    return torch.stack(rows, 2)


def _mini_batch(
    S: Tensor, M: Tensor, rows: list[Tensor], w: Tensor, b: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One mini-batch of `[N, H, C, D]`: (o, S, M)."""
    q, k, v, theta, alpha, eta = rows
    u = theta * normalisation_gradient(k @ S, v - k, w, b, eps)
    keep, momentum = 1 - alpha[..., 0], eta[..., 0]
    within, forget = _products(momentum), _products(keep)
    weights = forget @ within  # the share of the write at j in S_i
    old_S, old_M = keep.cumprod(-1), momentum.cumprod(-1)  # the shares of S and M in S_i and M_i
    from_M = (forget @ old_M.unsqueeze(-1)).squeeze(-1)
    o = old_S.unsqueeze(-1) * (q @ S) + from_M.unsqueeze(-1) * (q @ M)
    o = o - (weights * (q @ k.mT)) @ u
    last = (x[..., -1, None, None] for x in (old_S, from_M, old_M))
    a, c, d = last
    new_S = a * S + c * M - (k * weights[:, :, -1].unsqueeze(-1)).mT @ u
    new_M = d * M - (k * within[:, :, -1].unsqueeze(-1)).mT @ u
    return residual_norm(o, w, b, eps), new_S, new_M


def _sequences(
    S: Tensor, M: Tensor, rows: list[Tensor], chunk_size: int, w: Tensor, b: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = []
    if rows[0].shape[2]:
        for parts in zip(*(x.split(chunk_size, 2) for x in rows), strict=True):
            o, S, M = _mini_batch(S, M, list(parts), w, b, eps)
            out.append(o)
    return (torch.cat(out, 2) if out else rows[0]), S, M


def _check(
    op: str, tensors: dict[str, Tensor], state: State | None, cu_seqlens: Tensor | None
) -> State:
    """The state as given, or zeros; or `ValueError`."""
    row, gate = "B T H D", "B T H one"
    axes = dict(q=row, k=row, v=row, w="H D", b="H D", theta=gate, alpha=gate, eta=gate)
    specs: Any = {n: (tensors[n], a) for n, a in axes.items()}
    sizes = check_tensors(op, **specs)
    if sizes["one"] != 1:
        raise ValueError(
            f"{op}: theta has shape {list(tensors['theta'].shape)}; [B, T, H, 1] was expected"
        )
    N = check_sequences(op, sizes["B"], cu_seqlens, None)
    shape = (N, sizes["H"], sizes["D"], sizes["D"])
    if state is None:
        zeros = promote_to_fp32(tensors["v"]).new_zeros(shape)
        return zeros, zeros
    check_parts(op, state, "S, M")
    for i, x in enumerate(state):
        if x.shape != shape:
            raise ValueError(
                f"{op}: initial_state[{i}] has shape {list(x.shape)}; {list(shape)} was expected"
            )
    return promote_to_fp32(state[0]), promote_to_fp32(state[1])


def _packed(
    rows: list[Tensor], starts: list[Tensor], cu_seqlens: Tensor | None, rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    form: Any = _sequences
    if cu_seqlens is None:
        return form(*starts, rows, *rest)
    bounds = boundaries_to_list(cu_seqlens, rows[0].shape[2], "chunk_titans_linear")
    results: Any = [
        form(starts[0][i : i + 1], starts[1][i : i + 1], [x[:, :, a:e] for x in rows], *rest)
        for i, (a, e) in enumerate(pairwise(bounds))
    ]
    o, S, M = (torch.cat(x, 0 if j else 2) for j, x in enumerate(zip(*results, strict=True)))
    return o, S, M


MINI_BATCHES = Stage(
    "titans",
    {"torch": Form(_packed, "mini-batches in turn, under plain autograd")},
    lambda rows, *_: first_tensor(rows[0]),
)


@checked
def chunk_titans_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    eps: float = 1e-6,
    chunk_size: int = 16,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Titans-linear, a mini-batch of `chunk_size` tokens at a time; the size is part of the model.

    Example:
        >>> q, k, v = torch.randn(3, 1, 40, 2, 8).unbind()
        >>> gates = torch.rand(3, 1, 40, 2, 1).unbind()
        >>> chunk_titans_linear(q, k, v, torch.ones(2, 8), torch.zeros(2, 8), *gates)[0].shape
        torch.Size([1, 40, 2, 8])
    """
    op = "chunk_titans_linear"
    tensors = dict(q=q, k=k, v=v, w=w, b=b, theta=theta, alpha=alpha, eta=eta)
    starts = _check(op, tensors, initial_state, cu_seqlens)
    check_chunk_size(op, chunk_size)
    rows = [promote_to_fp32(x).transpose(1, 2).contiguous() for x in (q, k, v, theta, alpha, eta)]
    rest: Any = (chunk_size, promote_to_fp32(w)[:, None], promote_to_fp32(b)[:, None], eps)
    o, S, M = MINI_BATCHES(op, backend, rows, starts, cu_seqlens, rest)
    return o.transpose(1, 2).to(v.dtype), (S, M) if output_final_state else None


@checked
def chunk_titans_linear_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    eps: float = 1e-6,
    chunk_size: int = 16,
    initial_state: State | None = None,
    output_final_state: bool = False,
    use_chunk: bool = True,
) -> tuple[Tensor, State | None]:
    """The equations by mini-batches, or without `use_chunk` token by token: the same numbers."""
    form = chunk_titans_linear if use_chunk else naive_recurrent_titans_linear
    return form(
        q, k, v, w, b, theta, alpha, eta, eps, chunk_size, initial_state, output_final_state
    )


CASES = [
    OpCase(
        "titans",
        "Titans-linear",
        "arXiv:2501.00663",
        "states that solve or learn",
        chunk_titans_linear,
        chunk_titans_linear,
        naive_recurrent_titans_linear,
        dict(
            q="B T H K",
            k="B T H K unit",
            v="B T H K",
            w="H K",
            b="H K",
            theta="B T H 1 rate",
            alpha="B T H 1 rate",
            eta="B T H 1 rate",
        ),
        state=dict(initial_state=("N H K K", "N H K K")),
        grain=16,
    ),
]
