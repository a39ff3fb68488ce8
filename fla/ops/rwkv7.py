# SPDX-License-Identifier: MIT
r"""# RWKV-7

Peng et al. (2025), *RWKV-7 "Goose" with Expressive Dynamic State Evolution*, arXiv:2503.14456.

    S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        o_t = scale * S_t^T r_t

with `a = -kk` and `b = kk * a'` for a unit vector kk and an in-context learning rate a' in [0, 1].

| symbol | argument | shape |
|---|---|---|
| r, k | `r`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, H, V]` |
| w | `w` | `[B, T, H, K]`, natural log of the decay, any value <= 0 including -inf |
| a, b | `a`, `b` | `[B, T, H, K]`; a reads, before the decay, and b writes |
| S_0, S_T | `initial_state`, result | `[N, H, K, V]` fp32 |

Numerics: as `generalized_delta_rule`.

On the one equation: vector decay, low-rank erase: DPLR under other names. `scale` is 1 in every
form unless given (`fused_recurrent_rwkv7` of other packages divides by sqrt(K) and always returns
its state; the family's contract holds here).

The elementwise maps of the RWKV-7 layer stand below the operator. They compute in fp32 or wider
and round once.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked, shaped
from fla.core.boundaries import boundaries_to_list
from fla.core.precision import promote_to_fp32
from fla.ops.case import OpCase
from fla.ops.cp.context import FLACPContext, on_ranks
from fla.ops.engine.recurrence.recurrence import Options
from fla.ops.engine.recurrence.terms import CHUNK_SIZE
from fla.ops.generalized_delta_rule import (
    Result,
    _low_rank,
    check_bounds,
    naive_recurrent_dplr_delta_rule,
)

NAMES = {"q": "r", "gk": "w"}


@shaped(
    r="B T H K", w="B T H K", k="B T H K", v="B T H V", a="B T H K", b="B T H K",
    initial_state="B H K V",
)  # fmt: skip
def naive_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Result:
    """The equation, token by token."""
    return naive_recurrent_dplr_delta_rule(
        r, k, v, a, b, w, scale, initial_state, output_final_state
    )


@checked
def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
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
    """RWKV-7 chunk by chunk; the switches of the kernels are as in `chunk_dplr_delta_rule`.

    Example:
        >>> r, k, v, kk = torch.randn(4, 1, 100, 2, 16).unbind()
        >>> kk = torch.nn.functional.normalize(kk, dim=-1)
        >>> w, rate = -torch.rand(1, 100, 2, 16), torch.rand(1, 100, 2, 16)
        >>> chunk_rwkv7(r, w, k, v, -kk, kk * rate)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    if cp_context is not None:
        return on_ranks(chunk_rwkv7, locals())
    op = "chunk_rwkv7"
    check_bounds(op, safe_gate, lower_bound)
    options = Options(
        scale, output_final_state, chunk_size=chunk_size or CHUNK_SIZE, backend=backend
    )
    sequences: dict[str, Any] = dict(
        initial_state=initial_state, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu
    )
    return _low_rank(op, options, r, k, v, a, b, w, NAMES, **sequences)


@checked
def fused_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Result:
    """RWKV-7 token by token; `reverse` runs from the last token to the first. Differentiable.

    As published, its defaults differ from the chunk form's: a scale of `K**-0.5`, and the final
    state comes back.
    """
    options = Options(scale, output_final_state, reverse=reverse, backend=backend)
    sequences: dict[str, Any] = dict(initial_state=initial_state, cu_seqlens=cu_seqlens)
    return _low_rank("fused_recurrent_rwkv7", options, r, k, v, a, b, w, NAMES, **sequences)


@checked
def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """`fused_recurrent_rwkv7` from the unit vector kk and the learning rate a: it reads with -kk
    and writes with kk a.
    """
    return fused_recurrent_rwkv7(
        r,
        w,
        k,
        v,
        -kk,
        kk * a,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        reverse,
        backend,
    )


