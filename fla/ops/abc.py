# SPDX-License-Identifier: MIT
r"""# ABC: attention with bounded-memory control

Peng et al. (2021), *ABC: Attention with Bounded-memory Control*, arXiv:2110.02488.

    z_t = log sum_{j <= t} exp(s_j)        w_t = exp(s_t - z_t)        a_t = exp(z_{t-1} - z_t)
    S_t = S_{t-1} diag(a_t) + k_t w_t^T        p_t = softmax(scale * S_t^T q_t)
    R_t = diag(a_t) R_{t-1} + w_t v_t^T        o_t = R_t^T p_t

so every slot is an average of what was written into it, with weights exp(s).

| symbol | argument | shape |
|---|---|---|
| q | `q` | `[B, T, HQ, K]`, HQ a multiple of H |
| k, v | `k`, `v` | `[B, T, H, K]`, `[B, T, H, V]` |
| s | `s` | `[B, T, H, M]`, logits over the M slots |
| S, R, z | `initial_state`, result | `([N, H, K, M], [N, H, M, V], [N, H, M])` fp32 |

The state carries z, which a pair (S, R) would lose. Numerics: as `gsa`.

On the one equation: `gsa` with the decay that the normalisation implies.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.ops.case import OpCase
from fla.ops.engine.recurrence.recurrence import Options
from fla.ops.engine.recurrence.terms import CHUNK_SIZE
from fla.ops.gsa import State, _gsa, naive_recurrent_gsa


@checked
def naive_recurrent_abc(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The equation, token by token; with g it is gated slot attention."""
    return naive_recurrent_gsa(q, k, v, s, g, scale, initial_state, output_final_state)


@checked
def naive_cumsum_abc(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, None]:
    """The definition with explicit averages: each slot's key and value at every token."""
    weights = (s - s.amax(1, keepdim=True)).exp()
    total = weights.cumsum(1)
    keys = torch.einsum("bthm,bthk->bthmk", weights, k).cumsum(1) / total[..., None]
    values = torch.einsum("bthm,bthv->bthmv", weights, v).cumsum(1) / total[..., None]
    p = (torch.einsum("bthk,bthmk->bthm", q, keys) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bthm,bthmv->bthv", p, values), None


@checked
def chunk_abc(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    initial_state: State | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """ABC chunk by chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> chunk_abc(q, k, v, s=torch.randn(1, 100, 2, 8))[0].shape
        torch.Size([1, 100, 2, 16])
    """
    options = Options(scale, output_final_state, chunk_size=chunk_size, backend=backend)
    return _gsa("chunk_abc", options, q, k, v, s, None, initial_state, cu_seqlens)


@checked
def fused_recurrent_abc(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    initial_state: State | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """ABC token by token."""
    options = Options(scale, output_final_state, backend=backend)
    return _gsa("fused_recurrent_abc", options, q, k, v, s, None, initial_state, cu_seqlens)


CASES = [
    OpCase(
        "abc",
        "ABC",
        "arXiv:2110.02488",
        "a decay per channel",
        chunk_abc,
        fused_recurrent_abc,
        naive_recurrent_abc,
        dict(q="B T HV K", k="B T H K", v="B T H V", s="B T H M"),
        state=dict(initial_state=("N H K M", "N H M V", "N H M")),
    ),
]
