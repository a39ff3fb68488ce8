# SPDX-License-Identifier: MIT
r"""# The preconditioned gated delta rule

Tumma, Loo, Rus (2026), *Preconditioned DeltaNet: Curvature-aware Sequence Modeling for Linear
Recurrences*, arXiv:2604.21100: the gated delta rule (arXiv:2412.06464) writing with a diagonally
preconditioned key, in the manner of Adam's second moment (Kingma and Ba, 2014, arXiv:1412.6980).

    A_t = exp(h_t) A_{t-1} + beta'_t k_t * k_t
    r = log(A_t + eps) - c        M_t = x^(-r / (1 + |r|))        k~_t = M_t * k_t
    S'_t = exp(g_t) S_{t-1}
    S_t = S'_t + beta_t k~_t (v_t - S'_t^T k_t)^T        o_t = scale * S_t^T q_t

so k reads, k~ writes, and every entry of M lies in (1/x, x).

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]`; normalised unless `use_qk_l2norm_in_kernel=False` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| g, beta | `g`, `beta` | `[B, T, HV]`; natural log of the decay <= 0, -inf too; in [0, 1] |
| h, beta' | `g_atk`, `beta_atk` | `[B, T, H]` or `[B, T, HV]`, as g and beta |
| x, eps, c | `x`, `eps`, `log_atk_scale` | floats; c also per head of h, -0.2 if absent |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 (transposed: `transpose_state_layout`) |
| A_0, A_T | `initial_A_state`, result | `[N, H, K]` fp32, with the heads of h |

With grouped value heads the preconditioner is one per key head, or, where h and beta' have HV
heads, one per value head.

Returns three: (o, S, A). Numerics: as `gated_delta_rule`; A is a vector scan in fp32.

On the one equation: scalar decay, a = -beta M k, b = exp(g) k, written M k and beta v.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import (
    check_groups,
    check_log_decay,
    check_sequences,
    check_tensors,
    refuse,
)
from fla.core.precision import promote_to_fp32
from fla.ops.case import QKV, OpCase, literal
from fla.ops.cp.context import refuse_cp_context
from fla.ops.engine.recurrence.gates import l2norm
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms
from fla.ops.engine.scan.stages import VECTOR_SCAN

LOG_ATK_SCALE = -0.2  # where absent, as in published code
Result = tuple[Tensor, Tensor | None, Tensor | None]


def precondition(A: Tensor, x: float, eps: float, center: float | Tensor | None) -> Tensor:
    """`M = x^(-r / (1 + |r|))` with `r = log(A + eps) - center`, A `[..., heads, K]`."""
    if isinstance(center, Tensor):
        center = promote_to_fp32(center).view(-1, 1)
    r = (A + eps).log() - (LOG_ATK_SCALE if center is None else center)
    return torch.exp(-math.log(x) * r / (1 + r.abs()))


@literal("q")
def naive_recurrent_precond_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_atk: Tensor,
    g: Tensor,
    beta_atk: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_A_state: Tensor | None = None,
    output_final_state: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """The equation, token by token; g `[B, T, HV]`, for KDA `[B, T, HV, K]`; q and k as given."""
    B, T, HV, V = v.shape
    k = k.repeat_interleave(g_atk.shape[2] // k.shape[2], 2)
    H, K = k.shape[2:]  # one preconditioner per head of g_atk
    S = q.new_zeros(B, HV, K, V) if initial_state is None else initial_state
    A = q.new_zeros(B, H, K) if initial_A_state is None else initial_A_state
    decay = g.exp() if g.dim() == 4 else g.exp()[..., None]
    out = []
    for t in range(T):
        A = g_atk[:, t, :, None].exp() * A + beta_atk[:, t, :, None] * k[:, t].square()
        write = precondition(A, x, eps, log_atk_scale) * k[:, t]
        read, write = (y.repeat_interleave(HV // H, 1) for y in (k[:, t], write))
        S = decay[:, t, :, :, None] * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, read)
        S = S + torch.einsum("bhk,bhv->bhkv", write, beta[:, t, :, None] * error)
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), *((S, A) if output_final_state else (None, None))


def _check_center(op: str, center: float | Tensor | None, heads: int) -> None:
    if isinstance(center, Tensor) and center.numel() not in (1, heads):
        raise ValueError(
            f"{op}: log_atk_scale has shape {list(center.shape)}; a number or {heads} values, one "
            "per head of g_atk, were expected"
        )


def _precond(
    op: str,
    options: Options,
    tensors: dict[str, Tensor],
    initial_state: Tensor | None,
    initial_A_state: Tensor | None,
    squash: tuple[float, float, float | Tensor | None],
    normalize: bool,
    run: Callable[..., Any] = recurrence,
    **sequences: Any,
) -> Any:
    """Both preconditioned rules: g `[B, T, HV]` or `[B, T, HV, K]`; the preconditioner with the
    heads of g_atk.
    """
    g, g_atk = tensors["g"], tensors["g_atk"]
    vector = op.endswith("kda") or (isinstance(g, Tensor) and g.dim() == 4)
    gate = "B T HV K" if vector else "B T HV"
    wide = isinstance(g_atk, Tensor) and isinstance(tensors["v"], Tensor) and g_atk.dim() == 3
    heads = (
        "HV" if op.endswith("kda") or (wide and g_atk.shape[2:] == tensors["v"].shape[2:3]) else "H"
    )
    specs = dict(q="B T H K", k="B T H K", v="B T HV V", g_atk=f"B T {heads}", g=gate)
    specs |= dict(beta_atk=f"B T {heads}", beta="B T HV")
    checked: dict[str, Any] = {name: (tensors[name], spec) for name, spec in specs.items()}
    sizes = check_tensors(op, **checked, initial_A_state=(initial_A_state, f"N {heads} K"))
    check_groups(op, sizes)
    _check_center(op, squash[2], sizes[heads])
    cu_seqlens = sequences["cu_seqlens"]
    check_sequences(op, sizes["B"], cu_seqlens, initial_A_state, "initial_A_state")
    check_log_decay(op, g_atk=tensors["g_atk"])
    q, k, v = (tensors[name] for name in "qkv")
    if normalize:
        q, k = l2norm(q), l2norm(k)
    q, k = (
        q.repeat_interleave(sizes["HV"] // sizes["H"], 2),
        k.repeat_interleave(sizes[heads] // sizes["H"], 2),
    )
    keys, decay = promote_to_fp32(k), g_atk.unsqueeze(-1)
    gain = promote_to_fp32(tensors["beta_atk"]).unsqueeze(-1) * keys.square()
    rows = (gain, decay.expand_as(gain), initial_A_state, cu_seqlens, options.chunk_size)
    A, A_final = VECTOR_SCAN(op, "torch", *rows)  # which no language has with two axes of channels
    write = (precondition(A, *squash) * keys).to(k.dtype)
    keys, write = (x.repeat_interleave(sizes["HV"] // sizes[heads], 2) for x in (keys, write))
    read = (promote_to_fp32(g) if vector else promote_to_fp32(g).unsqueeze(-1)).exp() * keys
    o, S, *states = run(
        op,
        options,
        Terms(q, write, v, **{"gk" if vector else "g": g}, beta=tensors["beta"], b=read),
        initial_state=initial_state,
        names={"gk": "g"} if vector else {},
        **sequences,
    )
    return o, S, A_final if options.output_final_state else None, *states


@checked
def chunk_precond_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_atk: Tensor,
    g: Tensor,
    beta_atk: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_A_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
    transpose_state_layout: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: float | Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> Result:
    """The preconditioned gated delta rule chunk by chunk. Note the order g_atk, g.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> g, h, beta, rate = torch.rand(4, 1, 100, 2).unbind()
        >>> o, S, A = chunk_precond_gated_delta_rule(q, k, v, -h, -g, rate, beta)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    op = "chunk_precond_gated_delta_rule"
    refuse_cp_context(op, cp_context)
    options = Options(
        scale,
        output_final_state,
        state_v_first=transpose_state_layout,
        chunk_size=chunk_size,
        backend=backend,
    )
    tensors = dict(q=q, k=k, v=v, g_atk=g_atk, g=g, beta_atk=beta_atk, beta=beta)
    return _precond(
        op,
        options,
        tensors,
        initial_state,
        initial_A_state,
        (x, eps, log_atk_scale),
        use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )


