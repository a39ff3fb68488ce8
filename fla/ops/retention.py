# SPDX-License-Identifier: MIT
r"""# Retention

Sun et al. (2023), *Retentive Network: A Successor to Transformer*, arXiv:2307.08621.

    S_t = gamma_h S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t        gamma_h = 1 - 2^(-5 - h)

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H; h counts value heads |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 |

Numerics: as `simple_gla`.

On the one equation: constant decay per head, no erase.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_tensors
from fla.ops.case import QKV, OpCase, constant, literal
from fla.ops.engine.recurrence.recurrence import state_layout
from fla.ops.engine.recurrence.terms import CHUNK_SIZE
from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla, parallel_simple_gla


def log_decay(heads: int, device: torch.device | None = None) -> Tensor:
    """`log(1 - 2^(-5 - h))` for the heads h = 0, 1, ..., `[H]`."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=device, dtype=torch.float64)))


@literal("q", "k")
def naive_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token."""
    B, T, H, K = q.shape
    gamma = (1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype)))[:, None, None]
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        S = gamma * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The whole matrix at once, on head-first tensors `[B, H, T, D]`: `A_ij = q_i . k_j
    gamma^(i - j) / sqrt(K)` for i >= j.
    """
    position = torch.arange(q.shape[2], device=q.device)
    power = log_decay(q.shape[1], q.device)[:, None, None] * (position[:, None] - position)
    A = (q @ k.mT) * q.shape[-1] ** -0.5 * power.exp().tril().to(q.dtype)
    return A @ v


@checked
def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention chunk by chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> chunk_retention(q, k, v)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    check_tensors("chunk_retention", v=(v, "B T HV V"))
    return chunk_simple_gla(
        q,
        k,
        v,
        g_gamma=log_decay(v.shape[2], v.device),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )


fused_chunk_retention = chunk_retention


@checked
def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention token by token; `reverse` runs from the last token to the first.
    `transpose_state_layout` is the former name of `state_v_first`.
    """
    op = "fused_recurrent_retention"
    check_tensors(op, v=(v, "B T HV V"))
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        g_gamma=log_decay(v.shape[2], v.device),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=state_layout(op, state_v_first, transpose_state_layout),
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


@checked
def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention with its matrix `[B, HV, T, T]` where `output_attentions`."""
    check_tensors("parallel_retention", v=(v, "B T HV V"))
    g = log_decay(v.shape[2], v.device).expand(v.shape[:3])
    return parallel_simple_gla(q, k, v, g, scale, output_attentions, cu_seqlens, backend=backend)


CASES = [
    OpCase(
        "retention",
        "Retention",
        "arXiv:2307.08621",
        "a decay per head or token",
        chunk_retention,
        fused_recurrent_retention,
        naive_recurrent_retention,
        QKV,
        lambda x: constant(log_decay(x["v"].shape[2]))(x),
    ),
]
