# SPDX-License-Identifier: MIT
r"""# The delta rule

Schlag, Irie, Schmidhuber (2021), *Linear Transformers Are Secretly Fast Weight Programmers*,
arXiv:2102.11174; in parallel over the sequence: Yang et al. (2024), arXiv:2406.06484.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T        o_t = scale * S_t^T q_t

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]`; `|k| <= 1` is on you, or on `use_qk_l2norm_in_kernel` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| beta | `beta` | `[B, T, HV]` in [0, 1] or [0, 2]; recurrent also `[B, T, HV, V]` |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 |

Numerics: the triangular system of a chunk is solved by substitution in fp32; it is well behaved for
`beta |k|^2 <= 2` and grows without bound beyond.

On the one equation: no decay, a = -beta k, b = k, written k and beta v.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.ops.case import QKV, OpCase, delta, literal
from fla.ops.engine.recurrence.equation import chunk_form
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal("q", "k")
def naive_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        out.append(
            (K**-0.5 if scale is None else scale) * torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        )
    return torch.stack(out, 1), S if output_final_state else None


@checked
def delta_rule_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`naive_recurrent_delta_rule` on head-first tensors `[B, H, T, D]`, beta `[B, H, T]`."""
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
    o, S = naive_recurrent_delta_rule(q, k, v, beta, None, initial_state, output_final_state)
    return o.transpose(1, 2), S


@checked
def delta_rule_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, chunk_size: int = 32
) -> tuple[Tensor, Tensor]:
    """The recurrence's chunk form on head-first tensors; (o `[B, H, T, V]`, final state)."""
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta[..., None]))
    o, S = chunk_form(
        q, k, beta * v, None, -beta * k, k, scale=q.shape[-1] ** -0.5, chunk_size=chunk_size
    )
    return o.transpose(1, 2), S


@checked
def delta_rule_parallel(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix the rule implies, head-first: `A = tril(scale q k^T) (I + strict(beta k k^T))^{-1}
    beta`, (o = A v, A).
    """
    keys = k * beta[..., None]
    system = (keys @ k.mT).tril(-1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).tril()
    A = torch.linalg.solve_triangular(system, scores, upper=False, unitriangular=True, left=False)
    A = A * beta[..., None, :]
    return A @ v, A


@checked
def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule chunk by chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> o, _ = chunk_delta_rule(q, k, v, torch.rand(1, 100, 2), use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    options = Options(
        scale, output_final_state, use_qk_l2norm_in_kernel, chunk_size=chunk_size, backend=backend
    )
    return recurrence(
        "chunk_delta_rule",
        options,
        Terms(q, k, v, beta=beta),
        initial_state,
        cu_seqlens,
        cu_seqlens_cpu,
    )


@checked
def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule token by token; beta defaults to 1."""
    options = Options(scale, output_final_state, use_qk_l2norm_in_kernel, backend=backend)
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    return recurrence(
        "fused_recurrent_delta_rule", options, Terms(q, k, v, beta=beta), initial_state, cu_seqlens
    )


CASES = [
    OpCase(
        "delta_rule",
        "Delta rule",
        "arXiv:2406.06484",
        "delta rules",
        chunk_delta_rule,
        fused_recurrent_delta_rule,
        naive_recurrent_delta_rule,
        QKV | dict(beta="B T HV beta"),
        delta,
    ),
]
