# SPDX-License-Identifier: MIT
r"""# RWKV-6: a decay per channel, read before the write, and a bonus for the current token

Peng et al. (2024), *Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence*,
arXiv:2404.05892.

    o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T r_t
    S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

| symbol | argument | shape |
|---|---|---|
| r, k | `r`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| w | `w` | `[B, T, HV, K]`, natural log of the decay, any value <= 0 including -inf |
| u | `u` | `[H, K]` |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 |

Numerics: as `gla`; the bonus is a product of its own, in the dtype of the inputs' arithmetic.

On the one equation: vector decay, no erase, the read before the write, and the bonus u.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.case import Inputs, OpCase, literal
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal("r", "k", "u")
def naive_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token."""
    B, T, H, K = r.shape
    S = r.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        o = torch.einsum("bhkv,bhk->bhv", S + u[:, :, None] * kv, r[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
        S = w[:, t, :, :, None].exp() * S + kv
    return torch.stack(out, 1), S if output_final_state else None


def _rwkv6(
    op: str,
    options: Options,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    check_tensors(
        op,
        r=(r, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T HV V"),
        w=(w, "B T HV K"),
        u=(u, "H K"),
    )
    o, final = recurrence(
        op,
        options,
        Terms(r, k, v, gk=w),
        initial_state,
        cu_seqlens,
        cu_seqlens_cpu,
        names={"q": "r", "gk": "w"},
    )
    scale = r.shape[-1] ** -0.5 if options.scale is None else options.scale
    own = scale * (promote_to_fp32(r) * promote_to_fp32(u) * promote_to_fp32(k)).sum(
        -1, keepdim=True
    )
    own = own.repeat_interleave(v.shape[2] // r.shape[2], 2)
    return (promote_to_fp32(o) + own * promote_to_fp32(v)).to(o.dtype), final


@checked
def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-6 chunk by chunk.

    Example:
        >>> r, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> w, u = -torch.rand(1, 100, 2, 16), torch.randn(2, 16)
        >>> chunk_rwkv6(r, k, v, w, u)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    options = Options(
        scale, output_final_state, read_before=True, chunk_size=chunk_size, backend=backend
    )
    return _rwkv6("chunk_rwkv6", options, r, k, v, w, u, initial_state, cu_seqlens, cu_seqlens_cpu)


@checked
def fused_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-6 token by token; `reverse` runs from the last token to the first."""
    options = Options(scale, output_final_state, reverse=reverse, read_before=True, backend=backend)
    return _rwkv6("fused_recurrent_rwkv6", options, r, k, v, w, u, initial_state, cu_seqlens)


def _point(x: Inputs) -> dict[str, Any]:
    return dict(q=x["r"], k=x["k"], v=x["v"], g=x["w"], bonus=x["u"])


CASES = [
    OpCase(
        "rwkv6",
        "RWKV-6",
        "arXiv:2404.05892",
        "a decay per channel",
        chunk_rwkv6,
        fused_recurrent_rwkv6,
        naive_recurrent_rwkv6,
        dict(r="B T H K", k="B T H K unit", v="B T HV V", w="B T HV K decay", u="H K"),
        _point,
    ),
]
