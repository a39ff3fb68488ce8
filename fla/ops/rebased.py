# SPDX-License-Identifier: MIT
r"""# ReBased: linear attention with squared scores

Aksenov et al. (2024), *Linear Transformers with Learnable Kernel Functions are Better In-Context
Models*, arXiv:2402.10644.

    o_t = sum_{j <= t} (scale * q_t . k_j)^2 v_j / (sum_{j <= t} (scale * q_t . k_j)^2 + eps)

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]`, after the layer's learnt affine map |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| S_0, S_T | `initial_state`, result | `[N, HV, K (K + 1) / 2, V + 1]` fp32; last column: divisor |

`use_scale` sets scale to K^-0.5, else it is 1; `use_normalize=False` leaves the division out.
`parallel_rebased` returns o, or with `return_both` the undivided o and the divisor `[B, T, HV]`.

Numerics: eps keeps a token without any score from dividing by 0.

On the one equation: `(q . k)^2 = phi(q) . phi(k)`, so linear attention: S_t = S_{t-1} + phi(k_t)
[v_t, 1]^T.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_groups, check_same, check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.based import pairs, polynomial_attention
from fla.ops.case import QKV, OpCase, literal
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal("q", "k")
def naive_recurrent_rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Token by token, on the features written out."""
    B, T, H, K = q.shape
    queries, keys = pairs(q * (K**-0.5 if use_scale else 1.0)), pairs(k)
    shape = (B, H, keys.shape[-1], v.shape[-1] + 1)
    S = q.new_zeros(shape) if initial_state is None else initial_state
    out = []
    for t in range(T):
        write = torch.cat([v[:, t], torch.ones_like(v[:, t, :, :1])], -1)
        S = S + torch.einsum("bhf,bhv->bhfv", keys[:, t], write)
        o = torch.einsum("bhfv,bhf->bhv", S, queries[:, t])
        out.append(o[..., :-1] / (o[..., -1:] + eps) if use_normalize else o[..., :-1])
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_parallel_rebased(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, use_norm: bool = True
) -> Tensor:
    """The definition, as one masked matrix."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * scale
    scores = scores.square().tril()
    o = torch.einsum("bhij,bjhv->bihv", scores, v)
    return o / (scores.sum(-1).mT.unsqueeze(-1) + 1e-5) if use_norm else o


def _rebased(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float,
    use_normalize: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    check_tensors(op, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"))
    check_same(op, q=q, k=k, v=v)
    scale = 1.0 if options.scale is None else options.scale
    values = torch.cat([promote_to_fp32(v), promote_to_fp32(v).new_ones(*v.shape[:-1], 1)], -1)
    o, final = recurrence(
        op,
        options._replace(scale=1.0),
        Terms(pairs(promote_to_fp32(q) * scale), pairs(promote_to_fp32(k)), values),
        initial_state,
        cu_seqlens,
    )
    o = o[..., :-1] / (o[..., -1:] + eps) if use_normalize else o[..., :-1]
    return o.to(v.dtype), final


@checked
def chunk_rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """ReBased chunk by chunk, through its features.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 8).unbind()
        >>> chunk_rebased(q, k, v)[0].shape
        torch.Size([1, 100, 2, 8])
    """
    scale = max(q.shape[-1], 1) ** -0.5 if use_scale else 1.0
    options = Options(scale, output_final_state, chunk_size=chunk_size, backend=backend)
    return _rebased(
        "chunk_rebased", options, q, k, v, eps, use_normalize, initial_state, cu_seqlens
    )


@checked
def fused_recurrent_rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """ReBased token by token, through its features."""
    scale = max(q.shape[-1], 1) ** -0.5 if use_scale else 1.0
    options = Options(scale, output_final_state, backend=backend)
    return _rebased(
        "fused_recurrent_rebased", options, q, k, v, eps, use_normalize, initial_state, cu_seqlens
    )


@checked
def parallel_rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
    return_both: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ReBased as a masked matrix, a block of rows at a time."""
    op = "parallel_rebased"
    sizes = check_tensors(op, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"))
    check_groups(op, sizes)
    scale = sizes["K"] ** -0.5 if use_scale else 1.0
    both = polynomial_attention(torch.square, promote_to_fp32(q) * scale, k, v)
    o, z = both[..., :-1], both[..., -1]
    if return_both:
        return o.to(v.dtype), z
    return (o / (z.unsqueeze(-1) + eps) if use_normalize else o).to(v.dtype)


CASES = [
    OpCase(
        "rebased",
        "ReBased",
        "arXiv:2402.10644",
        "no decay",
        chunk_rebased,
        fused_recurrent_rebased,
        naive_recurrent_rebased,
        QKV,
        state=dict(initial_state="N HV P V+1"),
        fixed=dict(use_normalize=False),
    ),
]