@checked
def fused_addcmul_rwkv7(
    hidden_states: Tensor,
    delta: Tensor,
    xr: Tensor,
    xw: Tensor,
    xk: Tensor,
    xv: Tensor,
    xa: Tensor,
    xg: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """`hidden_states + delta * x` for each mix x `[1, 1, D]`: (xr, xw, xk, xv, xa, xg or None)."""
    mixes, dtype = (xr, xw, xk, xv, xa, xg), hidden_states.dtype
    base, wide = promote_to_fp32(hidden_states), promote_to_fp32(delta)
    return tuple(
        x if x is None else torch.addcmul(base, wide, promote_to_fp32(x)).to(dtype) for x in mixes
    )


torch_addcmul_rwkv7 = fused_addcmul_rwkv7


@checked
def fused_k_rwkv7(
    k: Tensor,
    a: Tensor,
    ka: Tensor,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Tensor:
    """`k (1 + (a - 1) ka)`, token by token, so boundaries are checked and change nothing."""
    for name, cu in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens_cpu)):
        if cu is not None:
            boundaries_to_list(cu, k.shape[1], f"fused_k_rwkv7 ({name})")
    wide = promote_to_fp32(k)
    return wide.addcmul(wide * (promote_to_fp32(a) - 1), promote_to_fp32(ka)).to(k.dtype)


k_update_ref = fused_k_rwkv7


@checked
def gate_output_correction(
    o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor
) -> Tensor:
    """`(o + (sum_k r k r_k) v) g`: o, g `[B, T, H V]`, r, k `[B, T, H, K]`, r_k `[H, K]`, v
    `[B, T, H, V]`.
    """
    dtype = o.dtype
    o, r, k, r_k, v, g = (promote_to_fp32(x) for x in (o, r, k, r_k, v, g))
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return ((o + bonus.flatten(-2)) * g).to(dtype)


gate_output_correction_ref = gate_output_correction


@checked
def channel_mixing_rwkv7(
    x: Tensor,
    x_prev: Tensor,
    x_k: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    inplace: bool = True,
) -> tuple[Tensor, Tensor]:
    """`relu(W_k (x_t + (x_{t-1} - x_t) x_k))^2 W_v` and the last token of every sequence, in the
    shape of x_prev.

    x `[B, T, D]`, x_prev `[B, D]` or `[B, 1, D]` the token before, key_weight `[D, F]`,
    value_weight `[F, D]`. `inplace` is about memory in published code and changes nothing.

    Example:
        >>> x, before = torch.randn(2, 5, 8), torch.zeros(2, 1, 8)
        >>> y, last = channel_mixing_rwkv7(x, before, torch.rand(8), torch.eye(8), torch.eye(8))
        >>> y.shape, last.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 1, 8]))
    """
    B, T, D = x.shape
    if x_prev.shape not in ((B, D), (B, 1, D)):
        raise ValueError(
            f"channel_mixing_rwkv7: x_prev has shape {list(x_prev.shape)}; {[B, D]} or "
            f"{[B, 1, D]} was expected"
        )
    if T == 0:
        return x, x_prev
    wide = promote_to_fp32(x)
    before = torch.cat([promote_to_fp32(x_prev).view(B, 1, D), wide[:, :-1]], 1)
    mixed = torch.addcmul(wide, before - wide, promote_to_fp32(x_k)).to(x.dtype)
    return (mixed @ key_weight).relu().square() @ value_weight, x[:, -1].view(x_prev.shape)


channel_mixing_rwkv7_torch = channel_mixing_rwkv7


CASES = [
    OpCase(
        "rwkv7",
        "RWKV-7",
        "arXiv:2503.14456",
        "low-rank transitions",
        chunk_rwkv7,
        fused_recurrent_rwkv7,
        naive_recurrent_rwkv7,
        dict(
            r="B T H K",
            w="B T H K decay",
            k="B T H K unit",
            v="B T H V",
            a="B T H K unit",
            b="B T H K unit",
        ),
        lambda x: dict(q=x["r"], k=x["k"], v=x["v"], g=x["w"], a=x["b"], b=x["a"]),
        state=dict(initial_state="N H K V"),
        fixed=dict(scale=0.3),
    ),
]
