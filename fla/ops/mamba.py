# SPDX-License-Identifier: MIT
r"""# Mamba: the selective scan (S6)

Gu, Dao (2023), *Mamba: Linear-Time Sequence Modeling with Selective State Spaces*,
arXiv:2312.00752.

    D_t = softplus(dt_t + bias), or dt_t as it is
    S_t = exp(D_t A) S_{t-1} + (D_t x_t) B_t^T        o_t = S_t C_t + D x_t        S in R^{D x N}

| symbol | argument | shape |
|---|---|---|
| x | `x` | `[B, T, D]` |
| dt | `dt`, `dt_bias` | `[B, T, D]`, `[D]` |
| A | `A` | `[D, N]`, below 0 |
| B, C | `B`, `C` | `[B, T, N]`, shared by all channels |
| D | `D` | `[D]` |
| S_0, S_T | `initial_state`, result | `[sequences, D, N]` fp32 |

Numerics: states stepped token by token in fp32 (fp64 for fp64 inputs); nothing of size T D N is
stored.

On the one equation: V = 1 with a head per channel: vector decay g = D A over K = N, k = B, q = C,
written D x; no erase.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_log_decay, check_sequences, check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.case import OpCase, literal
from fla.ops.engine.recurrence.recurrence import (
    Options,
    call_trace_hooks,
    check_chunk_size,
    trace_hooks,
)
from fla.ops.engine.recurrence.terms import CHUNK_SIZE
from fla.ops.engine.scan.stages import SELECTIVE_SCAN
from fla.ops.mamba2 import step_sizes


@literal(of="x")
def naive_recurrent_mamba(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token; dt is D_t, and no skip D."""
    S = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    out = []
    for t in range(x.shape[1]):
        write = torch.einsum("bd,bn->bdn", dt[:, t] * x[:, t], B[:, t])
        S = (dt[:, t, :, None] * A).exp() * S + write
        out.append(torch.einsum("bdn,bn->bd", S, C[:, t]))
    return torch.stack(out, 1), S if output_final_state else None


def point(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
    """The arguments of the one recurrence, with one head per channel of x."""
    C, B = (y.unsqueeze(2).expand(-1, -1, x.shape[2], -1) for y in (C, B))
    return dict(q=C, k=B, v=(dt * x).unsqueeze(-1), g=dt.unsqueeze(-1) * A)


@checked
def chunk_mamba(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The selective scan chunk by chunk.

    Example:
        >>> x, dt, A = torch.randn(1, 100, 8), torch.rand(1, 100, 8), -torch.rand(8, 4)
        >>> B, C = torch.randn(2, 1, 100, 4).unbind()
        >>> chunk_mamba(x, dt, A, B, C)[0].shape
        torch.Size([1, 100, 8])
    """
    op = "chunk_mamba" if chunk_size != 1 else "fused_recurrent_mamba"
    sizes = check_tensors(
        op,
        x=(x, "B T D"),
        dt=(dt, "B T D"),
        A=(A, "D N"),
        B=(B, "B T N"),
        C=(C, "B T N"),
        D=(D, "D"),
        dt_bias=(dt_bias, "D"),
    )
    check_tensors(op, A=(A, "D N"), initial_state=(initial_state, "sequences D N"))
    check_sequences(op, sizes["B"], cu_seqlens, initial_state)
    check_chunk_size(op, chunk_size)
    check_log_decay(op, A=A)
    dt = step_sizes(dt, dt_bias, dt_softplus, (0.0, float("inf")))
    if trace_hooks:
        state = None if initial_state is None else initial_state.unsqueeze(-1)
        call_trace_hooks(
            op, Options(1.0), **point(x, dt, A, B, C), state=state, cu_seqlens=cu_seqlens
        )
    y, final = SELECTIVE_SCAN(
        op, backend, x, dt, promote_to_fp32(A), B, C, initial_state, cu_seqlens, chunk_size
    )
    if D is not None:
        y = (promote_to_fp32(y) + promote_to_fp32(D) * promote_to_fp32(x)).to(y.dtype)
    return y, final if output_final_state else None


@checked
def fused_recurrent_mamba(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The selective scan token by token: chunks of one."""
    return chunk_mamba(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        dt_softplus,
        initial_state,
        output_final_state,
        cu_seqlens,
        1,
        backend,
    )


CASES = [
    OpCase(
        "mamba",
        "Mamba",
        "arXiv:2312.00752",
        "a decay per channel",
        chunk_mamba,
        fused_recurrent_mamba,
        naive_recurrent_mamba,
        dict(x="B T D", dt="B T D rate", A="D K negative", B="B T K", C="B T K"),
        lambda x: point(**x) | {"scale": 1.0},
        state=dict(initial_state="N D K"),
    ),
]
