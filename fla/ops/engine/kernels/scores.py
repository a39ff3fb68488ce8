# SPDX-License-Identifier: MIT
"""Inside a chunk, for a decay that is none or one number a token: how much of what row j of k (and
a) writes row i of q and b reads. Of the latter the triangular system is solved.

    attention = (q k^T) . D   [and (q a^T) . D beside it]
    delta:      u = T beta (v - b S)            T = (I + beta (b k^T) . D)^-1
    low rank:   u = T (b S) + M v               T = (I - (b a^T) . D)^-1,  M = T (b k^T) . D

One program per chunk and value head.
"""

import triton
import triton.language as tl

from fla.ops.engine.kernels.parts import (
    DELTA,
    LOW_RANK,
    NO_ERASE,
    invert,
    load_row,
    load_rows,
    load_square,
    score_decays,
    store_square,
)


@triton.jit
def scores_kernel(
    q, k, a, b, g, beta, attention, inverse, mixed, below, starts, ends, H, HB, HV,
    K: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr, EARLY: tl.constexpr,
    OWN: tl.constexpr, KEEP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """EARLY: q reads before the decay and the write of its token; OWN: b is given, and reads before
    the decay; KEEP: the rows of b go into `below`.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    h, hb = hv // (HV // H), hv // (HV // HB)
    qk = tl.zeros([C, C], tl.float32)
    qa, bk, ba = qk, qk, qk
    for channel in range(0, K, BK):
        left = load_rows(q, first, live, h, H, K, channel, C, BK)
        right = tl.trans(load_rows(k, first, live, h, H, K, channel, C, BK))
        qk = tl.dot(left, right, qk, input_precision=PRECISION)
        if ERASE != NO_ERASE:
            erase = load_rows(b, first, live, hb, HB, K, channel, C, BK)
            bk = tl.dot(erase, right, bk, input_precision=PRECISION)
        if ERASE == LOW_RANK:
            right = tl.trans(load_rows(a, first, live, hv, HV, K, channel, C, BK))
            qa = tl.dot(left, right, qa, input_precision=PRECISION)
            ba = tl.dot(erase, right, ba, input_precision=PRECISION)
    of_q, of_b = score_decays(g, first, live, hv, HV, DECAY, EARLY, OWN, C)
    number = chunk * HV + hv
    width: tl.constexpr = C * (2 if ERASE == LOW_RANK else 1)
    store_square(attention, qk * of_q, number * C * width, 0, 0, width, C, C)
    bk, ba = bk * of_b, ba * of_b
    if KEEP:
        store_square(below, bk, number * C * width, 0, 0, width, C, C)
    if ERASE == LOW_RANK:
        if KEEP:
            store_square(below, ba, number * C * width, 0, C, width, C, C)
        store_square(attention, qa * of_q, number * C * width, 0, C, width, C, C)
        T = invert(-ba, C, PRECISION)
        store_square(inverse, T, number * C * C, 0, 0, C, C, C)
        M = tl.dot(T, bk, input_precision=PRECISION)
        store_square(mixed, M, number * C * C, 0, 0, C, C, C)
    if ERASE == DELTA:
        rate = load_row(beta, first, live, hv, HV, C).to(tl.float32)
        T = invert(rate[:, None] * bk, C, PRECISION)
        store_square(inverse, T, number * C * C, 0, 0, C, C, C)


@triton.jit
def solve_kernel(
    lower_scores, beta, inverse, mixed, starts, ends, HV,
    ERASE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same solve where another kernel formed the rows of b, `[C, C]` or with a `[C, 2 C]`."""
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    number = (chunk * HV + hv) * C
    if ERASE == LOW_RANK:
        bk = load_square(lower_scores, number * 2 * C, 0, 0, 2 * C, C, C)
        T = invert(-load_square(lower_scores, number * 2 * C, 0, C, 2 * C, C, C), C, PRECISION)
        M = tl.dot(T, bk, input_precision=PRECISION)
        store_square(mixed, M, number * C, 0, 0, C, C, C)
    else:
        first = tl.load(starts + chunk)
        live = tl.minimum(tl.load(ends + chunk) - first, C)
        rate = load_row(beta, first, live, hv, HV, C).to(tl.float32)
        bk = load_square(lower_scores, number * C, 0, 0, C, C, C)
        T = invert(rate[:, None] * bk, C, PRECISION)
    store_square(inverse, T, number * C, 0, 0, C, C, C)