@checked
def fused_recurrent_precond_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    g_atk: Tensor | None = None,
    beta_atk: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_A_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    cu_seqlens: Tensor | None = None,
    transpose_state_layout: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: float | Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """The preconditioned gated delta rule token by token; gk, a decay per channel, may stand in
    for g or beside it. Absent g and g_atk are 0, absent beta and beta_atk 1. Differentiable.
    """
    op = "fused_recurrent_precond_gated_delta_rule"
    refuse(op, "gv", gv, "the preconditioned rules decay the state's rows; drop it")
    check_tensors(op, v=(v, "B T HV V"))
    check_tensors(op, k=(k, "B T H K"))
    wide = promote_to_fp32(v)
    zeros, ones = wide.new_zeros(v.shape[:3]), wide.new_ones(v.shape[:3])
    g = zeros if g is None else g
    given = next((x for x in (g_atk, beta_atk) if x is not None), k[..., 0])
    tensors = dict(
        q=q,
        k=k,
        v=v,
        g_atk=torch.zeros_like(given, dtype=wide.dtype) if g_atk is None else g_atk,
        g=g if gk is None else g.unsqueeze(-1) + gk,
        beta_atk=torch.ones_like(given, dtype=wide.dtype) if beta_atk is None else beta_atk,
        beta=ones if beta is None else beta,
    )
    options = Options(
        scale,
        output_final_state,
        state_v_first=transpose_state_layout,
        chunk_size=1,
        backend=backend,
    )
    return _precond(
        op,
        options,
        tensors,
        initial_state,
        initial_A_state,
        (x, eps, log_atk_scale),
        use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


CASES = [
    OpCase(
        "precond_gated_delta_rule",
        "Preconditioned gated delta rule",
        "arXiv:2604.21100",
        "delta rules",
        chunk_precond_gated_delta_rule,
        fused_recurrent_precond_gated_delta_rule,
        naive_recurrent_precond_gated_delta_rule,
        QKV
        | dict(g_atk="B T H decay", g="B T HV decay", beta_atk="B T H rate", beta="B T HV rate"),
        state=dict(initial_state="N HV K V", initial_A_state="N H K rate"),
        chunk_fixed=dict(use_qk_l2norm_in_kernel=False),
    ),
]

# the preconditioned KDA's decay is per channel, and its preconditioner per value head
_LOOP = naive_recurrent_precond_gated_delta_rule
_PER_VALUE_HEAD = dict(g_atk="B T HV", beta_atk="B T HV", initial_A_state="N HV K")
_LOOP.axes.append(_LOOP.axes[0] | {"g": "B T HV K"} | _PER_VALUE_HEAD)  # type: ignore[attr-defined]
