# SPDX-License-Identifier: MIT
r"""# The generalised delta rule: diagonal (DPLR) or identity (IPLR) plus low rank

The transition of RWKV-7, Peng et al. (2025), arXiv:2503.14456; its chunk form follows the delta
rule's, Yang et al. (2024), arXiv:2406.06484.

    S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        o_t = scale * S_t^T q_t

IPLR has no g. Note the names: a reads, before the decay, and b writes.

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| a, b | `a`, `b` | `[B, T, HV, K]`; the state stays bounded where `a b^T` shrinks it |
| g | `gk` | `[B, T, HV, K]`, natural log of the decay, any value <= 0 including -inf |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 |

Numerics: decay as `gla`; one triangular system per chunk, solved by substitution in fp32.

On the one equation: vector decay or none, low-rank erase; the equation's a is `b` here, its b `a`.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.ops.case import QKV, OpCase, linear, literal
from fla.ops.cp.context import FLACPContext, on_ranks
from fla.ops.engine.recurrence.equation import chunk_form
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms

Result = tuple[Tensor, Tensor | None]


@literal("q", "k")
def naive_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Result:
    """The equation, token by token."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        read = torch.einsum("bhkv,bhk->bhv", S, a[:, t])
        S = gk[:, t, :, :, None].exp() * S + torch.einsum("bhk,bhv->bhkv", b[:, t], read)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), S if output_final_state else None


@literal("q", "k")
def naive_recurrent_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Result:
    """The equation without decay, token by token."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        read = torch.einsum("bhkv,bhk->bhv", S, a[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", b[:, t], read)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), S if output_final_state else None


@checked
def dplr_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gk: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> Result:
    """The DPLR loop on head-first tensors `[B, H, T, D]`."""
    q, k, v, alpha, beta, gk = (x.transpose(1, 2) for x in (q, k, v, alpha, beta, gk))
    o, S = naive_recurrent_dplr_delta_rule(
        q, k, v, alpha, beta, gk, None, initial_state, output_final_state
    )
    return o.transpose(1, 2), S


@checked
def dplr_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gk: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    chunk_size: int = 32,
) -> Result:
    """The recurrence's chunk form on head-first tensors `[B, H, T, D]`."""
    q, k, v, alpha, beta, gk = (x.transpose(1, 2) for x in (q, k, v, alpha, beta, gk))
    scale = q.shape[-1] ** -0.5
    o, S = chunk_form(
        q, k, v, gk, beta, alpha, scale=scale, state=initial_state, chunk_size=chunk_size
    )
    return o.transpose(1, 2), S if output_final_state else None


@checked
def iplr_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> Result:
    """The IPLR loop on head-first tensors `[B, H, T, D]`."""
    gk = torch.zeros_like(k)
    return dplr_recurrence(q, k, v, alpha, beta, gk, initial_state, output_final_state)


@checked
def iplr_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    chunk_size: int = 32,
) -> Result:
    """The recurrence's chunk form without decay on head-first tensors `[B, H, T, D]`."""
    gk = torch.zeros_like(k)
    return dplr_chunkwise(q, k, v, alpha, beta, gk, initial_state, output_final_state, chunk_size)


def _low_rank(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor | None,
    names: dict[str, str] | None = None,
    **sequences: Any,
) -> Result:
    names = {"a": "b", "b": "a"} | (names or {})
    return recurrence(op, options, Terms(q, k, v, gk=gk, a=b, b=a), names=names, **sequences)


def check_bounds(
    op: str,
    safe_gate: bool,
    lower_bound: float | None,
) -> None:
    """Raise `ValueError` for switches of the kernels that have no meaning here."""
    if lower_bound is not None and not safe_gate:
        raise ValueError(
            f"{op}: lower_bound belongs to safe_gate=True, which promises decays above it; set it "
            "or drop the bound (any decay is safe here)"
        )


@checked
def chunk_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: FLACPContext | None = None,
    lower_bound: float | None = None,
    backend: str | None = None,
) -> Result:
    """DPLR chunk by chunk. `safe_gate` with its `lower_bound` promises bounded decays; any decay is
    safe here, so the promise changes nothing. Nor does `disable_recompute`, which is about the
    memory of published kernels.

    Example:
        >>> q, k, v, a = torch.randn(4, 1, 100, 2, 16).unbind()
        >>> a = torch.nn.functional.normalize(a, dim=-1)
        >>> o, _ = chunk_dplr_delta_rule(q, k, v, a, -a, gk=-torch.rand(1, 100, 2, 16))
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    if cp_context is not None:
        return on_ranks(chunk_dplr_delta_rule, locals())
    op = "chunk_dplr_delta_rule"
    check_bounds(op, safe_gate, lower_bound)
    options = Options(
        scale, output_final_state, chunk_size=chunk_size or CHUNK_SIZE, backend=backend
    )
    sequences: dict[str, Any] = dict(
        initial_state=initial_state, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu
    )
    return _low_rank(op, options, q, k, v, a, b, gk, **sequences)


@checked
def fused_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """DPLR token by token; `reverse` runs from the last token to the first. Differentiable."""
    options = Options(scale, output_final_state, reverse=reverse, backend=backend)
    sequences: dict[str, Any] = dict(initial_state=initial_state, cu_seqlens=cu_seqlens)
    return _low_rank("fused_recurrent_dplr_delta_rule", options, q, k, v, a, b, gk, **sequences)


@checked
def chunk_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> Result:
    """IPLR chunk by chunk. Differentiable.

    Example:
        >>> q, k, v, a = torch.randn(4, 1, 100, 2, 16).unbind()
        >>> a = torch.nn.functional.normalize(a, dim=-1)
        >>> chunk_iplr_delta_rule(q, k, v, a, -a)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    options = Options(scale, output_final_state, chunk_size=chunk_size, backend=backend)
    sequences: dict[str, Any] = dict(
        initial_state=initial_state, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu
    )
    return _low_rank("chunk_iplr_delta_rule", options, q, k, v, a, b, None, **sequences)


@checked
def fused_recurrent_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """IPLR token by token."""
    options = Options(scale, output_final_state, backend=backend)
    sequences: dict[str, Any] = dict(initial_state=initial_state, cu_seqlens=cu_seqlens)
    return _low_rank("fused_recurrent_iplr_delta_rule", options, q, k, v, a, b, None, **sequences)


CASES = [
    OpCase(
        "generalized_delta_rule",
        "Generalised delta rule (DPLR)",
        "arXiv:2503.14456",
        "low-rank transitions",
        chunk_dplr_delta_rule,
        fused_recurrent_dplr_delta_rule,
        naive_recurrent_dplr_delta_rule,
        QKV | dict(a="B T HV K unit", b="B T HV K unit", gk="B T HV K decay"),
        lambda x: linear(x) | dict(g=x["gk"], a=x["b"], b=x["a"]),
    ),
    OpCase(
        "generalized_delta_rule",
        "Generalised delta rule (IPLR)",
        "arXiv:2503.14456",
        "low-rank transitions",
        chunk_iplr_delta_rule,
        fused_recurrent_iplr_delta_rule,
        naive_recurrent_iplr_delta_rule,
        QKV | dict(a="B T HV K unit", b="B T HV K small"),
        lambda x: linear(x) | dict(a=x["b"], b=x["a"]),
    ),
]
