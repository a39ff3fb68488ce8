# SPDX-License-Identifier: MIT
r"""# Mamba-2: the state space dual (SSD)

Dao, Gu (2024), *Transformers are SSMs*, arXiv:2405.21060.

    D_t = softplus(dt_t + bias), or dt_t as it is
    S_t = exp(D_t A) S_{t-1} + B_t (D_t x_t)^T        o_t = S_t^T C_t + D x_t

| symbol | argument | shape |
|---|---|---|
| x | `x` | `[B, T, HV, V]` |
| dt | `dt`, `dt_bias` | `[B, T, HV]`, `[HV]` |
| A | `A` | `[HV]`, below 0 |
| B, C | `B`, `C` | `[B, T, H, K]`, HV a multiple of the H groups |
| D | `D` | `[HV]` or `[HV, V]` |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 |

`dt_limit` clamps D_t. Numerics: as `simple_gla`; the step sizes in fp32 or wider.

On the one equation: scalar decay g = D A, no erase, with q = C, k = B and written D x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_groups, check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.case import Inputs, OpCase, literal
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms

NO_LIMIT = (0.0, float("inf"))


@literal("B", "C", of="x")
def naive_recurrent_mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token; dt is D_t, and no skip D."""
    N, T, H, K = B.shape
    S = x.new_zeros(N, H, K, x.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        write = torch.einsum("bhk,bhv->bhkv", B[:, t], dt[:, t, :, None] * x[:, t])
        S = (dt[:, t] * A).exp()[..., None, None] * S + write
        out.append(torch.einsum("bhkv,bhk->bhv", S, C[:, t]))
    return torch.stack(out, 1), S if output_final_state else None


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]
) -> Tensor:
    """D_t in fp32 or wider."""
    dt = promote_to_fp32(dt) if dt_bias is None else promote_to_fp32(dt) + promote_to_fp32(dt_bias)
    dt = F.softplus(dt) if dt_softplus else dt
    return dt if tuple(dt_limit) == NO_LIMIT else dt.clamp(*dt_limit)


def _mamba2(
    op: str,
    options: Options,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    step: tuple[Any, ...],
    **sequences: Any,
) -> tuple[Tensor, Tensor | None]:
    sizes = check_tensors(
        op,
        x=(x, "B T HV V"),
        dt=(dt, "B T HV"),
        A=(A, "HV"),
        B=(B, "B T H K"),
        C=(C, "B T H K"),
        D=(D, "HV" if D is None or D.dim() == 1 else "HV V"),
        dt_bias=(step[0], "HV"),
    )
    check_groups(op, sizes, "x")
    dt = step_sizes(dt, *step)
    values = dt.unsqueeze(-1) * promote_to_fp32(x)
    q, k = C.to(values.dtype), B.to(values.dtype)
    names = {"q": "C", "k": "B", "v": "x", "g": "dt"}
    o, final = recurrence(
        op, options, Terms(q, k, values, g=dt * promote_to_fp32(A)), names=names, **sequences
    )
    if D is not None:
        o = o + promote_to_fp32(D if D.dim() == 2 else D.unsqueeze(-1)) * promote_to_fp32(x)
    return o.to(x.dtype), final


@checked
def chunk_mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2 chunk by chunk.

    Example:
        >>> x, dt, A = torch.randn(1, 100, 4, 16), torch.rand(1, 100, 4), -torch.rand(4)
        >>> B, C = torch.randn(2, 1, 100, 1, 8).unbind()
        >>> chunk_mamba2(x, dt, A, B, C)[0].shape
        torch.Size([1, 100, 4, 16])
    """
    options = Options(1.0, output_final_state, chunk_size=chunk_size, backend=backend)
    return _mamba2(
        "chunk_mamba2",
        options,
        x,
        dt,
        A,
        B,
        C,
        D,
        (dt_bias, dt_softplus, dt_limit),
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


@checked
def fused_recurrent_mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2 token by token. Differentiable."""
    options = Options(1.0, output_final_state, backend=backend)
    return _mamba2(
        "fused_recurrent_mamba2",
        options,
        x,
        dt,
        A,
        B,
        C,
        D,
        (dt_bias, dt_softplus, dt_limit),
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def _point(x: Inputs) -> dict[str, Any]:
    dt = x["dt"][..., None]
    return dict(q=x["C"], k=x["B"], v=dt * x["x"], g=dt * x["A"][:, None], scale=1.0)


CASES = [
    OpCase(
        "mamba2",
        "Mamba-2",
        "arXiv:2405.21060",
        "a decay per head or token",
        chunk_mamba2,
        fused_recurrent_mamba2,
        naive_recurrent_mamba2,
        dict(x="B T HV V", dt="B T HV rate", A="HV negative", B="B T H K", C="B T H K"),
        _point,
        fixed=dict(),
    ),
]
