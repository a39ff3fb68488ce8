# SPDX-License-Identifier: MIT
r"""# Mamba-3: trapezoidal steps and a state that rotates

Lahoti et al. (2025), *Mamba-3: Improved Sequence Modeling using State Space Principles*,
ICLR 2026; on Mamba-2, arXiv:2405.21060. One input and one output a head (SISO).

    S_t = a_t S_{t-1} + (1 - l_t) d_t a_t B_{t-1} x_{t-1}^T + l_t d_t B_t x_t^T
    a_t = exp(d_t A_t)        o_t = S_t^T C_t + D x_t

with B and C turned by the angles `theta_t = sum_{s <= t} d_s w_s` (rotary embedding that follows
the data): components 2j and 2j + 1 by the j-th.

| symbol | argument | shape |
|---|---|---|
| x | `x` | `[B, T, H, V]` |
| d, A, l | `dt`, `A`, `trap` | `[B, T, H]`: step > 0, rate <= 0, trapezoidal weight in [0, 1] |
| B, C | `B`, `C` | `[B, T, H, K]` |
| w | `angles` | `[B, T, H, R]`, 2 R <= K; the rest of K does not turn |
| D | `D` | `[H]` |
| theta, S, B, x | `initial_state`, result | `[N, H, R]`, `[N, H, K, V]`, `[N, H, K]`, `[N, H, V]` |

The state holds the last token's turned B and its x, which the next token's trapezoid writes.

Numerics: as `simple_gla`; angles are summed in fp64 and kept within (-pi, pi].

On the one equation: scalar decay, no erase. Token j is written with weight `l_j d_j` plus the
`(1 - l) d` of the token after it, and read by that token's successors; its own read is separate.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fla.ops.engine.checks import check_parts, check_sequences, check_tensors
from fla.ops.engine.gates import wide
from fla.ops.engine.run import CHUNK_SIZE, Options, run
from fla.ops.engine.segments import lasts, per_segment, repeat_rows, starts

State = tuple[Tensor, Tensor, Tensor, Tensor]


def rotate(x: Tensor, theta: Tensor) -> Tensor:
    """Components 2j and 2j + 1 of x `[..., K]` turned by theta `[..., R]`."""
    R = theta.shape[-1]
    even, odd = x[..., 0 : 2 * R : 2], x[..., 1 : 2 * R : 2]
    cos, sin = theta.cos(), theta.sin()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([turned, x[..., 2 * R :]], -1)


def naive_recurrent_mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The equation, token by token, without the skip D."""
    N, T, H, K = B.shape
    if initial_state is None:
        theta, S = x.new_zeros(N, H, angles.shape[-1]), x.new_zeros(N, H, K, x.shape[-1])
        B_last, x_last = x.new_zeros(N, H, K), x.new_zeros(N, H, x.shape[-1])
    else:
        theta, S, B_last, x_last = initial_state
    out = []
    for t in range(T):
        d, a, l = dt[:, t, :, None], (dt[:, t] * A[:, t]).exp(), trap[:, t, :, None]  # noqa: E741
        theta = theta + d * angles[:, t]
        B_t, C_t = rotate(B[:, t], theta), rotate(C[:, t], theta)
        before = torch.einsum("bhk,bhv->bhkv", (1 - l) * d * a[..., None] * B_last, x_last)
        S = a[..., None, None] * S + before + torch.einsum("bhk,bhv->bhkv", l * d * B_t, x[:, t])
        out.append(torch.einsum("bhkv,bhk->bhv", S, C_t))
        B_last, x_last = B_t, x[:, t]
    theta = torch.remainder(theta + math.pi, 2 * math.pi) - math.pi
    return torch.stack(out, 1), (theta, S, B_last, x_last) if output_final_state else None


