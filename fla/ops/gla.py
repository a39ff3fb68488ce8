# SPDX-License-Identifier: MIT
r"""# Gated linear attention: one decay per channel of the key

Yang et al. (2023), *Gated Linear Attention Transformers with Hardware-Efficient Training*,
arXiv:2312.06635. HGRN2 (k = 1 - exp(g)) and LightNet are this operator.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| g | `g`, recurrent `gk` | `[B, T, HV, K]`, natural log of the decay, any value <= 0 and -inf |
| – | recurrent `gv` | `[B, T, HV, V]`, log decay of the state's columns |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 (`[N, HV, V, K]` with `state_v_first`) |

Numerics: within a chunk decays meet as products over a binary tree of blocks, every factor in
[0, 1]; nothing is divided or subtracted, so any decay is exact to rounding.

On the one equation: vector decay, no erase.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.ops.case import QKV, OpCase, linear, literal, renamed
from fla.ops.engine.recurrence.recurrence import Options, recurrence, state_layout
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal("q", "k")
def naive_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        S = gk[:, t, :, :, None].exp() * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        out.append(K**-0.5 * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(out, 1), S if output_final_state else None


@checked
def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """GLA chunk by chunk. `transpose_state_layout` is the former name of `state_v_first`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> o, state = chunk_gla(q, k, v, g=-torch.rand(1, 100, 2, 16), output_final_state=True)
        >>> state.shape
        torch.Size([1, 2, 16, 16])
    """
    op = "chunk_gla"
    options = Options(
        scale,
        output_final_state,
        state_v_first=state_layout(op, state_v_first, transpose_state_layout),
        chunk_size=chunk_size,
        backend=backend,
    )
    return recurrence(
        op,
        options,
        Terms(q, k, v, gk=g),
        initial_state,
        cu_seqlens,
        cu_seqlens_cpu,
        names={"gk": "g"},
    )


fused_chunk_gla = chunk_gla


@checked
def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """GLA token by token, with decays on the rows and the columns of the state.
    `transpose_state_layout` is the former name of `state_v_first`.
    """
    op = "fused_recurrent_gla"
    v_first = state_layout(op, state_v_first, transpose_state_layout)
    options = Options(
        scale, output_final_state, state_v_first=v_first, reverse=reverse, backend=backend
    )
    return recurrence(op, options, Terms(q, k, v, gk=gk, gv=gv), initial_state, cu_seqlens)


CASES = [
    OpCase(
        "gla",
        "Gated linear attention",
        "arXiv:2312.06635",
        "a decay per channel",
        chunk_gla,
        renamed(fused_recurrent_gla, g="gk"),
        renamed(naive_recurrent_gla, g="gk"),
        QKV | dict(g="B T HV K decay"),
        lambda x: linear(x) | {"g": x["g"]},
    ),
]
