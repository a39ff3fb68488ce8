# SPDX-License-Identifier: MIT
r"""# Kimi delta attention: a gated delta rule with a decay per channel

Kimi Team (2025), *Kimi Linear: An Expressive, Efficient Attention Architecture*, arXiv:2510.26692.

    S'_t = diag(exp(g_t)) S_{t-1}
    S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T        o_t = scale * S_t^T q_t

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]`; `|k| <= 1` is on you, or on `use_qk_l2norm_in_kernel` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| g | `g` | `[B, T, HV, K]`, natural log of the decay, any value <= 0 including -inf |
| beta | `beta` | `[B, T, HV]` in [0, 1] or [0, 2] |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 (`[N, HV, V, K]` with `state_v_first`) |

In-kernel gates with `use_gate_in_kernel`: `g <- -exp(A_log) softplus(g + dt_bias)`, or with a
`lower_bound` `g <- lower_bound sigmoid(exp(A_log) (g + dt_bias))`; A_log `[HV]`, dt_bias `[HV K]`.
Without `use_gate_in_kernel` the three are not read.
`use_beta_sigmoid_in_kernel`: `beta <- sigmoid(beta)`, doubled by `allow_neg_eigval`.

Numerics: as `gla` for the decay and `delta_rule` for the solve.

On the one equation: vector decay, a = -beta k, b = exp(g) k, written k and beta v.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_tensors, refuse
from fla.core.precision import promote_to_fp32
from fla.ops.case import QKV, OpCase, gated_delta, literal
from fla.ops.cp.context import FLACPContext, on_ranks
from fla.ops.engine.recurrence.equation import chunk_form
from fla.ops.engine.recurrence.gates import channel_gate
from fla.ops.engine.recurrence.recurrence import (
    Options,
    recurrence,
    recurrence_with_states,
    state_layout,
)
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


def _gate(
    op: str,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    output_dtype: torch.dtype | None,
) -> Tensor:
    """A gate as the operators apply it; without an `output_dtype` in fp32, or fp64 for fp64."""
    if g.dim() < 2:
        raise ValueError(f"{op}: g has shape {list(g.shape)}; [..., H, K] was expected")
    rows = g.reshape(1, -1, *g.shape[-2:])
    decay = channel_gate(op, rows, A_log, dt_bias, True, False, lower_bound).view(g.shape)
    return decay if output_dtype is None else decay.to(output_dtype)


@checked
def naive_kda_gate(
    g: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`-exp(A_log) softplus(g + dt_bias)` of logits `[..., H, K]`."""
    return _gate("naive_kda_gate", g, A_log, dt_bias, None, output_dtype)


@checked
def naive_kda_lowerbound_gate(
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`lower_bound sigmoid(exp(A_log) (g + dt_bias))` of logits `[..., H, K]`."""
    return _gate("naive_kda_lowerbound_gate", g, A_log, dt_bias, lower_bound, output_dtype)


@checked
def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The log decay `[..., H, K]` from its logits: `naive_kda_gate`, with a `lower_bound`
    `naive_kda_lowerbound_gate`, which alone can do without A_log.
    """
    return _gate("fused_kda_gate", g, A_log, dt_bias, lower_bound, output_dtype)


@literal("q", "k")
def naive_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
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
        S = g[:, t, :, :, None].exp() * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence's chunk form, differentiable by autograd."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    beta = beta[..., None]
    o, S = chunk_form(
        q, k, beta * v, g, -beta * k, g.exp() * k,
        scale=scale, state=initial_state, chunk_size=chunk_size,
    )  # fmt: skip
    return o, S if output_final_state else None


def _gates(
    op: str,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    gate: tuple[Any, ...],
    sigmoid: tuple[bool, bool],
) -> dict[str, Tensor]:
    """gk and beta after their in-kernel transforms."""
    check_tensors(op, v=(v, "B T HV V"), g=(g, "B T HV K"), beta=(beta, "B T HV"))
    return dict(gk=channel_gate(op, g, *gate), beta=sigmoid_beta(op, beta, *sigmoid))


def sigmoid_beta(op: str, beta: Tensor, use_sigmoid: bool, allow_neg_eigval: bool) -> Tensor:
    """beta after its in-kernel transform."""
    if allow_neg_eigval and not use_sigmoid:
        raise ValueError(
            f"{op}: allow_neg_eigval doubles the in-kernel sigmoid; set "
            "use_beta_sigmoid_in_kernel=True or pass beta in [0, 2]"
        )
    return promote_to_fp32(beta).sigmoid() * (2 if allow_neg_eigval else 1) if use_sigmoid else beta


@checked
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: FLACPContext | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """KDA chunk by chunk.

    With `return_intermediate_states`, where no gradient is recorded, a third value holds the states
    before every chunk, `[B, NT, HV, K, V]` fp32 (packed: the chunks of each sequence in turn).
    `disable_recompute` is about the memory of published kernels and changes nothing here.
    `use_graph` is refused: boundaries are read on the host, so a captured graph would keep them.
    `transpose_state_layout` is the former name of `state_v_first`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> g, beta = -torch.rand(1, 100, 2, 16), torch.rand(1, 100, 2)
        >>> o, state = chunk_kda(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    if cp_context is not None:
        return on_ranks(chunk_kda, locals())
    op = "chunk_kda"
    fix = "capture a call without it, for boundaries that do not change, and drop it"
    refuse(op, "use_graph", use_graph or None, fix)
    refuse(op, "max_num_seqs", max_num_seqs, fix)
    options = Options(
        scale,
        output_final_state,
        use_qk_l2norm_in_kernel,
        state_layout(op, state_v_first, transpose_state_layout),
        chunk_size=chunk_size,
        backend=backend,
    )
    gate = (A_log, dt_bias, use_gate_in_kernel, safe_gate, lower_bound)
    gates = _gates(op, v, g, beta, gate, (use_beta_sigmoid_in_kernel, allow_neg_eigval))
    run: Any = recurrence_with_states if return_intermediate_states else recurrence
    sequences = (initial_state, cu_seqlens, cu_seqlens_cpu)
    return run(op, options, Terms(q, k, v, **gates), *sequences, names={"gk": "g"})


@checked
def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """KDA token by token. Differentiable. `transpose_state_layout` is the former name of
    `state_v_first`.
    """
    op = "fused_recurrent_kda"
    v_first = state_layout(op, state_v_first, transpose_state_layout)
    options = Options(scale, output_final_state, use_qk_l2norm_in_kernel, v_first, backend=backend)
    gate = (A_log, dt_bias, use_gate_in_kernel, False, lower_bound)
    gates = _gates(op, v, g, beta, gate, (use_beta_sigmoid_in_kernel, allow_neg_eigval))
    return recurrence(
        op, options, Terms(q, k, v, **gates), initial_state, cu_seqlens, names={"gk": "g"}
    )


CASES = [
    OpCase(
        "kda",
        "Kimi delta attention",
        "arXiv:2510.26692",
        "delta rules",
        chunk_kda,
        fused_recurrent_kda,
        naive_recurrent_kda,
        QKV | dict(g="B T HV K decay", beta="B T HV beta"),
        gated_delta,
    ),
]