def _turned(
    B: Tensor, C: Tensor, turn: Tensor, theta: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """B and C turned, and the last angle of every sequence."""
    total = per_segment(lambda y: y.cumsum(1), turn.double(), cu_seqlens)
    total = total + repeat_rows(theta.double(), turn.shape[1], cu_seqlens)
    total = torch.remainder(total + math.pi, 2 * math.pi) - math.pi
    last = lasts(total, theta.double(), cu_seqlens).to(turn.dtype)
    return rotate(B, total).to(B.dtype), rotate(C, total).to(C.dtype), last


def _mamba3(
    op: str,
    options: Options,
    tensors: dict[str, Any],
    D: Tensor | None,
    state: State | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State | None]:
    axes = dict(x="B T H V", dt="B T H", A="B T H", B="B T H K", C="B T H K", trap="B T H")
    specs: Any = {n: (tensors[n], a) for n, a in axes.items()}
    sizes = check_tensors(op, **specs, angles=(tensors["angles"], "B T H R"), D=(D, "H"))
    if 2 * sizes["R"] > sizes["K"]:
        raise ValueError(
            f"{op}: angles has R={sizes['R']} angles, but K={sizes['K']} in B holds only "
            f"{sizes['K'] // 2} pairs to turn; pass at most that many"
        )
    N = check_sequences(op, sizes["B"], cu_seqlens, None)
    state = _state(op, N, sizes, tensors, state)
    x, dt, A, B, C, trap, angles = (wide(y) for y in tensors.values())
    keys, queries, theta = _turned(B, C, dt.unsqueeze(-1) * angles, state[0], cu_seqlens)
    ahead = (1 - trap) * dt  # what a token writes of the one before it
    first = starts(ahead.flip(1), ahead.new_zeros(N, sizes["H"]), _flipped(cu_seqlens, x)).flip(1)
    entering = lasts(ahead.flip(1), ahead.new_zeros(N, sizes["H"]), _flipped(cu_seqlens, x))
    entering = entering if cu_seqlens is None else entering.flip(0)
    carried = torch.einsum("nhk,nhv->nhkv", entering.unsqueeze(-1) * state[2], state[3])
    g = dt * A
    o, S = run(
        op,
        options,
        queries * g.exp().unsqueeze(-1),
        keys,
        (trap * dt + first).unsqueeze(-1) * x,
        g=g,
        initial_state=state[1] + carried,
        cu_seqlens=cu_seqlens,
        names={"q": "C", "k": "B", "v": "x"},
    )
    own = (queries * keys).sum(-1, keepdim=True) * (trap * dt).unsqueeze(-1)
    o = o + (own if D is None else own + wide(D).unsqueeze(-1)) * x
    o = o.to(tensors["x"].dtype)
    if S is None:
        return o, None
    return o, (theta, S, lasts(keys, state[2], cu_seqlens), lasts(x, state[3], cu_seqlens))


def _flipped(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    return None if cu_seqlens is None else x.shape[1] - cu_seqlens.flip(0)


def _state(
    op: str, N: int, sizes: dict[str, int], tensors: dict[str, Tensor], state: State | None
) -> State:
    """The state as given, or zeros; or `ValueError`."""
    axes = (("H", "R"), ("H", "K", "V"), ("H", "K"), ("H", "V"))
    shapes = [(N, *(sizes[a] for a in names)) for names in axes]
    if state is None:
        like = wide(tensors["x"])
        return tuple(like.new_zeros(shape) for shape in shapes)  # type: ignore[return-value]
    check_parts(op, state, "theta, S, B, x")
    for i, (y, shape) in enumerate(zip(state, shapes, strict=True)):
        if y.shape != shape:
            raise ValueError(
                f"{op}: initial_state[{i}] has shape {list(y.shape)}; {list(shape)} was expected"
            )
    return tuple(wide(y) for y in state)  # type: ignore[return-value]


def chunk_mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    D: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Mamba-3 chunk by chunk.

    Example:
        >>> x, (B, C) = torch.randn(1, 100, 2, 16), torch.randn(2, 1, 100, 2, 8).unbind()
        >>> dt, A, trap = torch.rand(3, 1, 100, 2).unbind()
        >>> chunk_mamba3(x, dt, -A, B, C, trap, angles=torch.randn(1, 100, 2, 4))[0].shape
        torch.Size([1, 100, 2, 16])
    """
    options = Options(
        1.0, output_final_state, read_before=True, chunk_size=chunk_size, backend=backend
    )
    tensors = dict(x=x, dt=dt, A=A, B=B, C=C, trap=trap, angles=angles)
    return _mamba3("chunk_mamba3", options, tensors, D, initial_state, cu_seqlens)


def fused_recurrent_mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    D: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Mamba-3 token by token. Differentiable."""
    options = Options(1.0, output_final_state, read_before=True, backend=backend)
    tensors = dict(x=x, dt=dt, A=A, B=B, C=C, trap=trap, angles=angles)
    return _mamba3("fused_recurrent_mamba3", options, tensors, D, initial_state, cu_seqlens)
