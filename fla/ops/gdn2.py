# SPDX-License-Identifier: MIT
r"""# Gated DeltaNet 2: separate gates for what is erased and what is written

Hatamizadeh, Choi, Kautz (2026), *Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention*,
arXiv:2605.22791: the gated delta rule with a decay per channel, as in KDA (arXiv:2510.26692), and a
gate per channel on either side of the delta.

    S'_t = diag(exp(g_t)) S_{t-1}
    S_t = S'_t + k_t (w_t * v_t - S'_t^T (b_t * k_t))^T        o_t = scale * S_t^T q_t

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]`; `|k| <= 1` is on you, or on `use_qk_l2norm_in_kernel` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| g | `g` | `[B, T, HV, K]`, natural log of the decay, any value <= 0 including -inf |
| b | `b` | `[B, T, HV, K]` in [0, 1] or [0, 2]: what is erased |
| w | `w` | `[B, T, HV, V]`: what is written |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 (`[N, HV, V, K]` with `state_v_first`) |

`b = w = beta` is KDA. In-kernel gates of g as there. Numerics: as `kda`.

On the one equation: vector decay, a = -k, b = exp(g) b k, written k and w v.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_groups, check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.case import QKV, Inputs, OpCase, literal
from fla.ops.cp.context import FLACPContext, on_ranks
from fla.ops.engine.recurrence.equation import chunk_form
from fla.ops.engine.recurrence.gates import channel_gate, l2norm
from fla.ops.engine.recurrence.recurrence import (
    Options,
    check_row_dtypes,
    recurrence,
    recurrence_with_states,
    state_layout,
)
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal("q", "k")
def naive_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        S = g[:, t, :, :, None].exp() * S
        erased = torch.einsum("bhkv,bhk->bhv", S, b[:, t] * k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], w[:, t] * v[:, t] - erased)
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence's chunk form, differentiable by autograd."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, S = chunk_form(
        q, k, w * v, g, -k, g.exp() * b * k,
        scale=scale, state=initial_state, chunk_size=chunk_size,
    )  # fmt: skip
    return o, S if output_final_state else None


def _gdn2(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    normalize: bool,
    run: Callable[..., Any] = recurrence,
    **sequences: Any,
) -> Any:
    sizes = check_tensors(
        op,
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T HV V"),
        g=(g, "B T HV K"),
        b=(b, "B T HV K"),
        w=(w, "B T HV V"),
    )
    check_groups(op, sizes)
    check_row_dtypes(op, q=q, k=k, v=v)
    if normalize:
        q, k = l2norm(q), l2norm(k)
    keys = promote_to_fp32(k.repeat_interleave(sizes["HV"] // sizes["H"], 2))
    erase = promote_to_fp32(g).exp() * promote_to_fp32(b) * keys
    ones = promote_to_fp32(v).new_ones(v.shape[:3])
    written = (promote_to_fp32(w) * promote_to_fp32(v)).to(
        torch.promote_types(torch.promote_types(v.dtype, w.dtype), q.dtype)
    )
    o, *states = run(
        op, options, Terms(q, k, written, gk=g, beta=ones, b=erase), names={"gk": "g"}, **sequences
    )
    return o.to(v.dtype), *states


@checked
def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: FLACPContext | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """GDN-2 chunk by chunk.

    With `return_intermediate_states`, where no gradient is recorded, a third value holds the states
    before every chunk, `[B, NT, HV, K, V]` fp32 (packed: the chunks of each sequence in turn).
    `disable_recompute` is about the memory of published kernels and changes nothing here.
    `transpose_state_layout` is the former name of `state_v_first`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> b, w = torch.rand(2, 1, 100, 2, 16).unbind()
        >>> g = -torch.rand(1, 100, 2, 16)
        >>> chunk_gdn2(q, k, v, g, b, w, use_qk_l2norm_in_kernel=True)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    if cp_context is not None:
        return on_ranks(chunk_gdn2, locals())
    op = "chunk_gdn2"
    options = Options(
        scale,
        output_final_state,
        state_v_first=state_layout(op, state_v_first, transpose_state_layout),
        chunk_size=chunk_size,
        backend=backend,
    )
    check_tensors(op, g=(g, "B T HV K"))
    g = channel_gate(op, g, A_log, dt_bias, use_gate_in_kernel, safe_gate, lower_bound)
    return _gdn2(
        op,
        options,
        q,
        k,
        v,
        g,
        b,
        w,
        use_qk_l2norm_in_kernel,
        recurrence_with_states if return_intermediate_states else recurrence,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )


@checked
def fused_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """GDN-2 token by token. Differentiable. `transpose_state_layout` is the former name of
    `state_v_first`.
    """
    op = "fused_recurrent_gdn2"
    v_first = state_layout(op, state_v_first, transpose_state_layout)
    options = Options(scale, output_final_state, state_v_first=v_first, backend=backend)
    check_tensors(op, g=(g, "B T HV K"))
    g = channel_gate(op, g, A_log, dt_bias, use_gate_in_kernel, False, lower_bound)
    return _gdn2(
        op,
        options,
        q,
        k,
        v,
        g,
        b,
        w,
        use_qk_l2norm_in_kernel,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _point(x: Inputs) -> dict[str, Any]:
    b = x["g"].exp() * x["b"] * x["k"]
    return dict(q=x["q"], k=x["k"], v=x["w"] * x["v"], g=x["g"], a=-x["k"], b=b)


CASES = [
    OpCase(
        "gdn2",
        "Gated DeltaNet 2",
        "arXiv:2605.22791",
        "delta rules",
        chunk_gdn2,
        fused_recurrent_gdn2,
        naive_recurrent_gdn2,
        QKV | dict(g="B T HV K decay", b="B T HV K rate", w="B T HV V rate"),
        _point,
    ),
]
