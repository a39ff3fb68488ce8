# SPDX-License-Identifier: MIT
"""The vector scan, `engine/scan/vector.py`, and its gradient: `h_t = exp(g_t) h_{t-1} + x_t`.

One program per sequence and tile of channels. A chunk is one associative scan over its tokens from
a state of zero, to which the state before it is added times the decay since.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.engine.kernels.launch import CHUNK, Cuts

CHANNELS, WARPS = 64, 4


@triton.jit
def then(decay, x, next_decay, next_x):
    """Two stretches of tokens, one after the other."""
    return decay * next_decay, next_x + next_decay * x


@triton.jit
def load(x, t, first, last, D, cols):
    """Rows `first <= t < last` in fp32; zeros elsewhere."""
    there = ((t >= first) & (t < last))[:, None] & (cols < D)[None, :]
    return tl.load(x + t[:, None] * D + cols[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def store(x, value, t, last, D, cols):
    there = (t < last)[:, None] & (cols < D)[None, :]
    tl.store(x + t[:, None] * D + cols[None, :], value.to(x.dtype.element_ty), mask=there)


@triton.jit
def row_of(x, i, C: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, C) == i)[:, None], x, 0.0), 0)


@triton.jit
def scan_kernel(
    x, g, initial, h, final, states, bounds, first_chunks, D, INITIAL: tl.constexpr,
    KEEP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """KEEP: the state before every chunk goes into `states` `[chunks, D]`."""
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
    x, g, states, dh, dfinal, dx, dg, dinitial, bounds, first_chunks, D, FINAL: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """With l_t = dh_t + exp(g_{t+1}) l_{t+1}: dx = l and dg = l exp(g) h_{t-1}; chunks from the
    last to the first, `carry` what a later one gives.
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
        state = tl.load(states + chunk * D + cols, mask=cols < D, other=0.0)
        decay = tl.exp(load(g, t - 1, first, stop, D, cols))
        decay, before = tl.associative_scan((decay, load(x, t - 1, first, stop, D, cols)), 0, then)
        before += decay * state[None, :]
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
    """h and the final state of x, g `[tokens, D]`, and where `keep` the state before each chunk."""
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
