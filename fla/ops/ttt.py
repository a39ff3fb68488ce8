# SPDX-License-Identifier: MIT
r"""# TTT-linear: a linear model trained at test time

Sun et al. (2024), *Learning to (Learn at Test Time): RNNs with Expressive Hidden States*,
arXiv:2407.04620.

The state is a linear model with a bias, S and c. It is trained on `k -> v` through a normalisation
with a residual, `f(z) = z + LN(z)`, by one gradient step per token, all gradients of a mini-batch
of `chunk_size` tokens taken at its first state (S_0, c_0):

    z_t = S_0^T k_t + c_0            u_t = d/dz |k_t + LN(z_t) - v_t|^2 / 2
    S_t = S_0 - eta_t sum_{s<=t} k_s u_s^T   c_t = c_0 - eta_t sum_{s<=t} u_s
    o_t = f(scale * S_t^T q_t + c_t)         LN(z) = w (z - mean) / sqrt(var + eps) + b

The next mini-batch starts at the S and c of the last token. So a token reads with its own learning
rate, and the last one's stays in the state. That is what published code computes; in the paper the
rate belongs to the token that writes (`S_t = S_{t-1} - eta_t k_t u_t^T`). Both agree where eta does
not change within a mini-batch.

| symbol | argument | shape |
|---|---|---|
| q, k, v | `q`, `k`, `v` | `[B, T, H, D]` |
| w, b | `w`, `b` | `[H, D]` |
| eta | `eta` | `[B, T, H, 1]` |
| S, c | `initial_state`, `initial_state_bias`, results | `[N, H, D, D]`, `[N, H, 1, D]` fp32 |

Returns three: (o, S, c). A mini-batch starts where a call or a sequence starts, so a sequence may
be continued exactly where a mini-batch ends.

Numerics: fp32 or wider.

On the one equation: outside, since u depends on S; within a mini-batch it is linear attention.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.core.boundaries import boundaries_to_list
from fla.core.checks import check_same, check_sequences, check_tensors
from fla.core.precision import promote_to_fp32
from fla.core.stage import Form, Stage, first_tensor
from fla.ops.case import OpCase, literal
from fla.ops.engine.recurrence.recurrence import check_chunk_size, host_boundaries

Result = tuple[Tensor, Tensor | None, Tensor | None]


def normalisation_gradient(z: Tensor, target: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """`d/dz |LN(z) - target|^2 / 2` over the last axis."""
    centred = z - z.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = centred * rstd
    g = (w * unit + b - target) * w
    mean, along = g.mean(-1, keepdim=True), (g * unit).mean(-1, keepdim=True)
    return (g - mean - unit * along) * rstd


def residual_norm(z: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """`z + LN(z)` over the last axis."""
    return z + F.layer_norm(z, z.shape[-1:], eps=eps) * w + b


@literal()
def naive_recurrent_ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    eta: Tensor,
    scale: float | None = None,
    eps: float = 1e-6,
    chunk_size: int = 16,
    initial_state: Tensor | None = None,
    initial_state_bias: Tensor | None = None,
    output_final_state: bool = False,
) -> Result:
    """The equations, token by token, the gradient of the loss by autograd."""
    B, T, H, D = q.shape
    S = q.new_zeros(B, H, D, D) if initial_state is None else initial_state
    c = q.new_zeros(B, H, D) if initial_state_bias is None else initial_state_bias[:, :, 0]
    out = []
    for t in range(T):
        if t % chunk_size == 0:
            S_0, c_0 = S, c
            sum_ku, sum_u = torch.zeros_like(S), torch.zeros_like(c)
        z = torch.einsum("bhkv,bhk->bhv", S_0, k[:, t]) + c_0
        with torch.enable_grad():
            leaf = z if z.requires_grad else z.detach().requires_grad_()
            normed = F.layer_norm(leaf, (D,), eps=eps) * w + b
            loss = (k[:, t] + normed - v[:, t]).square().sum() / 2
            (u,) = torch.autograd.grad(loss, leaf, create_graph=z.requires_grad)
        sum_ku, sum_u = sum_ku + torch.einsum("bhk,bhv->bhkv", k[:, t], u), sum_u + u
        S, c = S_0 - eta[:, t, :, :, None] * sum_ku, c_0 - eta[:, t] * sum_u
        read = torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * (D**-0.5 if scale is None else scale)
        out.append(residual_norm(read + c, w, b, eps))
    final = (S, c.unsqueeze(2)) if output_final_state else (None, None)
    return torch.stack(out, 1), *final


def _mini_batch(
    S: Tensor, c: Tensor, rows: list[Tensor], w: Tensor, b: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One mini-batch of `[N, H, C, D]`: (o, S, c)."""
    q, k, v, eta = rows
    u = normalisation_gradient(k @ S + c, v - k, w, b, eps)
    scores, last = scale * (q @ k.mT).tril(), eta[:, :, -1:]
    o = scale * (q @ S) + c - eta * (scores @ u + u.cumsum(2))
    return residual_norm(o, w, b, eps), S - last * (k.mT @ u), c - last * u.sum(2, keepdim=True)


