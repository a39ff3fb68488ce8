# SPDX-License-Identifier: MIT
"""The vector scan, `engine/scan/vector.py`, and its gradient: `h_t = exp(g_t) h_{t-1} + x_t`.

One program per sequence and tile of channels. A chunk is one associative scan over its tokens from
a state of zero, to which the state before it is added times the decay since.

BT tokens of all sequences in one row, N sequences, NC chunks, D channels, C tokens per chunk, BD
channels per program. Tensors are contiguous; x, g and their like are of any dtype, states of fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.engine.kernels.launch import CHUNK, Cuts

CHANNELS, WARPS = 64, 4


@triton.jit
def then(
    decay, x,            # of a stretch of tokens: its decay, and the state it leaves from zero
    next_decay, next_x,  # of the stretch after it
):  # fmt: skip
    """Both stretches as one; the associative operation of the scan."""
    return decay * next_decay, next_x + next_decay * x


@triton.jit
def load(
    x,            # [BT, D]
    t,            # [C], int64: tokens
    first, last,
    D,
    cols,         # [BD]
):  # fmt: skip
    """Rows `first <= t < last`, `[C, BD]` in fp32; zeros elsewhere."""
    there = ((t >= first) & (t < last))[:, None] & (cols < D)[None, :]
    return tl.load(x + t[:, None] * D + cols[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def store(
    x,      # [BT, D], of any dtype
    value,  # [C, BD]
    t,      # [C], int64: tokens
    last,
    D,
    cols,   # [BD]
):  # fmt: skip
    """Rows `t < last`."""
    there = (t < last)[:, None] & (cols < D)[None, :]
    tl.store(x + t[:, None] * D + cols[None, :], value.to(x.dtype.element_ty), mask=there)


@triton.jit
def row_of(
    x,                # [C, BD]
    i,
    C: tl.constexpr,
):  # fmt: skip
    """Row i, `[BD]`; a masked sum, since registers have no index."""
    return tl.sum(tl.where((tl.arange(0, C) == i)[:, None], x, 0.0), 0)


@triton.jit
def scan_kernel(
    x, g,                   # [BT, D]
    initial,                # [N, D], fp32, for INITIAL
    h,                      # out [BT, D]
    final,                  # out [N, D], fp32
    states,                 # out [NC, D], fp32, for KEEP: the state before every chunk
    bounds,                 # [N + 1], int64: as cu_seqlens
    first_chunks,           # [N], int64: number of a sequence's first chunk
    D,
    INITIAL: tl.constexpr,  # there is an initial state
    KEEP: tl.constexpr,     # a backward pass follows, which needs `states`
    C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """All chunks of one sequence and tile of channels; the state stays in registers, in fp32."""
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    begin, end, chunk = tl.load(bounds + n), tl.load(bounds + n + 1), tl.load(first_chunks + n)
    state = tl.zeros([BD], tl.float32)
    if INITIAL:
        state += tl.load(initial + n * D + cols, mask=cols < D, other=0.0)
    for first in range(begin, end, C):
        t = first + tl.arange(0, C)
        if KEEP:
            tl.store(states + chunk * D + cols, state, mask=cols < D)
        decay = tl.exp(load(g, t, begin, end, D, cols))
        decay, out = tl.associative_scan((decay, load(x, t, begin, end, D, cols)), 0, then)
        out += decay * state[None, :]
        store(h, out, t, end, D, cols)
        state = row_of(out, C - 1, C)
        chunk += 1
    tl.store(final + n * D + cols, state, mask=cols < D)


@triton.jit
def scan_gradient_kernel(
    x, g,                 # [BT, D]
    states,               # [NC, D], fp32: the state before every chunk
    dh,                   # [BT, D]
    dfinal,               # [N, D], fp32, for FINAL
    dx, dg,               # out [BT, D]
    dinitial,             # out [N, D], fp32
    bounds,               # [N + 1], int64: as cu_seqlens
    first_chunks,         # [N], int64: number of a sequence's first chunk
    D,
    FINAL: tl.constexpr,  # the final state has a gradient
    C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """With l_t = dh_t + exp(g_{t+1}) l_{t+1}: dx = l and dg = l exp(g) h_{t-1}; chunks from the
    last to the first. `carry` is exp(g) l of the token after a chunk.
    """
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    begin, end = tl.load(bounds + n), tl.load(bounds + n + 1)
    chunks = (end - begin + C - 1) // C
    chunk = tl.load(first_chunks + n) + chunks
    carry = tl.zeros([BD], tl.float32)
    if FINAL:
        carry += tl.load(dfinal + n * D + cols, mask=cols < D, other=0.0)
    for back in range(0, chunks):
        first, chunk = begin + (chunks - 1 - back) * C, chunk - 1
        t = first + tl.arange(0, C)
        stop = tl.minimum(first + C, end)
        # h_{t-1}: the forward scan again, shifted by one token
        state = tl.load(states + chunk * D + cols, mask=cols < D, other=0.0)
        decay = tl.exp(load(g, t - 1, first, stop, D, cols))
        decay, before = tl.associative_scan((decay, load(x, t - 1, first, stop, D, cols)), 0, then)
        before += decay * state[None, :]
        # l: a scan from the chunk's end, with the decay of the token after each
        decay = tl.exp(load(g, t + 1, begin, stop, D, cols))
        grad = load(dh, t, begin, end, D, cols)
        decay, adjoint = tl.associative_scan((decay, grad), 0, then, reverse=True)
        adjoint += decay * carry[None, :]
        factor = tl.exp(load(g, t, begin, end, D, cols))
        store(dx, adjoint, t, end, D, cols)
        store(dg, adjoint * factor * before, t, end, D, cols)
        carry = row_of(adjoint * factor, 0, C)
    tl.store(dinitial + n * D + cols, carry, mask=cols < D)


def forward(
    x: Tensor, g: Tensor, initial: Tensor | None, cuts: Cuts, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h and the final state of x, g `[BT, D]`, and if `keep` the state before each chunk."""
    N, D = len(cuts.first_chunks), x.shape[1]
    h, final = torch.empty_like(x), x.new_empty(N, D, dtype=torch.float32)
    states = final.new_empty(len(cuts.starts) if keep else 0, D)
    scan_kernel[(N, triton.cdiv(D, CHANNELS))](
        x, g, initial, h, final, states, cuts.bounds, cuts.first_chunks, D,
        INITIAL=initial is not None, KEEP=keep, C=CHUNK, BD=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return h, final, states


def backward(
    x: Tensor, g: Tensor, dh: Tensor, initial: Tensor | None, dfinal: Tensor | None, cuts: Cuts
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, g and the initial state."""
    _, final, states = forward(x, g, initial, cuts, True)
    dx, dg, dinitial = torch.empty_like(x), torch.empty_like(g), torch.empty_like(final)
    N, D = final.shape
    scan_gradient_kernel[(N, triton.cdiv(D, CHANNELS))](
        x, g, states, dh, dfinal, dx, dg, dinitial, cuts.bounds, cuts.first_chunks, D,
        FINAL=dfinal is not None, C=CHUNK, BD=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return dx, dg, dinitial
