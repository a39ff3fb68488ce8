# SPDX-License-Identifier: MIT
r"""# Comba: a delta rule with a feedback key of its own

Hu et al. (2025), *Comba: Improving Bilinear RNNs with Closed-loop Control*, arXiv:2506.02475.

    u_t = beta_t (v_t - S_{t-1}^T p_t)
    S_t = exp(g_t) S_{t-1} + k_t u_t^T        o_t = scale * S_t^T q_t

The feedback reads the state *before* its decay. Published code disagrees with itself here (its
recurrent reference reads the decayed state); this page follows the paper's and the chunk form.

| symbol | argument | shape |
|---|---|---|
| q, k, p | `q`, `k`, `p` | `[B, T, H, K]`; the paper's p is k times a rate in [0, 1] |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| g | `g` | `[B, T, HV]`, natural log of the decay, any value <= 0 including -inf |
| beta | `beta` | `[B, T, HV]` in [0, 1]; 1 if absent |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 |

`use_qk_l2norm_in_kernel` normalises p as well as q and k, as published: a rate inside p is lost to
it, so normalise k yourself before forming p. Note the order: chunk takes v, p; recurrent p, v.

Numerics: as `gated_delta_rule`.

On the one equation: scalar decay, a = -beta k, b = p, written k and beta v.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_groups, check_tensors
from fla.ops.case import QKV, Inputs, OpCase, delta, literal
from fla.ops.engine.recurrence.equation import chunk_form
from fla.ops.engine.recurrence.gates import l2norm
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal("q", "k", "p")
def naive_recurrent_comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token. Note the order beta, g."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, p[:, t]))
        S = g[:, t, :, None, None].exp() * S + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_chunk_comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence's chunk form, differentiable by autograd. Note the order g, beta."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g, beta = g[..., None], beta[..., None]
    o, S = chunk_form(
        q, k, beta * v, g, -beta * k, p,
        scale=scale, state=initial_state, chunk_size=chunk_size,
    )  # fmt: skip
    return o, S if output_final_state else None


def _comba(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor | None,
    normalize: bool,
    **sequences: Any,
) -> tuple[Tensor, Tensor | None]:
    sizes = check_tensors(
        op,
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T HV V"),
        p=(p, "B T H K"),
        g=(g, "B T HV"),
        beta=(beta, "B T HV"),
    )
    check_groups(op, sizes)
    if normalize:
        q, k, p = l2norm(q), l2norm(k), l2norm(p)
    if sizes["HV"] > sizes["H"]:
        p = p.repeat_interleave(sizes["HV"] // sizes["H"], 2)
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    return recurrence(
        op, options, Terms(q, k, v, g=g, beta=beta, b=p), names={"b": "p"}, **sequences
    )


@checked
def chunk_comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Comba chunk by chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> k = torch.nn.functional.normalize(k, dim=-1)
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 100, 2)
        >>> chunk_comba(q, k, v, 0.5 * k, g, beta)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    options = Options(scale, output_final_state, chunk_size=chunk_size, backend=backend)
    return _comba(
        "chunk_comba",
        options,
        q,
        k,
        v,
        p,
        g,
        beta,
        use_qk_l2norm_in_kernel,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )


@checked
def fused_recurrent_comba(
    q: Tensor,
    k: Tensor,
    p: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Comba token by token. Note the order p, v. Differentiable."""
    options = Options(scale, output_final_state, backend=backend)
    return _comba(
        "fused_recurrent_comba",
        options,
        q,
        k,
        v,
        p,
        g,
        beta,
        use_qk_l2norm_in_kernel,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _point(x: Inputs) -> dict[str, Any]:
    return {**delta(x), "g": x["g"][..., None], "b": x["p"]}


CASES = [
    OpCase(
        "comba",
        "Comba",
        "arXiv:2506.02475",
        "delta rules",
        chunk_comba,
        fused_recurrent_comba,
        naive_recurrent_comba,
        QKV | dict(p="B T H K unit", g="B T HV decay", beta="B T HV rate"),
        _point,
    ),
]
