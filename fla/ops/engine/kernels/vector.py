# SPDX-License-Identifier: MIT
"""Decay per channel. Factors are multiplied, never divided, and sums of logs never subtracted: any
decay down to -inf is exact to rounding.

From and to the edges of a chunk they are running products over its rows. Between tokens i and j of
different blocks of 16 they are the product to the border of one block times that from it on, so
scores are again matrix products; within a block they are multiplied token by token.

One program per chunk, value head and block of rows, or tile of key channels.
"""

import triton
import triton.language as tl

from fla.ops.engine.kernels.parts import (
    BLOCK,
    DELTA,
    LOW_RANK,
    NO_ERASE,
    load_row,
    load_rows,
    load_square,
    store_row,
    store_rows,
    store_square,
)


@triton.jit
def factors(g, first, live, head, heads, K, channel, C: tl.constexpr, BK: tl.constexpr, low=0):
    """`exp(g)`, and 1 where there is no row."""
    return tl.exp(load_rows(g, first, live, head, heads, K, channel, C, BK, low).to(tl.float32))


@triton.jit
def edges_kernel(
    q, k, b, a, g, q_enter, k_leave, b_enter, a_leave, last, starts, ends, H, HB, HV,
    K: tl.constexpr, ERASE: tl.constexpr, EARLY: tl.constexpr, OWN: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows that read, times the decay from the chunk's start, and rows that write, times that to
    its end.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BK
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    h, hb = hv // (HV // H), hv // (HV // HB)
    now = tl.cumprod(factors(g, first, live, hv, HV, K, channel, C, BK), 0)
    before = tl.cumprod(factors(g, first - 1, live, hv, HV, K, channel, C, BK, 1), 0)
    after = factors(g, first + 1, live - 1, hv, HV, K, channel, C, BK)
    after = tl.cumprod(after, 0, reverse=True)
    rows = load_rows(q, first, live, h, H, K, channel, C, BK)
    rows = rows * (before if EARLY else now)
    store_rows(q_enter, rows, first, live, hv, HV, K, channel, C, BK)
    rows = load_rows(k, first, live, h, H, K, channel, C, BK) * after
    store_rows(k_leave, rows, first, live, hv, HV, K, channel, C, BK)
    if ERASE != NO_ERASE:
        rows = load_rows(b, first, live, hb, HB, K, channel, C, BK)
        rows = rows * (before if OWN else now)
        store_rows(b_enter, rows, first, live, hv, HV, K, channel, C, BK)
    if ERASE == LOW_RANK:
        rows = load_rows(a, first, live, hv, HV, K, channel, C, BK) * after
        store_rows(a_leave, rows, first, live, hv, HV, K, channel, C, BK)
    cols = channel + tl.arange(0, BK)
    ends_at = tl.where((tl.arange(0, C) == C - 1)[:, None], now, 0.0)
    tl.store(last + (chunk * HV + hv) * K + cols, tl.sum(ends_at, 0), mask=cols < K)


@triton.jit
def one_row(x, first, i, live, head, heads, K, channel, BK: tl.constexpr):
    """Row i of a chunk, `[BK]`."""
    cols = channel + tl.arange(0, BK)
    at = ((first + i) * heads + head) * K + cols
    return tl.load(x + at, mask=(cols < K) & (i < live), other=0.0).to(tl.float32)


@triton.jit
def put_column(scores, column, i):
    """`scores` `[BLOCK, BLOCK]` with column i."""
    return tl.where((tl.arange(0, BLOCK) == i)[None, :], scores + column[:, None], scores)


@triton.jit
def vector_scores_kernel(
    q, k, a, b, g, attention, below, starts, ends, H, HB, HV, K: tl.constexpr,
    ERASE: tl.constexpr, EARLY: tl.constexpr, OWN: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of 16 rows of q with all rows before them, into `attention`, and of b, into
    `below`.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top = tl.program_id(2) * BLOCK
    start = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - start, C)
    first, rest = start + top, live - top  # of the block
    h, hb = hv // (HV // H), hv // (HV // HB)
    far = tl.zeros([BLOCK, C], tl.float32)
    q_a, b_k, b_a = far, far, far
    near = tl.zeros([BLOCK, BLOCK], tl.float32)  # transposed
    near_qa, near_bk, near_ba = near, near, near
    small = tl.arange(0, BLOCK)
    for channel in range(0, K, BK):
        now = tl.cumprod(factors(g, first, rest, hv, HV, K, channel, BLOCK, BK), 0)
        before = tl.cumprod(factors(g, first - 1, rest, hv, HV, K, channel, BLOCK, BK, 1), 0)
        after = factors(g, start + 1, tl.minimum(top, live) - 1, hv, HV, K, channel, C, BK)
        after = tl.cumprod(after, 0, reverse=True)  # from each row before the block to its border
        to_block = tl.minimum(top, live)
        right = load_rows(k, start, to_block, h, H, K, channel, C, BK)
        dtype = right.dtype
        right = tl.trans((right * after).to(dtype))
        left = load_rows(q, first, rest, h, H, K, channel, BLOCK, BK)
        left = (left * (before if EARLY else now)).to(dtype)
        far = tl.dot(left, right, far, input_precision=PRECISION)
        if ERASE != NO_ERASE:
            erase = load_rows(b, first, rest, hb, HB, K, channel, BLOCK, BK)
            erase = (erase * (before if OWN else now)).to(dtype)
            b_k = tl.dot(erase, right, b_k, input_precision=PRECISION)
        if ERASE == LOW_RANK:
            right = load_rows(a, start, to_block, hv, HV, K, channel, C, BK)
            right = tl.trans((right * after).to(dtype))
            q_a = tl.dot(left, right, q_a, input_precision=PRECISION)
            b_a = tl.dot(erase, right, b_a, input_precision=PRECISION)
        own_k = load_rows(k, first, rest, h, H, K, channel, BLOCK, BK).to(tl.float32)
        keys = tl.zeros([BLOCK, BK], tl.float32)  # as they stand after token i
        if ERASE == LOW_RANK:
            own_a = load_rows(a, first, rest, hv, HV, K, channel, BLOCK, BK).to(tl.float32)
            rows = tl.zeros([BLOCK, BK], tl.float32)
        for i in range(0, BLOCK):
            at_q = one_row(q, first, i, rest, h, H, K, channel, BK)[None, :]
            factor = tl.exp(one_row(g, first, i, rest, hv, HV, K, channel, BK))[None, :]
            here = (small == i)[:, None]
            if EARLY:
                near = put_column(near, tl.sum(keys * at_q, 1), i)
                if ERASE == LOW_RANK:
                    near_qa = put_column(near_qa, tl.sum(rows * at_q, 1), i)
            if ERASE != NO_ERASE:
                at_b = one_row(b, first, i, rest, hb, HB, K, channel, BK)[None, :]
                read = keys if OWN else keys * factor
                near_bk = put_column(near_bk, tl.sum(read * at_b, 1), i)
            if ERASE == LOW_RANK:
                near_ba = put_column(near_ba, tl.sum(rows * at_b, 1), i)
                rows = rows * factor + tl.where(here, own_a, 0.0)
            keys = keys * factor + tl.where(here, own_k, 0.0)
            if not EARLY:
                near = put_column(near, tl.sum(keys * at_q, 1), i)
                if ERASE == LOW_RANK:
                    near_qa = put_column(near_qa, tl.sum(rows * at_q, 1), i)
    width: tl.constexpr = C * (2 if ERASE == LOW_RANK else 1)
    number = (chunk * HV + hv) * C * width
    put_block(attention, far, near, number, top, 0, width, C)
    if ERASE != NO_ERASE:
        put_block(below, b_k, near_bk, number, top, 0, width, C)
    if ERASE == LOW_RANK:
        put_block(attention, q_a, near_qa, number, top, C, width, C)
        put_block(below, b_a, near_ba, number, top, C, width, C)


@triton.jit
def put_block(x, far, near, number, top, col, width, C: tl.constexpr):
    """Rows from `top` on: scores with earlier blocks, and with the block itself, transposed."""
    rows, cols = top + tl.arange(0, BLOCK), tl.arange(0, C)
    at = x + number + rows[:, None] * width + (col + cols)[None, :]
    own = (cols >= top) & (cols < top + BLOCK)
    tl.store(at, far.to(x.dtype.element_ty), mask=tl.broadcast_to(~own[None, :], [BLOCK, C]))
    store_square(x, tl.trans(near), number, top, col + top, width, BLOCK, BLOCK)


@triton.jit
def vector_rows_kernel(
    q, k, b, a, g, beta, scores_grad, dq, dk, db, da, dbeta, starts, ends, plane, H, HB, HV,
    dg, dlast, K: tl.constexpr, ERASE: tl.constexpr, EARLY: tl.constexpr, OWN: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `rows_kernel`, block after block from the last one: also multiplies what the edges gave
    by the decays to and from them.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BK
    start = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - start, C)
    h, hb = hv // (HV // H), hv // (HV // HB)
    cols = channel + tl.arange(0, BK)
    carried = tl.load(dlast + (chunk * HV + hv) * K + cols, mask=cols < K, other=0.0)
    for back in range(0, C // BLOCK):
        top = C - BLOCK - back * BLOCK
        rest = live - top
        if rest > 0:
            carried = block_gradient(
                q, k, b, a, g, beta, scores_grad, dq, dk, db, da, dg, dbeta, carried, start, top,
                live, (chunk * HV + hv), plane * tl.program_id(2).to(tl.int64), h, hb, hv, H, HB,
                HV, K, channel, ERASE, EARLY, OWN, C, BK, PRECISION,
            )  # fmt: skip


@triton.jit
def far_scores(x, number, row, col, top, width, READS: tl.constexpr, C: tl.constexpr):
    """`[BLOCK, C]` of a matrix: rows of the block at `top` with the columns before it, or its
    columns, transposed, with the rows behind it.
    """
    other = tl.arange(0, C)
    if READS:
        W = load_square(x, number, row + top, col, width, BLOCK, C)
        return tl.where((other < top)[None, :], W, 0.0)
    else:
        W = tl.trans(load_square(x, number, row, col + top, width, C, BLOCK))
        return tl.where((other >= top + BLOCK)[None, :], W, 0.0)


@triton.jit
def block_gradient(
    q, k, b, a, g, beta, scores_grad, dq, dk, db, da, dg, dbeta, carried, start, top, live,
    matrix, part, h, hb, hv, H, HB, HV, K: tl.constexpr, channel, ERASE: tl.constexpr,
    EARLY: tl.constexpr, OWN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The 16 rows from `top` on; returns the gradient of the log decay that goes on to earlier
    ones.
    """
    first, rest = start + top, live - top
    height: tl.constexpr = C * (1 if ERASE == NO_ERASE else 2)
    width: tl.constexpr = C * (2 if ERASE == LOW_RANK else 1)
    number = matrix * height * width
    small = tl.arange(0, BLOCK)
    # decays: within the block, from its border on for later rows, to its border for earlier ones
    now = tl.cumprod(factors(g, first, rest, hv, HV, K, channel, BLOCK, BK), 0)
    before = tl.cumprod(factors(g, first - 1, rest, hv, HV, K, channel, BLOCK, BK, 1), 0)
    after = factors(g, first + 1, tl.minimum(rest - 1, BLOCK - 1), hv, HV, K, channel, BLOCK, BK)
    after = tl.cumprod(after, 0, reverse=True)
    border = top + BLOCK
    later = tl.cumprod(factors(g, start, live, hv, HV, K, channel, C, BK, border), 0)
    later_before = tl.cumprod(factors(g, start - 1, live, hv, HV, K, channel, C, BK, border + 1), 0)
    earlier = factors(g, start + 1, tl.minimum(top, live) - 1, hv, HV, K, channel, C, BK)
    earlier = tl.cumprod(earlier, 0, reverse=True)
    to_start = tl.cumprod(factors(g, start, tl.minimum(top, live), hv, HV, K, channel, C, BK), 0)
    to_start = tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], to_start, 0.0), 0)[None, :]
    to_end = tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], later, 0.0), 0)[None, :]
    by_q = before if EARLY else now
    by_b = before if OWN else now
    dtype = k.dtype.element_ty
    of_q = load_rows(dq, first, rest, hv, HV, K, channel, BLOCK, BK) * to_start
    of_k = load_rows(dk, first, rest, hv, HV, K, channel, BLOCK, BK) * to_end
    of_b, of_a = of_q, of_k
    keys = load_rows(k, start, live, h, H, K, channel, C, BK)
    keys = (keys * earlier).to(dtype)
    W = far_scores(scores_grad, number, 0, 0, top, width, True, C).to(dtype)
    of_q = tl.dot(W, keys, of_q, input_precision=PRECISION)
    left = load_rows(q, start, live, h, H, K, channel, C, BK)
    left = (left * (later_before if EARLY else later)).to(dtype)
    W = far_scores(scores_grad, number, 0, 0, top, width, False, C).to(dtype)
    of_k = tl.dot(W, left, of_k, input_precision=PRECISION)
    if ERASE != NO_ERASE:
        of_b = load_rows(db, first, rest, hv, HV, K, channel, BLOCK, BK) * to_start
        W = far_scores(scores_grad, number, C, 0, top, width, True, C).to(dtype)
        of_b = tl.dot(W, keys, of_b, input_precision=PRECISION)
        erase = load_rows(b, start, live, hb, HB, K, channel, C, BK)
        if ERASE == DELTA:  # what b reads enters with -beta
            rate = load_row(beta, start, live, hv, HV, C).to(tl.float32)
            erase = -rate[:, None] * erase
        erase = (erase * (later_before if OWN else later)).to(dtype)
        W = far_scores(scores_grad, number, C, 0, top, width, False, C).to(dtype)
        of_k = tl.dot(W, erase, of_k, input_precision=PRECISION)
    if ERASE == LOW_RANK:
        rows = load_rows(a, start, live, hv, HV, K, channel, C, BK)
        rows = (rows * earlier).to(dtype)
        W = far_scores(scores_grad, number, 0, C, top, width, True, C).to(dtype)
        of_q = tl.dot(W, rows, of_q, input_precision=PRECISION)
        W = far_scores(scores_grad, number, C, C, top, width, True, C).to(dtype)
        of_b = tl.dot(W, rows, of_b, input_precision=PRECISION)
        of_a = load_rows(da, first, rest, hv, HV, K, channel, BLOCK, BK) * to_end
        W = far_scores(scores_grad, number, 0, C, top, width, False, C).to(dtype)
        of_a = tl.dot(W, left, of_a, input_precision=PRECISION)
        W = far_scores(scores_grad, number, C, C, top, width, False, C).to(dtype)
        of_a = tl.dot(W, erase, of_a, input_precision=PRECISION)
    of_q, of_b, of_k, of_a = of_q * by_q, of_b * by_b, of_k * after, of_a * after
    # within the block: right rows as they stand after token i, forward; their gradients, backward
    own_k = load_rows(k, first, rest, h, H, K, channel, BLOCK, BK).to(tl.float32)
    own_a = own_k
    if ERASE == LOW_RANK:
        own_a = load_rows(a, first, rest, hv, HV, K, channel, BLOCK, BK).to(tl.float32)
    keys, rows = tl.zeros([BLOCK, BK], tl.float32), tl.zeros([BLOCK, BK], tl.float32)
    for i in range(0, BLOCK):
        here = (small == i)[:, None]
        factor = tl.exp(one_row(g, first, i, rest, hv, HV, K, channel, BK))[None, :]
        at = number + (top + i) * width + top + small
        w = tl.load(scores_grad + at)
        if EARLY:
            of_q += tl.where(here, tl.sum(w[:, None] * keys, 0)[None, :], 0.0)
        if ERASE != NO_ERASE:
            wb = tl.load(scores_grad + at + C * width)
            read = keys if OWN else keys * factor
            of_b += tl.where(here, tl.sum(wb[:, None] * read, 0)[None, :], 0.0)
        if ERASE == LOW_RANK:
            wa = tl.load(scores_grad + at + C)
            if EARLY:
                of_q += tl.where(here, tl.sum(wa[:, None] * rows, 0)[None, :], 0.0)
            wa = tl.load(scores_grad + at + C * width + C)
            of_b += tl.where(here, tl.sum(wa[:, None] * rows, 0)[None, :], 0.0)
            rows = rows * factor + tl.where(here, own_a, 0.0)
        keys = keys * factor + tl.where(here, own_k, 0.0)
        if not EARLY:
            of_q += tl.where(here, tl.sum(w[:, None] * keys, 0)[None, :], 0.0)
            if ERASE == LOW_RANK:
                wa = tl.load(scores_grad + at + C)
                of_q += tl.where(here, tl.sum(wa[:, None] * rows, 0)[None, :], 0.0)
    near_k, near_a = tl.zeros([BLOCK, BK], tl.float32), tl.zeros([BLOCK, BK], tl.float32)
    for back in range(0, BLOCK):
        i = BLOCK - 1 - back
        factor = tl.exp(one_row(g, first, i, rest, hv, HV, K, channel, BK))[None, :]
        at = number + (top + i) * width + top + small
        at_q = one_row(q, first, i, rest, h, H, K, channel, BK)[None, :]
        w = tl.load(scores_grad + at)[:, None]
        if ERASE == LOW_RANK:
            wa = tl.load(scores_grad + at + C)[:, None]
        if not EARLY:
            near_k += w * at_q
            if ERASE == LOW_RANK:
                near_a += wa * at_q
        if ERASE != NO_ERASE:
            at_b = one_row(b, first, i, rest, hb, HB, K, channel, BK)[None, :]
            if ERASE == DELTA:
                at_b *= -tl.load(beta + (first + i) * HV + hv, mask=i < rest, other=0.0).to(
                    tl.float32
                )
            wb = tl.load(scores_grad + at + C * width)[:, None]
            if not OWN:
                near_k += wb * at_b
        passed = small[:, None] < i
        near_k = tl.where(passed, near_k * factor, near_k)
        if EARLY:
            near_k += w * at_q
        if ERASE != NO_ERASE and OWN:
            near_k += wb * at_b
        if ERASE == LOW_RANK:
            near_a = tl.where(passed, near_a * factor, near_a)
            if EARLY:
                near_a += wa * at_q
            near_a += tl.load(scores_grad + at + C * width + C)[:, None] * at_b
    of_k += near_k
    of_a += near_a
    return finish_block(
        q, k, b, a, g, beta, dq, dk, db, da, dg, dbeta, of_q, of_k, of_b, of_a, carried, first,
        rest, part, h, hb, hv, H, HB, HV, K, channel, ERASE, EARLY, OWN, BK,
    )  # fmt: skip


@triton.jit
def finish_block(
    q, k, b, a, g, beta, dq, dk, db, da, dg, dbeta, of_q, of_k, of_b, of_a, carried, first,
    rest, part, h, hb, hv, H, HB, HV, K: tl.constexpr, channel, ERASE: tl.constexpr,
    EARLY: tl.constexpr, OWN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a block's gradients of rows, and from them those of its rates and log decays."""
    Q = load_rows(q, first, rest, h, H, K, channel, BLOCK, BK)
    keys = load_rows(k, first, rest, h, H, K, channel, BLOCK, BK)
    read, early = of_q * Q, tl.zeros([BLOCK, BK], tl.float32)
    if EARLY:
        read, early = early, read
    if ERASE != NO_ERASE:
        erase = load_rows(b, first, rest, hb, HB, K, channel, BLOCK, BK)
        if ERASE == DELTA:
            rate = load_row(beta, first, rest, hv, HV, BLOCK).to(tl.float32)
            store_row(dbeta + part, -tl.sum(of_b * erase, 1), first, rest, hv, HV, BLOCK)
            of_b = -rate[:, None] * of_b
        if OWN:
            early += of_b * erase
        else:
            read += of_b * erase
        store_rows(db, of_b, first, rest, hv, HV, K, channel, BLOCK, BK)
    read -= of_k * keys
    if ERASE == LOW_RANK:
        rows = load_rows(a, first, rest, hv, HV, K, channel, BLOCK, BK)
        read -= of_a * rows
        store_rows(da, of_a, first, rest, hv, HV, K, channel, BLOCK, BK)
    total = tl.cumsum(read + early, 0, reverse=True) - early + carried[None, :]
    factor = factors(g, first, rest, hv, HV, K, channel, BLOCK, BK)
    total = tl.where(factor == 0.0, 0.0, total)  # a reset passes nothing, but for rounding
    store_rows(dg, total, first, rest, hv, HV, K, channel, BLOCK, BK)
    store_rows(dq, of_q, first, rest, hv, HV, K, channel, BLOCK, BK)
    store_rows(dk, of_k, first, rest, hv, HV, K, channel, BLOCK, BK)
    return carried + tl.sum(read + early, 0)