def _sequences(
    S: Tensor, c: Tensor, rows: list[Tensor], chunk_size: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out = []
    if rows[0].shape[2]:
        for parts in zip(*(x.split(chunk_size, 2) for x in rows), strict=True):
            o, S, c = _mini_batch(S, c, list(parts), *rest)
            out.append(o)
    return (torch.cat(out, 2) if out else rows[0]), S, c


@checked
def chunk_ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    eta: Tensor,
    scale: float | None = None,
    eps: float = 1e-6,
    chunk_size: int = 16,
    initial_state: Tensor | None = None,
    initial_state_bias: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """TTT-linear, a mini-batch of `chunk_size` tokens at a time. The mini-batch is part of the
    model: another size gives other numbers.

    Example:
        >>> q, k, v = torch.randn(3, 1, 40, 2, 8).unbind()
        >>> w, b, eta = torch.ones(2, 8), torch.zeros(2, 8), torch.rand(1, 40, 2, 1)
        >>> chunk_ttt_linear(q, k, v, w, b, eta)[0].shape
        torch.Size([1, 40, 2, 8])
    """
    op = "chunk_ttt_linear"
    sizes = check_tensors(
        op,
        q=(q, "B T H D"),
        k=(k, "B T H D"),
        v=(v, "B T H D"),
        w=(w, "H D"),
        b=(b, "H D"),
        eta=(eta, "B T H one"),
    )
    if sizes["one"] != 1:
        raise ValueError(f"{op}: eta has shape {list(eta.shape)}; [B, T, H, 1] was expected")
    states = dict(initial_state=initial_state, initial_state_bias=initial_state_bias)
    D, shapes = sizes["D"], dict(initial_state=(-1,), initial_state_bias=(1,))
    N = check_sequences(op, sizes["B"], cu_seqlens, None)
    starts = []
    for name, x in states.items():
        rows = D if shapes[name] == (-1,) else 1
        if x is None:
            x = promote_to_fp32(v).new_zeros(N, sizes["H"], rows, D)
        elif x.shape[1:] != (sizes["H"], rows, D):
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)}; {[N, sizes['H'], rows, D]} was expected"
            )
        check_same(op, dtype=False, v=v, **{name: x})
        check_sequences(op, sizes["B"], cu_seqlens, x, name)
        starts.append(promote_to_fp32(x))
    check_chunk_size(op, chunk_size)
    cu_seqlens = host_boundaries(op, cu_seqlens, cu_seqlens_cpu)
    scale = D**-0.5 if scale is None else scale
    rest = (chunk_size, promote_to_fp32(w)[:, None], promote_to_fp32(b)[:, None], scale, eps)
    rows_ = [promote_to_fp32(x).transpose(1, 2).contiguous() for x in (q, k, v, eta)]
    o, S, c = MINI_BATCHES(op, backend, rows_, starts, cu_seqlens, rest)
    o = o.transpose(1, 2).to(v.dtype)
    return (o, S, c) if output_final_state else (o, None, None)


def _packed(
    rows: list[Tensor], starts: list[Tensor], cu_seqlens: Tensor | None, rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is None:
        return _sequences(starts[0], starts[1], rows, *rest)
    bounds = boundaries_to_list(cu_seqlens, rows[0].shape[2])
    results = [
        _sequences(starts[0][i : i + 1], starts[1][i : i + 1], [x[:, :, a:b] for x in rows], *rest)
        for i, (a, b) in enumerate(pairwise(bounds))
    ]
    o, S, c = zip(*results, strict=True)
    return torch.cat(o, 2), torch.cat(S), torch.cat(c)


MINI_BATCHES = Stage(
    "ttt",
    {"torch": Form(_packed, "mini-batches in turn, under plain autograd")},
    lambda rows, *_: first_tensor(rows[0]),
)


fused_chunk_ttt_linear = chunk_ttt_linear


@checked
def chunk_ttt_linear_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    eta: Tensor,
    scale: float | None = None,
    eps: float = 1e-6,
    mini_batch_size: int = 16,
    initial_state: Tensor | None = None,
    initial_state_bias: Tensor | None = None,
    output_final_state: bool = False,
) -> Result:
    """The literal loop under its published name."""
    return naive_recurrent_ttt_linear(
        q,
        k,
        v,
        w,
        b,
        eta,
        scale,
        eps,
        mini_batch_size,
        initial_state,
        initial_state_bias,
        output_final_state,
    )


CASES = [
    OpCase(
        "ttt",
        "TTT-linear",
        "arXiv:2407.04620",
        "states that solve or learn",
        chunk_ttt_linear,
        fused_chunk_ttt_linear,
        naive_recurrent_ttt_linear,
        dict(q="B T H K", k="B T H K", v="B T H K", w="H K", b="H K", eta="B T H 1 small"),
        state=dict(initial_state="N H K K", initial_state_bias="N H 1 K"),
        grain=16,
    ),
]
