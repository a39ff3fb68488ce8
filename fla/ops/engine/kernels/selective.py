# SPDX-License-Identifier: MIT
"""The selective scan, `fla/ops/engine/scan/selective.py`, and its gradient.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t        y_t = sum over the states of C_t S_t

One program per sequence and tile of channels, which holds the N states of each. A chunk is one
associative scan over its tokens from a state of zero, to which the state before it is added times
the decay since.

BT tokens of all sequences in one row, NS sequences, NC chunks, D channels, N states per channel, C
tokens per chunk (the C of the equation is `read` in the kernels), BD channels and BN states per
program. Tensors are contiguous; x, dt, B, read and their like are of any dtype, states of fp32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.engine.kernels.launch import Cuts
from fla.ops.engine.kernels.scan import load, store, then

CHUNK, STATES, WARPS = 16, 512, 8  # tokens at once; states of a program


@triton.jit
def decays(
    dt,           # [C, BD], fp32
    a,            # [BD, BN], fp32
    t,            # [C], int64: tokens
    first, last,
):  # fmt: skip
    """`exp(dt a)` `[C, BD, BN]`; 1 for tokens elsewhere than `first <= t < last`."""
    there = ((t >= first) & (t < last))[:, None, None]
    return tl.where(there, tl.exp(dt[:, :, None] * a[None, :, :]), 1.0)


@triton.jit
def layer_of(
    x,                # [C, BD, BN]
    i,
    C: tl.constexpr,
):  # fmt: skip
    """The cells of row i, `[BD, BN]`; a masked sum, since registers have no index."""
    return tl.sum(tl.where((tl.arange(0, C) == i)[:, None, None], x, 0.0), 0)


@triton.jit
def selective_kernel(
    x, dt,                  # [BT, D]
    A,                      # [D, N], fp32
    B, read,                # [BT, N]; `read` is the equation's C
    initial,                # [NS, D, N], fp32, for INITIAL
    y,                      # out [BT, D]
    final,                  # out [NS, D, N], fp32
    states,                 # out [NC, D, N], fp32, for KEEP: the state before every chunk
    bounds,                 # [NS + 1], int64: as cu_seqlens
    first_chunks,           # [NS], int64: number of a sequence's first chunk
    D, N,
    INITIAL: tl.constexpr,  # there is an initial state
    KEEP: tl.constexpr,     # a backward pass follows, which needs `states`
    C: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,       # the power of two that holds N
):  # fmt: skip
    """All chunks of one sequence and tile of channels; the states stay in registers, in fp32, and
    never reach memory token by token.
    """
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    ns = tl.arange(0, BN)
    cells, inside = cols[:, None] * N + ns[None, :], (cols < D)[:, None] & (ns < N)[None, :]
    begin, end, chunk = tl.load(bounds + n), tl.load(bounds + n + 1), tl.load(first_chunks + n)
    a = tl.load(A + cells, mask=inside, other=0.0)
    state = tl.zeros([BD, BN], tl.float32)
    if INITIAL:
        state += tl.load(initial + n * D * N + cells, mask=inside, other=0.0)
    for first in range(begin, end, C):
        t = first + tl.arange(0, C)
        if KEEP:
            tl.store(states + chunk * D * N + cells, state, mask=inside)
        step = load(dt, t, begin, end, D, cols)
        written = (step * load(x, t, begin, end, D, cols))[:, :, None]
        written = written * load(B, t, begin, end, N, ns)[:, None, :]
        decay, out = tl.associative_scan((decays(step, a, t, begin, end), written), 0, then)
        out += decay * state[None, :, :]
        store(y, tl.sum(out * load(read, t, begin, end, N, ns)[:, None, :], 2), t, end, D, cols)
        state = layer_of(out, C - 1, C)
        chunk += 1
    tl.store(final + n * D * N + cells, state, mask=inside)


@triton.jit
def selective_gradient_kernel(
    x, dt,                # [BT, D]
    A,                    # [D, N], fp32
    B, read,              # [BT, N]; `read` is the equation's C
    states,               # [NC, D, N], fp32: the state before every chunk
    dy,                   # [BT, D]
    dfinal,               # [NS, D, N], fp32, for FINAL
    dx, ddt,              # out [BT, D]
    dA,                   # out [NS, D, N], fp32: each sequence's part
    dB, dread,            # out [tiles of D, BT, N], fp32: each tile's part
    dinitial,             # out [NS, D, N], fp32
    bounds,               # [NS + 1], int64: as cu_seqlens
    first_chunks,         # [NS], int64: number of a sequence's first chunk
    plane,                # BT N, numbers of one part of dB and of dread
    D, N,
    FINAL: tl.constexpr,  # the final state has a gradient
    C: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,     # the power of two that holds N
):  # fmt: skip
    """Chunks from the last to the first. `adjoint` is the gradient of the state after each token,
    `carry` what the token after a chunk hands to it. The sums for dA and the states stay in
    registers.
    """
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols, ns = tile * BD + tl.arange(0, BD), tl.arange(0, BN)
    cells, inside = cols[:, None] * N + ns[None, :], (cols < D)[:, None] & (ns < N)[None, :]
    begin, end = tl.load(bounds + n), tl.load(bounds + n + 1)
    chunks = (end - begin + C - 1) // C
    chunk = tl.load(first_chunks + n) + chunks
    a = tl.load(A + cells, mask=inside, other=0.0)
    rates = tl.zeros([BD, BN], tl.float32)
    carry = tl.zeros([BD, BN], tl.float32)
    if FINAL:
        carry += tl.load(dfinal + n * D * N + cells, mask=inside, other=0.0)
    for back in range(0, chunks):
        first, chunk = begin + (chunks - 1 - back) * C, chunk - 1
        t = first + tl.arange(0, C)
        stop = tl.minimum(first + C, end)
        # S_{t-1}: the forward scan again, shifted by one token
        state = tl.load(states + chunk * D * N + cells, mask=inside, other=0.0)
        step = load(dt, t - 1, first, stop, D, cols)
        written = (step * load(x, t - 1, first, stop, D, cols))[:, :, None]
        written = written * load(B, t - 1, first, stop, N, ns)[:, None, :]
        decay = decays(step, a, t - 1, first, stop)
        decay, before = tl.associative_scan((decay, written), 0, then)
        before += decay * state[None, :, :]
        # the adjoint: a scan from the chunk's end, with the decay of the token after each
        grad = load(dy, t, begin, end, D, cols)
        adjoint = grad[:, :, None] * load(read, t, begin, end, N, ns)[:, None, :]
        decay = decays(load(dt, t + 1, begin, stop, D, cols), a, t + 1, begin, stop)
        decay, adjoint = tl.associative_scan((decay, adjoint), 0, then, reverse=True)
        adjoint += decay * carry[None, :, :]

        # from both, the gradients of all that token t reads
        step, row = load(dt, t, begin, end, D, cols), load(x, t, begin, end, D, cols)
        write = load(B, t, begin, end, N, ns)
        decay = decays(step, a, t, begin, end)
        after = decay * before + (step * row)[:, :, None] * write[:, None, :]
        store(dread + tile * plane, tl.sum(after * grad[:, :, None], 1), t, end, N, ns)
        store(dB + tile * plane, tl.sum(adjoint * (step * row)[:, :, None], 1), t, end, N, ns)
        dwritten = tl.sum(adjoint * write[:, None, :], 2)
        carried = adjoint * decay
        dlog = carried * before
        store(dx, step * dwritten, t, end, D, cols)
        dstep = row * dwritten + tl.sum(dlog * a[None, :, :], 2)
        store(ddt, dstep, t, end, D, cols)
        rates += tl.sum(dlog * step[:, :, None], 0)
        carry = layer_of(carried, 0, C)
    tl.store(dA + n * D * N + cells, rates, mask=inside)
    tl.store(dinitial + n * D * N + cells, carry, mask=inside)


class Inputs(NamedTuple):
    """x, dt `[BT, D]`, A `[D, N]` in fp32, B, C `[BT, N]`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def _launch(p: Inputs, cuts: Cuts) -> tuple[tuple[int, int], dict[str, int]]:
    D, BN = p.A.shape[0], triton.next_power_of_2(p.A.shape[1])
    BD = max(1, STATES // BN)
    return (len(cuts.first_chunks), triton.cdiv(D, BD)), dict(C=CHUNK, BD=BD, BN=BN)


def forward(
    p: Inputs, initial: Tensor | None, cuts: Cuts, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and if `keep` the state before each chunk."""
    grid, sizes = _launch(p, cuts)
    y, final = torch.empty_like(p.x), p.A.new_empty(grid[0], *p.A.shape)
    states = p.A.new_empty(len(cuts.starts) if keep else 0, *p.A.shape)
    selective_kernel[grid](
        *p, initial, y, final, states, cuts.bounds, cuts.first_chunks, *p.A.shape,
        INITIAL=initial is not None, KEEP=keep, num_warps=WARPS, **sizes,
    )  # fmt: skip
    return y, final, states


def backward(
    p: Inputs, dy: Tensor, initial: Tensor | None, dfinal: Tensor | None, cuts: Cuts
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C and the initial state; A's, B's and C's in fp32."""
    _, final, states = forward(p, initial, cuts, True)
    grid, sizes = _launch(p, cuts)
    dx, ddt, dA, dinitial = (torch.empty_like(y) for y in (p.x, p.dt, final, final))
    dB, dC = p.A.new_empty(2, grid[1], *p.B.shape)
    selective_gradient_kernel[grid](
        *p, states, dy, dfinal, dx, ddt, dA, dB, dC, dinitial, cuts.bounds, cuts.first_chunks,
        p.B.numel(), *p.A.shape, FINAL=dfinal is not None, num_warps=WARPS, **sizes,
    )  # fmt: skip
    return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dinitial
