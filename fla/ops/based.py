# SPDX-License-Identifier: MIT
r"""# Based: linear attention with the Taylor series of the exponential

Arora et al. (2024), *Simple linear attention language models balance the recall-throughput
tradeoff*, arXiv:2402.18668.

    o_t = sum_{j <= t} f(scale * q_t . k_j) v_j / sum_{j <= t} f(scale * q_t . k_j)
    f(x) = 1 + x + x^2 / 2

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]`; f takes 1 + K + K (K + 1) / 2 features, so K <= 16 is usual |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| S_0, S_T | `initial_state`, result | `[N, HV, F, V + 1]` fp32; the last column is the divisor |

`use_norm=False` leaves the division out. `parallel_based` multiplies the scores out in blocks of
rows, `fused_chunk_based` goes through the features; both return o alone.

Numerics: f(x) > 0 for every x, so the divisor is never 0.

On the one equation: `f(q . k) = phi(q) . phi(k)`, so linear attention: S_t = S_{t-1} + phi(k_t)
[v_t, 1]^T.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core import operator
from fla.core.checks import check_groups, check_same, check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.case import QKV, OpCase, literal
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms

BLOCK = 512


def taylor(x: Tensor) -> Tensor:
    """`1 + x + x^2 / 2`."""
    return 1 + x + x.square() / 2


def pairs(x: Tensor) -> Tensor:
    """`x_i x_j` for i <= j, those with i < j times sqrt(2): `pairs(x) . pairs(y) = (x . y)^2`."""
    K = x.shape[-1]
    i, j = torch.triu_indices(K, K, device=x.device)
    weight = x.new_full(i.shape, math.sqrt(2)).masked_fill(i == j, 1.0)
    return x[..., i] * x[..., j] * weight


def taylor_features(x: Tensor) -> Tensor:
    """phi with `phi(q) . phi(k) = f(q . k)`."""
    ones = x.new_ones(*x.shape[:-1], 1)
    return torch.cat([ones, x, pairs(x) * math.sqrt(0.5)], -1)


@literal("q", "k")
def naive_recurrent_based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Token by token, on the features written out."""
    B, T, H, K = q.shape
    queries, keys = taylor_features(q * (K**-0.5 if scale is None else scale)), taylor_features(k)
    F, V = keys.shape[-1], v.shape[-1]
    S = q.new_zeros(B, H, F, V + 1) if initial_state is None else initial_state
    out = []
    for t in range(T):
        write = torch.cat([v[:, t], torch.ones_like(v[:, t, :, :1])], -1)
        S = S + torch.einsum("bhf,bhv->bhfv", keys[:, t], write)
        o = torch.einsum("bhfv,bhf->bhv", S, queries[:, t])
        out.append(o[..., :-1] / o[..., -1:] if use_norm else o[..., :-1])
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_parallel_based(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, use_norm: bool = True
) -> Tensor:
    """The definition, as one masked matrix."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * scale
    scores = taylor(scores).tril()
    o = torch.einsum("bhij,bjhv->bihv", scores, v)
    return o / scores.sum(-1).mT.unsqueeze(-1) if use_norm else o


def polynomial_attention(f: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sum_{j <= t} f(q_t . k_j) [v_j, 1]` in fp32 or wider, a block of rows at a time; the scores
    of a block are formed again in the backward.
    """
    q, k, v = (promote_to_fp32(x).transpose(1, 2) for x in (q, k, v))
    groups = v.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (q, k))
    v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return f(q @ k.mT).tril(k.shape[2] - q.shape[2]) @ v

    out = []
    for begin in range(0, q.shape[2], BLOCK):
        end = min(begin + BLOCK, q.shape[2])
        args = (q[:, :, begin:end], k[:, :, :end], v[:, :, :end])
        out.append(operator.recomputed(rows, *args))
    return torch.cat(out, 2).transpose(1, 2) if out else v.transpose(1, 2)


def _divided(o: Tensor, use_norm: bool, dtype: torch.dtype) -> Tensor:
    return (o[..., :-1] / o[..., -1:] if use_norm else o[..., :-1]).to(dtype)


def _based(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    use_norm: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    sizes = check_tensors(op, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"))
    check_same(op, q=q, k=k, v=v)
    scale = sizes["K"] ** -0.5 if options.scale is None else options.scale
    values = torch.cat([promote_to_fp32(v), promote_to_fp32(v).new_ones(*v.shape[:-1], 1)], -1)
    o, final = recurrence(
        op,
        options._replace(scale=1.0),
        Terms(
            taylor_features(promote_to_fp32(q) * scale), taylor_features(promote_to_fp32(k)), values
        ),
        initial_state,
        cu_seqlens,
    )
    return _divided(o, use_norm, v.dtype), final


@checked
def chunk_based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Based chunk by chunk, through its features.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 8).unbind()
        >>> chunk_based(q, k, v)[0].shape
        torch.Size([1, 100, 2, 8])
    """
    options = Options(scale, output_final_state, chunk_size=chunk_size, backend=backend)
    return _based("chunk_based", options, q, k, v, use_norm, initial_state, cu_seqlens)


@checked
def fused_chunk_based(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, use_norm: bool = True
) -> Tensor:
    """The output of `chunk_based` alone."""
    return chunk_based(q, k, v, scale, use_norm)[0]


@checked
def fused_recurrent_based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Based token by token, through its features."""
    options = Options(scale, output_final_state, backend=backend)
    return _based("fused_recurrent_based", options, q, k, v, use_norm, initial_state, cu_seqlens)


@checked
def parallel_based(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, use_norm: bool = True
) -> Tensor:
    """Based as a masked matrix, a block of rows at a time: for a K whose features are too many."""
    op = "parallel_based"
    sizes = check_tensors(op, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"))
    check_groups(op, sizes)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    return _divided(
        polynomial_attention(taylor, promote_to_fp32(q) * scale, k, v), use_norm, v.dtype
    )


CASES = [
    OpCase(
        "based",
        "Based",
        "arXiv:2402.18668",
        "no decay",
        chunk_based,
        fused_recurrent_based,
        naive_recurrent_based,
        QKV,
        state=dict(initial_state="N HV F V+1 positive"),
    ),
]
