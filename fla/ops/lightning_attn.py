# SPDX-License-Identifier: MIT
r"""# Lightning attention

Qin et al. (2024), *Lightning Attention-2*, arXiv:2401.04658; the decay of a layer as in TransNormer
and MiniMax-01 (arXiv:2501.08313).

    S_t = exp(-s_h) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t
    s_h = (8 h / H) (1 - l / L)                heads h = 0, 1, ... of layer l among L

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H; h counts value heads |
| l, L | `layer_idx`, `num_layers` | integers, 0 <= l < L |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 |

Numerics: as `simple_gla`.

On the one equation: constant decay per head, no erase.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_tensors
from fla.ops.case import QKV, OpCase, constant, literal
from fla.ops.engine.recurrence.terms import CHUNK_SIZE
from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla


def _log_decay(op: str, v: Tensor, layer_idx: int, num_layers: int) -> Tensor:
    if not 0 <= layer_idx < num_layers:
        raise ValueError(
            f"{op}: layer_idx is {layer_idx} of num_layers={num_layers}; 0 <= layer_idx < "
            "num_layers was expected"
        )
    heads = check_tensors(op, v=(v, "B T HV V"))["HV"]
    rate = 8 / heads * (1 - layer_idx / num_layers)
    return -rate * torch.arange(heads, device=v.device, dtype=torch.float64)


@literal("q", "k")
def naive_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    s = (8 * torch.arange(H, dtype=q.dtype) / H * (1 - layer_idx / num_layers))[:, None, None]
    out = []
    for t in range(T):
        S = torch.exp(-s) * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), S if output_final_state else None


@checked
def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention chunk by chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> chunk_lightning_attn(q, k, v, layer_idx=0, num_layers=12)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    return chunk_simple_gla(
        q,
        k,
        v,
        g_gamma=_log_decay("chunk_lightning_attn", v, layer_idx, num_layers),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )


@checked
def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention token by token; `reverse` runs from the last token to the first."""
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        g_gamma=_log_decay("fused_recurrent_lightning_attn", v, layer_idx, num_layers),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


CASES = [
    OpCase(
        "lightning_attn",
        "Lightning attention",
        "arXiv:2401.04658",
        "a decay per head or token",
        chunk_lightning_attn,
        fused_recurrent_lightning_attn,
        naive_recurrent_lightning_attn,
        QKV,
        lambda x: constant(-6 / x["v"].shape[2] * torch.arange(x["v"].shape[2]))(x),
        fixed=dict(layer_idx=3, num_layers=12),
    ),
]
