# SPDX-License-Identifier: MIT
r"""# The gated Oja rule: a delta rule on the side of the values

Oja (1982), *A simplified neuron model as a principal component analyzer*, with a decay per value
channel; as a fast-weight rule: Irie, Faccio, Schmidhuber (2022), arXiv:2206.01649.

    S'_t = S_{t-1} diag(exp(g_t))
    S_t = S'_t + beta_t (k_t - S'_t v_t) v_t^T        o_t = scale * S_t^T q_t

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, H, V]`; `|v| <= 1` is on you |
| g | `gv` | `[B, T, H, V]`, natural log of the decay, any value <= 0 including -inf |
| beta | `beta` | `[B, T, H]` in [0, 2] |
| S_0, S_T | `initial_state`, result | `[N, H, K, V]` fp32 |

`use_q_l2norm` and `use_k_l2norm` normalise q and k first. Absent gv is 0, absent beta is 1.

Numerics: as `kda`, whose solve runs over the values here.

On the one equation: transpose the state. M = S^T is KDA with keys v and values k; its reads give
`u_t = beta_t (k_t - M'_t^T v_t)`. What is read of S by q is then linear attention that writes u and
v under a decay of the state's columns.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.case import OpCase, literal
from fla.ops.engine.recurrence.gates import l2norm
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal()
def naive_recurrent_gated_oja_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gv: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        S = S * gv[:, t, :, None].exp()
        error = k[:, t] - torch.einsum("bhkv,bhv->bhk", S, v[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * error, v[:, t])
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), S if output_final_state else None


def _oja(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gv: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    norms: tuple[bool, bool],
    **sequences: Any,
) -> tuple[Tensor, Tensor | None]:
    check_tensors(
        op,
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        gv=(gv, "B T H V"),
        beta=(beta, "B T H"),
        initial_state=(initial_state, "N H K V"),
    )
    q, k = (l2norm(x) if norm else x for x, norm in zip((q, k), norms, strict=True))
    gv = torch.zeros_like(promote_to_fp32(v)) if gv is None else gv
    beta = promote_to_fp32(v).new_ones(v.shape[:3]) if beta is None else beta
    state = None if initial_state is None else initial_state.mT
    keys = (promote_to_fp32(v) * promote_to_fp32(gv).exp()).to(v.dtype)
    read, final = recurrence(
        op,
        options._replace(scale=1.0, read_before=True),
        Terms(keys, v, k, gk=gv, beta=beta),
        initial_state=state,
        names={"gk": "gv"},
        **sequences,
    )
    u = (promote_to_fp32(beta).unsqueeze(-1) * (promote_to_fp32(k) - promote_to_fp32(read))).to(
        k.dtype
    )
    o, _ = recurrence(
        op,
        options._replace(output_final_state=False),
        Terms(q, u, v, gv=gv),
        initial_state=initial_state,
        **sequences,
    )
    return o, None if final is None else final.mT.contiguous()


@checked
def chunk_gated_oja_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gv: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_q_l2norm: bool = False,
    use_k_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated Oja rule chunk by chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> v, gv = torch.nn.functional.normalize(v, dim=-1), -torch.rand(1, 100, 2, 16)
        >>> chunk_gated_oja_rule(q, k, v, gv, torch.rand(1, 100, 2))[0].shape
        torch.Size([1, 100, 2, 16])
    """
    options = Options(scale, output_final_state, chunk_size=chunk_size, backend=backend)
    return _oja(
        "chunk_gated_oja_rule",
        options,
        q,
        k,
        v,
        gv,
        beta,
        initial_state,
        (use_q_l2norm, use_k_l2norm),
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )


@checked
def fused_recurrent_gated_oja_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_q_l2norm: bool = False,
    use_k_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated Oja rule token by token. Differentiable."""
    options = Options(scale, output_final_state, backend=backend)
    return _oja(
        "fused_recurrent_gated_oja_rule",
        options,
        q,
        k,
        v,
        gv,
        beta,
        initial_state,
        (use_q_l2norm, use_k_l2norm),
        cu_seqlens=cu_seqlens,
    )


CASES = [
    OpCase(
        "gated_oja_rule",
        "Gated Oja rule",
        "arXiv:2206.01649",
        "delta rules",
        chunk_gated_oja_rule,
        fused_recurrent_gated_oja_rule,
        naive_recurrent_gated_oja_rule,
        dict(q="B T H K", k="B T H K", v="B T H V unit", gv="B T H V decay", beta="B T H beta"),
        state=dict(initial_state="N H K V"),
    ),
]
