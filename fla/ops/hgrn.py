# SPDX-License-Identifier: MIT
r"""# HGRN: a gated recurrence channel by channel

Qin et al. (2023), *Hierarchically Gated Recurrent Neural Network for Sequence Modeling*,
arXiv:2311.04823.

    S_t = exp(g_t) S_{t-1} + x_t        o_t = S_t        elementwise

| symbol | argument | shape |
|---|---|---|
| x | `x` | `[B, T, D]` |
| g | `g` | `[B, T, D]`, natural log of the decay, any value <= 0 including -inf |
| S_0, S_T | `initial_state`, result | `[N, D]` fp32 |

Numerics: products of factors in [0, 1] and sums in fp32; no quotient of decays.

On the one equation: K = V = 1 with q = k = 1 and a head per channel, so a vector scan.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_log_decay, check_sequences, check_tensors
from fla.ops.case import OpCase, literal
from fla.ops.engine.recurrence.recurrence import (
    Options,
    call_trace_hooks,
    check_chunk_size,
    trace_hooks,
)
from fla.ops.engine.recurrence.terms import CHUNK_SIZE
from fla.ops.engine.scan.stages import VECTOR_SCAN


@literal(of="x")
def naive_recurrent_hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token."""
    S = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state
    out = []
    for t in range(x.shape[1]):
        S = g[:, t].exp() * S + x[:, t]
        out.append(S)
    return torch.stack(out, 1), S if output_final_state else None


@checked
def naive_chunk_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Chunk by chunk: `S_i = exp(G_i) S_0 + sum_{j <= i} exp(G_i - G_j) x_j`."""
    S = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state
    out = []
    for part in torch.arange(x.shape[1]).split(chunk_size):
        G = g[:, part].cumsum(1)
        D = (G[:, :, None] - G[:, None]).masked_fill(
            torch.ones(len(part), len(part), dtype=torch.bool).triu(1)[..., None], -torch.inf
        )
        h = G.exp() * S[:, None] + torch.einsum("bijd,bjd->bid", D.exp(), x[:, part])
        S = h[:, -1]
        out.append(h)
    return torch.cat(out, 1), S if output_final_state else None


def point(x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The arguments of the one recurrence, with one head per channel."""
    one = torch.ones_like(x).unsqueeze(-1)
    return dict(q=one, k=one, v=x.unsqueeze(-1), g=g.unsqueeze(-1))


def _hgrn(
    op: str,
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    sizes = check_tensors(op, x=(x, "B T D"), g=(g, "B T D"), initial_state=(initial_state, "N D"))
    check_sequences(op, sizes["B"], cu_seqlens, initial_state)
    check_log_decay(op, g=g)
    check_chunk_size(op, chunk_size)
    if trace_hooks:
        state = None if initial_state is None else initial_state[..., None, None]
        call_trace_hooks(op, Options(1.0), **point(x, g), state=state, cu_seqlens=cu_seqlens)
    h, final = VECTOR_SCAN(op, backend, x, g, initial_state, cu_seqlens, chunk_size)
    return h, final if output_final_state else None


@checked
def chunk_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """HGRN chunk by chunk.

    Example:
        >>> h, state = chunk_hgrn(torch.randn(1, 100, 8), -torch.rand(1, 100, 8))
        >>> h.shape
        torch.Size([1, 100, 8])
    """
    return _hgrn(
        "chunk_hgrn", x, g, initial_state, output_final_state, cu_seqlens, chunk_size, backend
    )


@checked
def fused_recurrent_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """HGRN token by token: chunks of one."""
    return _hgrn(
        "fused_recurrent_hgrn", x, g, initial_state, output_final_state, cu_seqlens, 1, backend
    )


CASES = [
    OpCase(
        "hgrn",
        "HGRN",
        "arXiv:2311.04823",
        "a decay per channel",
        chunk_hgrn,
        fused_recurrent_hgrn,
        naive_recurrent_hgrn,
        dict(x="B T D", g="B T D decay"),
        lambda x: point(**x) | {"scale": 1.0},
        state=dict(initial_state="N D"),
    ),
]
