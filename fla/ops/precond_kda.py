# SPDX-License-Identifier: MIT
r"""# Preconditioned Kimi delta attention

Tumma, Loo, Rus (2026), *Preconditioned DeltaNet*, arXiv:2604.21100: Kimi delta attention
(arXiv:2510.26692) writing with a preconditioned key, as `precond_gated_delta_rule`.

    A_t = exp(h_t) A_{t-1} + beta'_t k_t * k_t        k~_t = M(A_t) * k_t
    S'_t = diag(exp(g_t)) S_{t-1}
    S_t = S'_t + beta_t k~_t (v_t - S'_t^T k_t)^T        o_t = scale * S_t^T q_t

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]`; normalised unless `use_qk_l2norm_in_kernel=False` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| g | `g` | `[B, T, HV, K]`, natural log of the decay, any value <= 0 including -inf |
| h | `g_atk` | `[B, T, HV]`, as g |
| beta, beta' | `beta`, `beta_atk` | `[B, T, HV]` in [0, 1] |
| x, eps, c | `x`, `eps`, `log_atk_scale` | floats; c also `[HV]`, -0.2 if absent |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 (transposed: `transpose_state_layout`) |
| A_0, A_T | `initial_A_state`, result | `[N, HV, K]` fp32 |

Returns three: (o, S, A). In-kernel gates of g as in `kda`. Note the order: g, g_atk.

Numerics: as `kda`; A is a vector scan in fp32.

On the one equation: vector decay, a = -beta M k, b = exp(g) k, written M k and beta v.
"""

from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_tensors
from fla.ops.case import QKV, OpCase
from fla.ops.cp.context import refuse_cp_context
from fla.ops.engine.recurrence.gates import channel_gate
from fla.ops.engine.recurrence.recurrence import (
    Options,
    check_packed,
    recurrence,
    recurrence_with_states,
)
from fla.ops.engine.recurrence.terms import CHUNK_SIZE
from fla.ops.precond_gated_delta_rule import (
    Result,
    _precond,
    naive_recurrent_precond_gated_delta_rule,
)


@checked
def naive_recurrent_precond_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    g_atk: Tensor,
    beta_atk: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_A_state: Tensor | None = None,
    output_final_state: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: float | Tensor | None = None,
) -> Result:
    """The equation, token by token; q and k as given."""
    return naive_recurrent_precond_gated_delta_rule(
        q,
        k,
        v,
        g_atk,
        g,
        beta_atk,
        beta,
        scale,
        initial_state,
        initial_A_state,
        output_final_state,
        x,
        eps,
        log_atk_scale,
    )


@checked
def chunk_precond_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    g_atk: Tensor,
    beta_atk: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_A_state: Tensor | None = None,
    output_final_state: bool = False,
    use_gate_in_kernel: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object | None = None,
    transpose_state_layout: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: float | Tensor | None = None,
    solve_tril_precision: str | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> Result:
    """Preconditioned KDA chunk by chunk.

    With `return_intermediate_states`, where no gradient is recorded, a fourth value holds the
    states S before every chunk, `[B, NT, HV, K, V]` fp32. `disable_recompute` and
    `solve_tril_precision` ("ieee", "tf32" or "tf32x3") are about published kernels and change
    nothing here: the solve is in fp32 or wider. `chunk_indices` follows from `cu_seqlens` and is
    only checked.

    Example:
        >>> import torch
        >>> q, k, v, g = torch.randn(4, 1, 100, 2, 16).unbind()
        >>> h, rate, beta = torch.rand(3, 1, 100, 2).unbind()
        >>> o, S, A = chunk_precond_kda(q, k, v, -g.abs(), -h, rate, beta)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    op = "chunk_precond_kda"
    refuse_cp_context(op, cp_context)
    if solve_tril_precision not in (None, "ieee", "tf32", "tf32x3"):
        raise ValueError(
            f"{op}: solve_tril_precision is {solve_tril_precision!r}; expected None, 'ieee', "
            "'tf32' or 'tf32x3'"
        )
    check_packed(op, cu_seqlens, cu_seqlens_cpu, chunk_indices)
    check_tensors(op, g=(g, "B T HV K"))
    g = channel_gate(op, g, A_log, dt_bias, use_gate_in_kernel, safe_gate, lower_bound)
    options = Options(
        scale,
        output_final_state,
        state_v_first=transpose_state_layout,
        chunk_size=chunk_size,
        backend=backend,
    )
    return _precond(
        op,
        options,
        dict(q=q, k=k, v=v, g_atk=g_atk, g=g, beta_atk=beta_atk, beta=beta),
        initial_state,
        initial_A_state,
        (x, eps, log_atk_scale),
        use_qk_l2norm_in_kernel,
        recurrence_with_states if return_intermediate_states else recurrence,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )


@checked
def fused_recurrent_precond_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    g_atk: Tensor,
    beta_atk: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_A_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    transpose_state_layout: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: float | Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """Preconditioned KDA token by token. Differentiable."""
    op = "fused_recurrent_precond_kda"
    check_tensors(op, g=(g, "B T HV K"))
    g = channel_gate(op, g, A_log, dt_bias, use_gate_in_kernel, False, lower_bound)
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
        dict(q=q, k=k, v=v, g_atk=g_atk, g=g, beta_atk=beta_atk, beta=beta),
        initial_state,
        initial_A_state,
        (x, eps, log_atk_scale),
        use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


CASES = [
    OpCase(
        "precond_kda",
        "Preconditioned KDA",
        "arXiv:2604.21100",
        "delta rules",
        chunk_precond_kda,
        fused_recurrent_precond_kda,
        naive_recurrent_precond_kda,
        QKV
        | dict(
            g="B T HV K decay", g_atk="B T HV decay", beta_atk="B T HV rate", beta="B T HV rate"
        ),
        state=dict(initial_state="N HV K V", initial_A_state="N HV K rate"),
        chunk_fixed=dict(use_qk_l2norm_in_kernel=False),
    ),
]
