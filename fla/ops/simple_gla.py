# SPDX-License-Identifier: MIT
r"""# Simple gated linear attention: one decay per head and token

Yang et al. (2023), *Gated Linear Attention Transformers*, arXiv:2312.06635, with a scalar gate;
also the recurrence of RetNet (constant decay) and of Mamba-2 (arXiv:2405.21060).

    S_t = exp(g_t + gamma) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| g | `g` | `[B, T, HV]`, natural log of the decay, any value <= 0 including -inf |
| gamma | `g_gamma` | `[HV]`, a constant log decay per head |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 (`[N, HV, V, K]` with `state_v_first`) |

Numerics: cumulative decays are summed in fp64 and subtracted before the exponential, so nothing
overflows and a reset (-inf) leaves no trace.

On the one equation: scalar decay, no erase.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.boundaries import boundaries_to_list
from fla.ops.case import QKV, OpCase, linear, literal
from fla.ops.engine.recurrence.equation import LOG_ZERO
from fla.ops.engine.recurrence.recurrence import Options, recurrence, state_layout
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal("q", "k")
def naive_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        S = g[:, t, :, None, None].exp() * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        out.append(
            (K**-0.5 if scale is None else scale) * torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        )
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_parallel_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The whole matrix at once: `A_ij = scale q_i . k_j exp(G_i - G_j)` for i >= j, `o = A v`.
    Returns (o, A [B, H, T, T]).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    A = torch.einsum("bihk,bjhk->bhij", q, k) * scale
    if g is not None:
        G = g.mT.double().clamp(min=LOG_ZERO).cumsum(-1)
        above = torch.ones_like(A, dtype=torch.bool).triu(1)
        A = A * (G[..., :, None] - G[..., None, :]).masked_fill(above, -torch.inf).exp().to(A.dtype)
    A = A.tril()
    return torch.einsum("bhij,bjhv->bihv", A, v), A


@checked
def naive_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Chunk by chunk from the parallel form: each chunk reads and extends the state."""
    B, T, H, K = q.shape
    scale = K**-0.5 if scale is None else scale
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for part in torch.arange(T).split(chunk_size):
        q_c, k_c, v_c, g_c = (x[:, part] for x in (q, k, v, g))
        enter, leave = (
            g_c.cumsum(1).exp()[..., None],
            (g_c.flip(1).cumsum(1).flip(1) - g_c).exp()[..., None],
        )
        o, _ = naive_parallel_simple_gla(q_c, k_c, v_c, g_c, scale)
        out.append(o + scale * torch.einsum("bthk,bhkv->bthv", q_c * enter, S))
        S = enter[:, -1, :, None] * S + torch.einsum("bthk,bthv->bhkv", k_c * leave, v_c)
    return torch.cat(out, 1), S if output_final_state else None


def _decay(op: str, v: Tensor, g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    if g_gamma is None:
        return g
    if g_gamma.shape != v.shape[2:3]:
        raise ValueError(
            f"{op}: g_gamma has shape {list(g_gamma.shape)}; one log decay per head "
            f"[{v.shape[2]}] was expected"
        )
    return g_gamma.expand(v.shape[:3]) if g is None else g + g_gamma


@checked
def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
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
    """Simple GLA chunk by chunk. `transpose_state_layout` is the former name of `state_v_first`.

    Example:
        >>> q, k, v = torch.rand(3, 1, 100, 2, 16).unbind()
        >>> o, state = chunk_simple_gla(q, k, v, g=-torch.rand(1, 100, 2), output_final_state=True)
        >>> state.shape
        torch.Size([1, 2, 16, 16])
    """
    op = "chunk_simple_gla"
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
        Terms(q, k, v, g=_decay(op, v, g, g_gamma)),
        initial_state,
        cu_seqlens,
        cu_seqlens_cpu,
    )


@checked
def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` under the name of its fused kernel."""
    return chunk_simple_gla(
        q,
        k,
        v,
        g,
        g_gamma,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


@checked
def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Simple GLA token by token; `reverse` runs from the last token to the first.
    `transpose_state_layout` is the former name of `state_v_first`.
    """
    op = "fused_recurrent_simple_gla"
    v_first = state_layout(op, state_v_first, transpose_state_layout)
    options = Options(
        scale, output_final_state, state_v_first=v_first, reverse=reverse, backend=backend
    )
    return recurrence(
        op, options, Terms(q, k, v, g=_decay(op, v, g, g_gamma)), initial_state, cu_seqlens
    )


@checked
def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Simple GLA with its attention matrix `[B, H, T, T]`, returned where `output_attentions`;
    without, the chunk form runs.
    """
    o, _ = chunk_simple_gla(
        q,
        k,
        v,
        g,
        scale=scale,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        backend=backend,
    )
    if not output_attentions:
        return o, None
    groups = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    _, attention = naive_parallel_simple_gla(q, k, v, g, scale)
    if cu_seqlens is not None:
        lengths = torch.tensor(boundaries_to_list(cu_seqlens, q.shape[1])).diff()
        owner = torch.arange(len(lengths)).repeat_interleave(lengths).to(q.device)
        attention = attention * (owner[:, None] == owner)
    return o, attention


CASES = [
    OpCase(
        "simple_gla",
        "Simple GLA",
        "arXiv:2312.06635",
        "a decay per head or token",
        chunk_simple_gla,
        fused_recurrent_simple_gla,
        naive_recurrent_simple_gla,
        QKV | dict(g="B T HV decay"),
        lambda x: linear(x) | {"g": x["g"][..., None]},
    ),
]
