# SPDX-License-Identifier: MIT
r"""# Mamba-3: trapezoidal steps and a state that rotates

Lahoti et al. (2026), *Mamba-3: Improved Sequence Modeling using State Space Principles*,
arXiv:2603.15569; it builds on Mamba-2, arXiv:2405.21060. One input and one output per head (SISO),
or M of each (MIMO), which share the state:

    S_t = a_t S_{t-1} + sum_m (1 - l_t) d_t a_t B_{t-1,m} x_{t-1,m}^T + l_t d_t B_{t,m} x_{t,m}^T
    a_t = exp(d_t A_t)        o_{t,m} = S_t^T C_{t,m} + D x_{t,m}

with B and C turned by the angles `theta_t = sum_{s <= t} d_s w_s` (rotary embedding that follows
the data): components 2j and 2j + 1 by the j-th.

| symbol | argument | shape |
|---|---|---|
| x | `x` | `[B, T, H, V]`, or `[B, T, H, M, V]` |
| d, A, l | `dt`, `A`, `trap` | `[B, T, H]`: step > 0, rate <= 0, trapezoidal weight in [0, 1] |
| B, C | `B`, `C` | `[B, T, H, K]`, or `[B, T, H, M, K]` |
| w | `angles` | `[B, T, H, R]`, 2 R <= K; the rest of K does not turn |
| D | `D` | `[H]` |
| theta, S, B, x | `initial_state`, result | `[N, H, R]`, `[N, H, K, V]`, and B, x of one token |

The state holds the last token's turned B and its x, which the next token's trapezoid writes.

Numerics: as `simple_gla`; angles are summed in fp64 and kept within (-pi, pi].

On the one equation: scalar decay, no erase. Token j is written with weight `l_j d_j` plus the
`(1 - l) d` of the token after it, and read by that token's successors; its own read is separate.
MIMO runs the M writes of a token one after the other, of which the first alone decays.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_parts, check_sequences, check_tensors
from fla.core.parallel import refuse_sharded
from fla.core.precision import promote_to_fp32
from fla.ops.case import OpCase, literal
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms
from fla.ops.engine.scan.running import lasts, repeat_rows, running, starts

State = tuple[Tensor, Tensor, Tensor, Tensor]


def rotate(x: Tensor, theta: Tensor) -> Tensor:
    """Components 2j and 2j + 1 of x `[..., K]`, rotated by theta `[..., R]`."""
    R = theta.shape[-1]
    even, odd = x[..., 0 : 2 * R : 2], x[..., 1 : 2 * R : 2]
    cos, sin = theta.cos(), theta.sin()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([turned, x[..., 2 * R :]], -1)


@literal(of="x")
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
    siso = x.dim() == 4
    if siso:
        x, B, C = (y.unsqueeze(3) for y in (x, B, C))
    N, T, H, M, K = B.shape
    if initial_state is None:
        theta, S = x.new_zeros(N, H, angles.shape[-1]), x.new_zeros(N, H, K, x.shape[-1])
        B_last, x_last = x.new_zeros(N, H, M, K), x.new_zeros(N, H, M, x.shape[-1])
    else:
        theta, S = initial_state[:2]
        B_last, x_last = (y.view(N, H, M, -1) for y in initial_state[2:])
    out = []
    for t in range(T):
        d, l = (y[:, t, :, None, None] for y in (dt, trap))  # noqa: E741
        a = (d * A[:, t, :, None, None]).exp()
        theta = theta + dt[:, t, :, None] * angles[:, t]
        B_t, C_t = (rotate(y[:, t], theta[:, :, None]) for y in (B, C))
        before = torch.einsum("bhmk,bhmv->bhkv", (1 - l) * d * a * B_last, x_last)
        S = a * S + before + torch.einsum("bhmk,bhmv->bhkv", l * d * B_t, x[:, t])
        out.append(torch.einsum("bhkv,bhmk->bhmv", S, C_t))
        B_last, x_last = B_t, x[:, t]
    theta = torch.remainder(theta + math.pi, 2 * math.pi) - math.pi
    o = torch.stack(out, 1)
    if siso:
        o, B_last, x_last = o.squeeze(3), B_last.squeeze(2), x_last.squeeze(2)
    return o, (theta, S, B_last, x_last) if output_final_state else None


def _turned(
    B: Tensor, C: Tensor, turn: Tensor, theta: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """B and C turned, and the last angle of every sequence."""
    total = running("sum", turn.double(), cu_seqlens)
    total = total + repeat_rows(theta.double(), turn.shape[1], cu_seqlens)
    total = torch.remainder(total + math.pi, 2 * math.pi) - math.pi
    last = lasts(total, theta.double(), cu_seqlens).to(turn.dtype)
    each = total.unsqueeze(3)
    return rotate(B, each).to(B.dtype), rotate(C, each).to(C.dtype), last


def _mamba3(
    op: str,
    options: Options,
    tensors: dict[str, Any],
    D: Tensor | None,
    state: State | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State | None]:
    ranks = sorted(getattr(tensors[n], "ndim", 0) for n in "xBC")
    m = " M" if ranks[1] == 5 else ""
    axes = dict(x=f"B T H{m} V", dt="B T H", A="B T H", B=f"B T H{m} K", C=f"B T H{m} K")
    axes["trap"] = "B T H"
    specs: Any = {n: (tensors[n], a) for n, a in axes.items()}
    sizes = check_tensors(op, **specs, angles=(tensors["angles"], "B T H R"), D=(D, "H"))
    if 2 * sizes["R"] > sizes["K"]:
        raise ValueError(
            f"{op}: angles has R={sizes['R']} angles, but K={sizes['K']} in B holds only "
            f"{sizes['K'] // 2} pairs to rotate; pass at most that many"
        )
    N = check_sequences(op, sizes["B"], cu_seqlens, None)
    refuse_sharded(op)
    state = _state(op, N, sizes, tensors, state)
    x, dt, A, B, C, trap, angles = (promote_to_fp32(y) for y in tensors.values())
    if not m:
        x, B, C = (y.unsqueeze(3) for y in (x, B, C))
    keys, queries, theta = _turned(B, C, dt.unsqueeze(-1) * angles, state[0], cu_seqlens)
    ahead = (1 - trap) * dt  # what a token writes of the one before it
    first = starts(ahead.flip(1), ahead.new_zeros(N, sizes["H"]), _flipped(cu_seqlens, x)).flip(1)
    entering = lasts(ahead.flip(1), ahead.new_zeros(N, sizes["H"]), _flipped(cu_seqlens, x))
    entering = entering if cu_seqlens is None else entering.flip(0)
    _, S_0, B_0, x_0 = state
    B_0, x_0 = (y.view(N, sizes["H"], x.shape[3], -1) for y in (B_0, x_0))
    carried = torch.einsum("nh,nhmk,nhmv->nhkv", entering, B_0, x_0)
    g, now = dt * A, trap * dt
    o, S = _run(
        op,
        options,
        (queries, keys, (now + first)[..., None, None] * x, g),
        S_0 + carried,
        cu_seqlens,
    )
    o = o + _own(queries, keys, x, now, first)
    o = o if D is None else o + promote_to_fp32(D)[:, None, None] * x
    last_B, last_x = lasts(keys, B_0, cu_seqlens), lasts(x, x_0, cu_seqlens)
    if not m:
        o, last_B, last_x = o.squeeze(3), last_B.squeeze(2), last_x.squeeze(2)
    o = o.to(tensors["x"].dtype)
    return o, None if S is None else (theta, S, last_B, last_x)


def _run(
    op: str,
    options: Options,
    inputs: tuple[Tensor, ...],
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence on `[B, T, H, M, .]`: M steps per token, read before each write."""
    M, T = inputs[0].shape[3], inputs[0].shape[1]
    q, k, v = (y.transpose(2, 3).flatten(1, 2) for y in inputs[:3])
    g = inputs[3]
    if M > 1:
        rest = g.new_zeros(*g.shape[:2], M - 1, g.shape[2])
        g = torch.cat([g.unsqueeze(2), rest], 2).flatten(1, 2)
        cu_seqlens = None if cu_seqlens is None else cu_seqlens * M
    o, S = recurrence(
        op,
        options,
        Terms(q * g.exp().unsqueeze(-1), k, v, g=g),
        state,
        cu_seqlens,
        names={"q": "C", "k": "B", "v": "x"},
    )
    return o.unflatten(1, (T, M)).transpose(2, 3), S


