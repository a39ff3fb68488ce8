# SPDX-License-Identifier: MIT
"""Inside a chunk, for no decay or one number per token: how much row i of q and of b reads of what
row j of k (and of a) writes. The scores of b are the triangular system that is solved.

    attention = (q k^T) . D   [and (q a^T) . D beside it]
    delta:      u = T beta (v - b S)            T = (I + beta (b k^T) . D)^-1
    low rank:   u = T (b S) + M v               T = (I - (b a^T) . D)^-1,  M = T (b k^T) . D

with D_ij the decay from token j to token i. One program per chunk and value head. For the letters
in the shapes see `parts.py`: BT tokens in all, NC chunks, H, HB, HV heads of q and k, of b and of
v, K channels, C tokens per chunk, R = 2 kinds of rows that write for LOW_RANK, else 1.
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
    q, k,                        # [BT, H, K]
    a,                           # [BT, HV, K], for LOW_RANK
    b,                           # [BT, HB, K], with an erase; k where the call has no b
    g,                           # [BT, HV], log decays, for SCALAR
    beta,                        # [BT, HV], for DELTA
    attention,                   # out [NC, HV, C, R C]
    inverse,                     # out [NC, HV, C, C], with an erase: T
    mixed,                       # out [NC, HV, C, C], for LOW_RANK: M
    below,                       # out [NC, HV, C, R C], fp32, for KEEP: the scores of b
    starts, ends,                # [NC], int64: first token of a chunk, end of its sequence
    H, HB, HV,
    K: tl.constexpr,
    DECAY: tl.constexpr,         # NO_DECAY or SCALAR
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    KEEP: tl.constexpr,          # a backward pass follows, which needs `below`
    C: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,     # of matrix products: "ieee" in fp32, else "tf32"
):  # fmt: skip
    """`attention`, and with an erase the inverse of the chunk's system, for one chunk and head."""
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    h, hb = hv // (HV // H), hv // (HV // HB)
    qk = tl.zeros([C, C], tl.float32)
    qa, bk, ba = qk, qk, qk  # squares that no switch below fills are removed by the compiler
    for channel in range(0, K, BK):  # q k^T, q a^T, b k^T and b a^T, summed in fp32
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
    of_q, of_b = score_decays(g, first, live, hv, HV, DECAY, READ_BEFORE, ERASE_BEFORE, C)
    number = chunk * HV + hv
    width: tl.constexpr = C * (2 if ERASE == LOW_RANK else 1)  # R C
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
    lower_scores,             # [NC, HV, C, R C], fp32: the scores of b
    beta,                     # [BT, HV], for DELTA
    inverse,                  # out [NC, HV, C, C]: T
    mixed,                    # out [NC, HV, C, C], for LOW_RANK: M
    starts, ends,             # [NC], int64
    HV,
    ERASE: tl.constexpr,      # DELTA or LOW_RANK
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same solve where `vector.py` formed the scores. It is a kernel of its own because scores
    of a decay per channel are formed by several programs per chunk.
    """
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
