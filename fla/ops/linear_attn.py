# SPDX-License-Identifier: MIT
r"""# Linear attention

Katharopoulos, Vyas, Pappas, Fleuret (2020), *Transformers are RNNs*, arXiv:2006.16236.

    S_t = S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t
    z_t = z_{t-1} + k_t              o_t <- o_t / (scale * q_t . z_t + 1e-10)   with normalize

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32; with normalize `(S, z [N, 1, HV, K])` |

Numerics: accumulated in fp32 (fp64 for fp64). `normalize` divides by a sum that a feature map must
keep away from zero; it defaults to True in the chunk forms and False in the recurrent ones, as
their users know it.

On the one equation: no decay, no erase, k and v written as they are. z is one more value channel
whose value is 1.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.ops.case import QKV, OpCase, linear, literal
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import Terms

State = Tensor | tuple[Tensor, Tensor] | None


@literal("q", "k")
def naive_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token."""
    B, T, H, K = q.shape
    scale = K**-0.5 if scale is None else scale
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    z, out = q.new_zeros(B, H, K), []
    for t in range(T):
        S, z = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t]), z + k[:, t]
        o = scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append(o / (scale * (q[:, t] * z).sum(-1, keepdim=True) + 1e-10) if normalize else o)
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, normalize: bool = False
) -> Tensor:
    """The same as one masked matrix product over the whole sequence."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihk,bjhk->bhij", q, k).tril() * scale
    o = torch.einsum("bhij,bjhv->bihv", scores, v)
    return o / (scores.sum(-1).mT[..., None] + 1e-10) if normalize else o


def _run(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State,
    normalize: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State]:
    if not normalize:
        if isinstance(initial_state, tuple):
            raise ValueError(
                f"{op}: initial_state is a pair (S, z), which belongs to normalize=True"
            )
        return recurrence(op, options, Terms(q, k, v), initial_state, cu_seqlens)
    if initial_state is not None:
        if not isinstance(initial_state, tuple):
            raise ValueError(
                f"{op}: with normalize=True initial_state must be the pair (S, z), got a tensor"
            )
        S, z = initial_state
        initial_state = torch.cat([S, z.squeeze(1).unsqueeze(-1).to(S)], -1)
    ones = v.new_ones(*v.shape[:-1], 1)
    o, final = recurrence(
        op, options, Terms(q, k, torch.cat([v, ones], -1)), initial_state, cu_seqlens
    )
    o = o[..., :-1] / (o[..., -1:] + 1e-10)
    return o, None if final is None else (final[..., :-1], final[..., -1].unsqueeze(1))


@checked
def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Linear attention chunk by chunk.

    Example:
        >>> q, k, v = torch.rand(3, 1, 100, 2, 16).unbind()
        >>> chunk_linear_attn(q, k, v)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    options = Options(scale, output_final_state, backend=backend)
    return _run("chunk_linear_attn", options, q, k, v, initial_state, normalize, cu_seqlens)


fused_chunk_linear_attn = chunk_linear_attn


@checked
def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Linear attention token by token; `reverse` runs from the last token to the first."""
    options = Options(scale, output_final_state, reverse=reverse, backend=backend)
    return _run(
        "fused_recurrent_linear_attn", options, q, k, v, initial_state, normalize, cu_seqlens
    )


CASES = [
    OpCase(
        "linear_attn",
        "Linear attention",
        "arXiv:2006.16236",
        "no decay",
        chunk_linear_attn,
        fused_recurrent_linear_attn,
        naive_recurrent_linear_attn,
        QKV,
        linear,
        fixed=dict(normalize=False),
    ),
]
