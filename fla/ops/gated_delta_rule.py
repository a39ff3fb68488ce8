# SPDX-License-Identifier: MIT
r"""# The gated delta rule

Yang, Kautz, Hatamizadeh (2024), *Gated Delta Networks*, arXiv:2412.06464.

    S'_t = exp(g_t) S_{t-1}
    S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T        o_t = scale * S_t^T q_t

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]`; `|k| <= 1` is on you, or on `use_qk_l2norm_in_kernel` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| g | `g` | `[B, T, HV]`, natural log of the decay, any value <= 0 including -inf |
| beta | `beta` | `[B, T, HV]` in [0, 1] or [0, 2]; recurrent also `[B, T, HV, V]` |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 (`[N, HV, V, K]` with `state_v_first`) |

In-kernel gates: `g <- -exp(A_log) softplus(g + dt_bias)` with `use_gate_in_kernel`, and
`beta <- sigmoid(beta)`, doubled by `allow_neg_eigval`, with `use_beta_sigmoid_in_kernel`. Without
`use_gate_in_kernel` A_log and dt_bias are not read. Absent g is 0, absent beta is 1.
`chunk_indices` follows from `cu_seqlens` and is only checked; `transpose_state_layout` is the
former name of `state_v_first`.

Numerics: as `simple_gla` for the decay and `delta_rule` for the solve.

On the one equation: scalar decay, a = -beta k, b = exp(g) k, written k and beta v.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_shapes
from fla.core.precision import promote_to_fp32
from fla.ops.case import QKV, OpCase, gated_delta, literal
from fla.ops.cp.context import FLACPContext, on_ranks
from fla.ops.engine.recurrence.equation import chunk_form
from fla.ops.engine.recurrence.gates import softplus_gate
from fla.ops.engine.recurrence.recurrence import Options, check_packed, recurrence, state_layout
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal("q", "k")
def naive_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
        S = g[:, t, :, None, None].exp() * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        out.append(
            (K**-0.5 if scale is None else scale) * torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        )
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
        q,
        k,
        beta * v,
        g,
        -beta * k,
        g.exp() * k,
        scale=scale,
        state=initial_state,
        chunk_size=chunk_size,
    )
    return o, S if output_final_state else None


@checked
def naive_gdn_gate(
    g: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`-exp(A_log) softplus(g + dt_bias)`: the log decay of logits `[..., HV]`; without an
    `output_dtype` in fp32, or fp64 for fp64 logits.
    """
    check_shapes("naive_gdn_gate", A_log=(A_log, "HV"), dt_bias=(dt_bias, "HV"))
    if g.shape[-1:] != A_log.shape:
        raise ValueError(
            f"naive_gdn_gate: g has shape {list(g.shape)}; [..., {A_log.shape[0]}] was expected, "
            "from A_log"
        )
    decay = softplus_gate(g.reshape(1, -1, g.shape[-1]), A_log, dt_bias).view(g.shape)
    return decay if output_dtype is None else decay.to(output_dtype)


fused_gdn_gate = naive_gdn_gate


def _gates(
    op: str,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    use_gate: bool,
    use_sigmoid: bool,
    allow_neg_eigval: bool,
) -> tuple[Tensor | None, Tensor]:
    """g and beta after their in-kernel transforms; contradictory switches raise."""
    if use_gate and (g is None or A_log is None):
        raise ValueError(
            f"{op}: use_gate_in_kernel needs g (the gate's logits) and A_log; pass both"
        )
    if allow_neg_eigval and not use_sigmoid:
        raise ValueError(
            f"{op}: allow_neg_eigval doubles the in-kernel sigmoid; set "
            "use_beta_sigmoid_in_kernel=True or "
            "pass beta in [0, 2]"
        )
    if use_gate or beta is None:
        gate: Any = dict(A_log=(A_log, "HV"), dt_bias=(dt_bias, "HV")) if use_gate else {}
        check_shapes(op, v=(v, "B T HV V"), g=(g, "B T HV"), **gate)
    if use_gate and g is not None and A_log is not None:
        g = softplus_gate(g, A_log, dt_bias)
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    elif use_sigmoid:
        beta = promote_to_fp32(beta).sigmoid() * (2 if allow_neg_eigval else 1)
    return g, beta


@checked
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: FLACPContext | None = None,
    chunk_size: int = CHUNK_SIZE,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule chunk by chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 100, 2)
        >>> options = dict(output_final_state=True, use_qk_l2norm_in_kernel=True)
        >>> o, state = chunk_gated_delta_rule(q, k, v, g, beta, **options)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))
    """
    if cp_context is not None:
        return on_ranks(chunk_gated_delta_rule, locals())
    op = "chunk_gated_delta_rule"
    check_packed(op, cu_seqlens, cu_seqlens_cpu, chunk_indices)
    g, beta = _gates(
        op,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
    )
    options = Options(
        scale,
        output_final_state,
        use_qk_l2norm_in_kernel,
        state_layout(op, state_v_first, transpose_state_layout),
        chunk_size=chunk_size,
        backend=backend,
    )
    return recurrence(
        op, options, Terms(q, k, v, g=g, beta=beta), initial_state, cu_seqlens, cu_seqlens_cpu
    )


@checked
def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule token by token, with further log decays `gk [B, T, HV, K]` on the rows
    of the state and `gv [B, T, HV, V]` on its columns. Differentiable.
    """
    op = "fused_recurrent_gated_delta_rule"
    g, beta = _gates(
        op,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
    )
    v_first = state_layout(op, state_v_first, transpose_state_layout)
    options = Options(scale, output_final_state, use_qk_l2norm_in_kernel, v_first, backend=backend)
    return recurrence(
        op, options, Terms(q, k, v, g=g, beta=beta, gk=gk, gv=gv), initial_state, cu_seqlens
    )


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
recurrent_gated_delta_rule = fused_recurrent_gated_delta_rule


CASES = [
    OpCase(
        "gated_delta_rule",
        "Gated delta rule",
        "arXiv:2412.06464",
        "delta rules",
        chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule,
        naive_recurrent_gated_delta_rule,
        QKV | dict(g="B T HV decay", beta="B T HV beta"),
        gated_delta,
    ),
]
