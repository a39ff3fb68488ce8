# SPDX-License-Identifier: MIT
"""Token by token: the definition, and the step of decoding.

    S' = diag(exp(g)) S diag(exp(gv))
    delta      S = S' + k (beta (v - b S'))^T         b is k, or reads S
    low rank   S = S' + a (b^T S) + k v^T
    o = scale q S        or, with READ_BEFORE, of the state before its token

One program per sequence, value head and tile of value channels; its tile of the state, all key
channels by BV value channels, stays in registers in fp32. For the letters in the shapes see
`parts.py`: BT tokens in all, N sequences, H heads of q and k, HV value heads, K, V channels.
"""

import triton
import triton.language as tl

from fla.ops.engine.kernels.parts import (
    DELTA,
    LOW_RANK,
    SCALAR,
    VECTOR,
    load_state,
    store_state,
)

L2_EPS = tl.constexpr(1e-6)


@triton.jit
def channels(
    x,                # [BT, heads, width]
    t,
    head,
    heads,
    width,
    channel,          # first channel of the tile
    BK: tl.constexpr,
):  # fmt: skip
    """Channels of one token and head, `[BK]` in fp32; zeros beyond `width`."""
    cols = channel + tl.arange(0, BK)
    at = x + (t * heads + head) * width + cols
    return tl.load(at, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def token_kernel(
    q, k,                        # [BT, H, K]
    v,                           # [BT, HV, V]
    g,                           # log decays: [BT, HV] for SCALAR, [BT, HV, K] for VECTOR
    beta,                        # [BT, HV], or with CHANNELS [BT, HV, V], for DELTA
    gv,                          # [BT, HV, V], log decays of value channels, for COLUMNS
    a, b,                        # [BT, HV, K], for LOW_RANK; b also for ERASE_BEFORE
    o,                           # out [BT, HV, V]
    initial,                     # [N, HV, K, V], fp32, for INITIAL
    final,                       # out [N, HV, K, V], fp32; may be `initial`
    bounds,                      # [N + 1], int64: as cu_seqlens
    scale,
    H, HV,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAY: tl.constexpr,         # NO_DECAY, SCALAR or VECTOR
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    COLUMNS: tl.constexpr,       # there is a gv
    CHANNELS: tl.constexpr,      # beta is per value channel
    L2NORM: tl.constexpr,        # q and k are divided by their norms
    INITIAL: tl.constexpr,       # there is an initial state
    BK: tl.constexpr,            # the power of two that holds K
    BV: tl.constexpr,
):  # fmt: skip
    """The tokens of one sequence, one after the other, for one value head and tile of value
    channels. A program reads its tile of `initial` before it writes the same tile of `final`, so
    both may be one tensor.
    """
    n, hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    column = tl.program_id(1) * BV
    h = hv // (HV // H)
    at = (n * HV + hv) * K * V
    S = tl.zeros([BK, BV], tl.float32)
    if INITIAL:
        S += load_state(initial, at, K, V, 0, column, BK, BV)
    for t in range(tl.load(bounds + n), tl.load(bounds + n + 1)):
        left = channels(q, t, h, H, K, 0, BK)
        right = channels(k, t, h, H, K, 0, BK)
        if L2NORM:
            left *= 1 / tl.sqrt(tl.sum(left * left) + L2_EPS)
            right *= 1 / tl.sqrt(tl.sum(right * right) + L2_EPS)
        value = channels(v, t, hv, HV, V, column, BV)
        # reads of the state before its decay
        if READ_BEFORE:
            out = tl.sum(S * left[:, None], 0)
        if ERASE_BEFORE:
            erase = channels(b, t, hv, HV, K, 0, BK)
            read = tl.sum(S * erase[:, None], 0)
        # S' = diag(exp(g)) S diag(exp(gv))
        if DECAY == VECTOR:
            S *= tl.exp(channels(g, t, hv, HV, K, 0, BK))[:, None]
        if DECAY == SCALAR:
            # all of the state takes the same factor, so its rounding would add up over tokens:
            # multiplied as two fp32 numbers
            factor = tl.exp(tl.load(g + t * HV + hv).to(tl.float64))
            high = factor.to(tl.float32)
            S = S * high + S * (factor - high.to(tl.float64)).to(tl.float32)
        if COLUMNS:
            S *= tl.exp(channels(gv, t, hv, HV, V, column, BV))[None, :]
        # what the token writes: k (v - b S) beta, or a (b S) and k v
        if ERASE == DELTA:
            if not ERASE_BEFORE:
                read = tl.sum(S * right[:, None], 0)
            if CHANNELS:
                rate = channels(beta, t, hv, HV, V, column, BV)
            else:
                rate = tl.load(beta + t * HV + hv).to(tl.float32)
            value = rate * (value - read)
        if ERASE == LOW_RANK:
            S += channels(a, t, hv, HV, K, 0, BK)[:, None] * read[None, :]
        S += right[:, None] * value[None, :]
        if not READ_BEFORE:
            out = tl.sum(S * left[:, None], 0)
        cols = column + tl.arange(0, BV)
        there = o + (t * HV + hv) * V + cols
        tl.store(there, (out * scale).to(o.dtype.element_ty), mask=cols < V)
    store_state(final, S, at, K, V, 0, column, BK, BV)