def _own(queries: Tensor, keys: Tensor, x: Tensor, now: Tensor, first: Tensor) -> Tensor:
    """What a token reads of its own writes, which count `now`, less what the steps before a step
    have written, which counts `now + first`.
    """
    M = x.shape[3]
    if M == 1:
        return (queries * keys).sum(-1, keepdim=True) * now[..., None, None] * x
    weight = now[..., None, None] - (now + first)[..., None, None] * torch.ones(
        M, M, dtype=x.dtype, device=x.device
    ).tril(-1)
    return (torch.einsum("bthmk,bthnk->bthmn", queries, keys) * weight) @ x


def _flipped(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    return None if cu_seqlens is None else x.shape[1] - cu_seqlens.flip(0)


def _state(
    op: str, N: int, sizes: dict[str, int], tensors: dict[str, Tensor], state: State | None
) -> State:
    """The state as given, or zeros; or `ValueError`."""
    each = ("H", "M") if "M" in sizes else ("H",)
    axes = (("H", "R"), ("H", "K", "V"), (*each, "K"), (*each, "V"))
    shapes = [(N, *(sizes[a] for a in names)) for names in axes]
    if state is None:
        like = promote_to_fp32(tensors["x"])
        return tuple(like.new_zeros(shape) for shape in shapes)  # type: ignore[return-value]
    check_parts(op, state, "theta, S, B, x")
    for i, (y, shape) in enumerate(zip(state, shapes, strict=True)):
        if y.shape != shape:
            raise ValueError(
                f"{op}: initial_state[{i}] has shape {list(y.shape)}; {list(shape)} was expected"
            )
    return tuple(promote_to_fp32(y) for y in state)  # type: ignore[return-value]


@checked
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
        >>> mimo = [y.unsqueeze(3).expand(-1, -1, -1, 3, -1) for y in (x, B, C)]
        >>> chunk_mamba3(mimo[0], dt, -A, *mimo[1:], trap, torch.randn(1, 100, 2, 4))[0].shape
        torch.Size([1, 100, 2, 3, 16])
    """
    options = Options(
        1.0, output_final_state, read_before=True, chunk_size=chunk_size, backend=backend
    )
    tensors = dict(x=x, dt=dt, A=A, B=B, C=C, trap=trap, angles=angles)
    return _mamba3("chunk_mamba3", options, tensors, D, initial_state, cu_seqlens)


@checked
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


CASES = [
    OpCase(
        "mamba3",
        "Mamba-3",
        "arXiv:2603.15569",
        "a decay per head or token",
        chunk_mamba3,
        fused_recurrent_mamba3,
        naive_recurrent_mamba3,
        dict(
            x="B T H V",
            dt="B T H rate",
            A="B T H negative",
            B="B T H K",
            C="B T H K",
            trap="B T H rate",
            angles="B T H R",
        ),
        state=dict(initial_state=("N H R", "N H K V", "N H K", "N H V")),
    ),
    OpCase(
        "mamba3",
        "Mamba-3, MIMO",
        "arXiv:2603.15569",
        "a decay per head or token",
        chunk_mamba3,
        fused_recurrent_mamba3,
        naive_recurrent_mamba3,
        dict(
            x="B T H Q V",
            dt="B T H rate",
            A="B T H negative",
            B="B T H Q K",
            C="B T H Q K",
            trap="B T H rate",
            angles="B T H R",
        ),
        state=dict(initial_state=("N H R", "N H K V", "N H Q K", "N H Q V")),
    ),
]
