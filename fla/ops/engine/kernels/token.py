# SPDX-License-Identifier: MIT
"""Token by token: the definition, and the step of decoding.

    S' = diag(exp(g)) S diag(exp(gv))
    delta      S = S' + k (beta (v - b S'))^T         b is k, or reads S
    low rank   S = S' + a (b^T S) + k v^T
    o = scale q S        or of the state before its token

One program per sequence, value head and tile of value channels; its state stays in registers.
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
def channels(x, t, head, heads, width, channel, BK: tl.constexpr):
    """Channels of one token and head, in fp32."""
    cols = channel + tl.arange(0, BK)
    at = x + (t * heads + head) * width + cols
    return tl.load(at, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def token_kernel(
    q, k, v, g, beta, gv, a, b, o, initial, final, bounds, scale, H, HV, K: tl.constexpr,
    V: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr, EARLY: tl.constexpr,
    OWN: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, L2NORM: tl.constexpr,
    INITIAL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """COLUMNS: there is a gv; CHANNELS: beta is per value channel."""
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
        if EARLY:
            out = tl.sum(S * left[:, None], 0)
        if OWN:
            erase = channels(b, t, hv, HV, K, 0, BK)
            read = tl.sum(S * erase[:, None], 0)
        if DECAY == VECTOR:
            S *= tl.exp(channels(g, t, hv, HV, K, 0, BK))[:, None]
        if DECAY == SCALAR:
            # one decay for a whole state: its rounding would add up
            factor = tl.exp(tl.load(g + t * HV + hv).to(tl.float64))
            high = factor.to(tl.float32)
            S = S * high + S * (factor - high.to(tl.float64)).to(tl.float32)
        if COLUMNS:
            S *= tl.exp(channels(gv, t, hv, HV, V, column, BV))[None, :]
        if ERASE == DELTA:
            if not OWN:
                read = tl.sum(S * right[:, None], 0)
            if CHANNELS:
                rate = channels(beta, t, hv, HV, V, column, BV)
            else:
                rate = tl.load(beta + t * HV + hv).to(tl.float32)
            value = rate * (value - read)
        if ERASE == LOW_RANK:
            S += channels(a, t, hv, HV, K, 0, BK)[:, None] * read[None, :]
        S += right[:, None] * value[None, :]
        if not EARLY:
            out = tl.sum(S * left[:, None], 0)
        cols = column + tl.arange(0, BV)
        there = o + (t * HV + hv) * V + cols
        tl.store(there, (out * scale).to(o.dtype.element_ty), mask=cols < V)
    store_state(final, S, at, K, V, 0, column, BK, BV)
