# SPDX-License-Identifier: MIT
"""Decay per channel: scores, rows at a chunk's edges, and the gradients of both. Decays are
products of factors, never quotients, and never differences of sums of logs: any decay down to -inf
is exact to rounding.

From and to the edges of a chunk the decays are running products over its rows. Between tokens of
different blocks of 16 the decay is the product from the write to the border of the reading block
times the product from that border to the read, so scores are again matrix products; within a block
rows are multiplied token by token.

One program per chunk, value head and block of rows, or tile of key channels. For the letters in the
shapes see `parts.py`: BT tokens in all, NC chunks, H, HB, HV heads of q and k, of b and of v, K
channels, C tokens per chunk, BK channels per program, L = 2 kinds of rows that read with an erase,
R = 2 kinds of rows that write for LOW_RANK, else 1.
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
def factors(
    g,                # [BT, heads, K], log decays
    first,
    live,
    head,
    heads,
    K,
    channel,          # first channel of the tile
    C: tl.constexpr,
    BK: tl.constexpr,
    low=0,            # first row that is read
):  # fmt: skip
    """`exp(g)` of rows `low <= i < live`, `[C, BK]` in fp32; 1 elsewhere, which changes no product.
    With `first` moved by a row, and `low` or `live` with it, row i holds its neighbour's factor.
    """
    return tl.exp(load_rows(g, first, live, head, heads, K, channel, C, BK, low).to(tl.float32))


@triton.jit
def edges_kernel(
    q, k,                        # [BT, H, K]
    b,                           # [BT, HB, K], with an erase; k where the call has no b
    a,                           # [BT, HV, K], for LOW_RANK
    g,                           # [BT, HV, K], log decays
    q_enter, k_leave,            # out [BT, HV, K]
    b_enter, a_leave,            # out [BT, HV, K], with an erase, and for LOW_RANK
    last,                        # out [NC, HV, K], fp32: the decay of the whole chunk
    starts, ends,                # [NC], int64: first token of a chunk, end of its sequence
    H, HB, HV,
    K: tl.constexpr,
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    C: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Rows that read, times the decay from the chunk's start, and rows that write, times the decay
    to the chunk's end, of one chunk, value head and tile of key channels.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BK
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    h, hb = hv // (HV // H), hv // (HV // HB)
    # decays from the chunk's start to after and to before each token's own, and from after each
    # token to the chunk's end; each a running product, since a quotient would be 0 / 0 at a reset
    now = tl.cumprod(factors(g, first, live, hv, HV, K, channel, C, BK), 0)
    before = tl.cumprod(factors(g, first - 1, live, hv, HV, K, channel, C, BK, 1), 0)
    after = factors(g, first + 1, live - 1, hv, HV, K, channel, C, BK)
    after = tl.cumprod(after, 0, reverse=True)
    rows = load_rows(q, first, live, h, H, K, channel, C, BK)
    rows = rows * (before if READ_BEFORE else now)
    store_rows(q_enter, rows, first, live, hv, HV, K, channel, C, BK)
    rows = load_rows(k, first, live, h, H, K, channel, C, BK) * after
    store_rows(k_leave, rows, first, live, hv, HV, K, channel, C, BK)
    if ERASE != NO_ERASE:
        rows = load_rows(b, first, live, hb, HB, K, channel, C, BK)
        rows = rows * (before if ERASE_BEFORE else now)
        store_rows(b_enter, rows, first, live, hv, HV, K, channel, C, BK)
    if ERASE == LOW_RANK:
        rows = load_rows(a, first, live, hv, HV, K, channel, C, BK) * after
        store_rows(a_leave, rows, first, live, hv, HV, K, channel, C, BK)
    cols = channel + tl.arange(0, BK)
    ends_at = tl.where((tl.arange(0, C) == C - 1)[:, None], now, 0.0)
    tl.store(last + (chunk * HV + hv) * K + cols, tl.sum(ends_at, 0), mask=cols < K)


@triton.jit
def one_row(
    x,                # [BT, heads, K]
    first,
    i,
    live,
    head,
    heads,
    K,
    channel,          # first channel of the tile
    BK: tl.constexpr,
):  # fmt: skip
    """Row i of a block, `[BK]` in fp32; zeros where there is no token."""
    cols = channel + tl.arange(0, BK)
    at = ((first + i) * heads + head) * K + cols
    return tl.load(x + at, mask=(cols < K) & (i < live), other=0.0).to(tl.float32)


@triton.jit
def put_column(
    scores,  # [BLOCK, BLOCK]
    column,  # [BLOCK]
    i,
):  # fmt: skip
    """`scores` with `column` added to column i. A mask, since registers have no index."""
    return tl.where((tl.arange(0, BLOCK) == i)[None, :], scores + column[:, None], scores)


@triton.jit
def vector_scores_kernel(
    q, k,                        # [BT, H, K]
    a,                           # [BT, HV, K], for LOW_RANK
    b,                           # [BT, HB, K], with an erase; k where the call has no b
    g,                           # [BT, HV, K], log decays
    attention,                   # out [NC, HV, C, R C]: scores of q
    below,                       # out [NC, HV, C, R C], fp32, with an erase: scores of b
    starts, ends,                # [NC], int64: first token of a chunk, end of its sequence
    H, HB, HV,
    K: tl.constexpr,
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    C: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,     # of matrix products: "ieee" in fp32, else "tf32"
):  # fmt: skip
    """The scores of one block of 16 rows of q and b with all rows of the chunk before them."""
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top = tl.program_id(2) * BLOCK
    start = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - start, C)
    first, rest = start + top, live - top  # the block's first token, and how many it has
    h, hb = hv // (HV // H), hv // (HV // HB)
    far = tl.zeros([BLOCK, C], tl.float32)  # with the rows of earlier blocks
    q_a, b_k, b_a = far, far, far
    near = tl.zeros([BLOCK, BLOCK], tl.float32)  # within the block, transposed: [write, read]
    near_qa, near_bk, near_ba = near, near, near
    small = tl.arange(0, BLOCK)
    for channel in range(0, K, BK):
        # from the block's border to after and to before each of its tokens' decays
        now = tl.cumprod(factors(g, first, rest, hv, HV, K, channel, BLOCK, BK), 0)
        before = tl.cumprod(factors(g, first - 1, rest, hv, HV, K, channel, BLOCK, BK, 1), 0)
        after = factors(g, start + 1, tl.minimum(top, live) - 1, hv, HV, K, channel, C, BK)
        after = tl.cumprod(after, 0, reverse=True)  # from each row before the block to its border
        to_block = tl.minimum(top, live)
        right = load_rows(k, start, to_block, h, H, K, channel, C, BK)
        dtype = right.dtype
        right = tl.trans((right * after).to(dtype))
        left = load_rows(q, first, rest, h, H, K, channel, BLOCK, BK)
        left = (left * (before if READ_BEFORE else now)).to(dtype)
        far = tl.dot(left, right, far, input_precision=PRECISION)
        if ERASE != NO_ERASE:
            erase = load_rows(b, first, rest, hb, HB, K, channel, BLOCK, BK)
            erase = (erase * (before if ERASE_BEFORE else now)).to(dtype)
            b_k = tl.dot(erase, right, b_k, input_precision=PRECISION)
        if ERASE == LOW_RANK:
            right = load_rows(a, start, to_block, hv, HV, K, channel, C, BK)
            right = tl.trans((right * after).to(dtype))
            q_a = tl.dot(left, right, q_a, input_precision=PRECISION)
            b_a = tl.dot(erase, right, b_a, input_precision=PRECISION)
        # within the block: writes decay token by token, in registers, and each token reads them
        # before its decay, after it (b), or after its own write (q)
        own_k = load_rows(k, first, rest, h, H, K, channel, BLOCK, BK).to(tl.float32)
        keys = tl.zeros([BLOCK, BK], tl.float32)  # as they stand after token i
        if ERASE == LOW_RANK:
            own_a = load_rows(a, first, rest, hv, HV, K, channel, BLOCK, BK).to(tl.float32)
            rows = tl.zeros([BLOCK, BK], tl.float32)
        for i in range(0, BLOCK):
            at_q = one_row(q, first, i, rest, h, H, K, channel, BK)[None, :]
            factor = tl.exp(one_row(g, first, i, rest, hv, HV, K, channel, BK))[None, :]
            here = (small == i)[:, None]
            if READ_BEFORE:
                near = put_column(near, tl.sum(keys * at_q, 1), i)
                if ERASE == LOW_RANK:
                    near_qa = put_column(near_qa, tl.sum(rows * at_q, 1), i)
            if ERASE != NO_ERASE:
                at_b = one_row(b, first, i, rest, hb, HB, K, channel, BK)[None, :]
                read = keys if ERASE_BEFORE else keys * factor
                near_bk = put_column(near_bk, tl.sum(read * at_b, 1), i)
            if ERASE == LOW_RANK:
                near_ba = put_column(near_ba, tl.sum(rows * at_b, 1), i)
                rows = rows * factor + tl.where(here, own_a, 0.0)
            keys = keys * factor + tl.where(here, own_k, 0.0)
            if not READ_BEFORE:
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
def put_block(
    x,                # matrices of `width` columns, of any dtype
    far,              # [BLOCK, C]: scores with earlier blocks; zeros elsewhere
    near,             # [BLOCK, BLOCK]: scores within the block, transposed
    number,           # int64, offset of the matrix
    top,              # the block's first row
    col,              # first column: 0, or C for scores with a
    width,
    C: tl.constexpr,
):  # fmt: skip
    """Stores a block's rows whole, so that no later kernel reads what was never written. The two
    stores do not overlap, and so need no order.
    """
    rows, cols = top + tl.arange(0, BLOCK), tl.arange(0, C)
    at = x + number + rows[:, None] * width + (col + cols)[None, :]
    own = (cols >= top) & (cols < top + BLOCK)
    tl.store(at, far.to(x.dtype.element_ty), mask=tl.broadcast_to(~own[None, :], [BLOCK, C]))
    store_square(x, tl.trans(near), number, top, col + top, width, BLOCK, BLOCK)


@triton.jit
def vector_rows_kernel(
    q, k,                        # [BT, H, K]
    b,                           # [BT, HB, K], with an erase
    a,                           # [BT, HV, K], for LOW_RANK
    g,                           # [BT, HV, K], log decays
    beta,                        # [BT, HV], for DELTA
    scores_grad,                 # [NC, HV, L C, R C], fp32
    dq, dk,                      # in and out [BT, HV, K], fp32: what `edge_kernel` wrote
    db, da,                      # the same, with an erase, and for LOW_RANK
    dbeta,                       # out [tiles of K, BT, HV], fp32, for DELTA: the part -b y
    starts, ends,                # [NC], int64: first token of a chunk, end of its sequence
    plane,                       # BT HV, numbers of one part of dbeta
    H, HB, HV,
    dg,                          # out [BT, HV, K], fp32
    dlast,                       # [NC, HV, K], fp32: gradient of the chunk's whole log decay
    K: tl.constexpr,
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    C: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `rows_kernel`, block after block from the last one to the first; also multiplies what the
    edges gave by the decays to and from them. What paths give to dg is summed on the way and handed
    from each block to the one before it.
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
                HV, K, channel, ERASE, READ_BEFORE, ERASE_BEFORE, C, BK, PRECISION,
            )  # fmt: skip


@triton.jit
def far_scores(
    x,                    # matrices of `width` columns, fp32
    number,               # int64, offset of the matrix
    row,                  # first row: 0 for q, C for b
    col,                  # first column: 0 for k, C for a
    top,                  # the block's first row
    width,
    READS: tl.constexpr,  # the block reads; else it writes
    C: tl.constexpr,
):  # fmt: skip
    """`[BLOCK, C]` of a matrix of scores: rows of the block with the columns before it, or its
    columns, transposed, with the rows after it.
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
    q, k, b, a, g, beta,         # as in `vector_rows_kernel`
    scores_grad,                 # [NC, HV, L C, R C], fp32
    dq, dk, db, da,              # in and out [BT, HV, K], fp32
    dg,                          # out [BT, HV, K], fp32
    dbeta,                       # out [tiles of K, BT, HV], fp32
    carried,                     # [BK]: what paths of later blocks give to all log decays before
    start,                       # int64, the chunk's first token
    top,                         # the block's first row in it
    live,
    matrix,                      # int64, chunk and value head: number of the matrix of scores
    part,                        # int64, offset of this tile's part of dbeta
    h, hb, hv, H, HB, HV,
    K: tl.constexpr,
    channel,                     # first channel of the tile
    ERASE: tl.constexpr,
    READ_BEFORE: tl.constexpr,
    ERASE_BEFORE: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the block's 16 rows; returns the `carried` of the block before it."""
    first, rest = start + top, live - top
    height: tl.constexpr = C * (1 if ERASE == NO_ERASE else 2)
    width: tl.constexpr = C * (2 if ERASE == LOW_RANK else 1)
    number = matrix * height * width
    small = tl.arange(0, BLOCK)
    # decays within the block; from its end on for later rows, which read what it writes; to its
    # start for earlier rows, which it reads; and over all rows before it and after it
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
    by_q = before if READ_BEFORE else now
    by_b = before if ERASE_BEFORE else now
    dtype = k.dtype.element_ty
    # with the edges and with other blocks, up to the block's border: by_q, by_b and `after` come
    # in once for all of these below
    of_q = load_rows(dq, first, rest, hv, HV, K, channel, BLOCK, BK) * to_start
    of_k = load_rows(dk, first, rest, hv, HV, K, channel, BLOCK, BK) * to_end
    of_b, of_a = of_q, of_k
    keys = load_rows(k, start, live, h, H, K, channel, C, BK)
    keys = (keys * earlier).to(dtype)
    W = far_scores(scores_grad, number, 0, 0, top, width, True, C).to(dtype)
    of_q = tl.dot(W, keys, of_q, input_precision=PRECISION)
    left = load_rows(q, start, live, h, H, K, channel, C, BK)
    left = (left * (later_before if READ_BEFORE else later)).to(dtype)
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
        erase = (erase * (later_before if ERASE_BEFORE else later)).to(dtype)
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
    # within the block, forward: rows that write as they stand after token i, in registers, and
    # from them the gradients of the rows that read
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
        if READ_BEFORE:
            of_q += tl.where(here, tl.sum(w[:, None] * keys, 0)[None, :], 0.0)
        if ERASE != NO_ERASE:
            wb = tl.load(scores_grad + at + C * width)
            read = keys if ERASE_BEFORE else keys * factor
            of_b += tl.where(here, tl.sum(wb[:, None] * read, 0)[None, :], 0.0)
        if ERASE == LOW_RANK:
            wa = tl.load(scores_grad + at + C)
            if READ_BEFORE:
                of_q += tl.where(here, tl.sum(wa[:, None] * rows, 0)[None, :], 0.0)
            wa = tl.load(scores_grad + at + C * width + C)
            of_b += tl.where(here, tl.sum(wa[:, None] * rows, 0)[None, :], 0.0)
            rows = rows * factor + tl.where(here, own_a, 0.0)
        keys = keys * factor + tl.where(here, own_k, 0.0)
        if not READ_BEFORE:
            of_q += tl.where(here, tl.sum(w[:, None] * keys, 0)[None, :], 0.0)
            if ERASE == LOW_RANK:
                wa = tl.load(scores_grad + at + C)
                of_q += tl.where(here, tl.sum(wa[:, None] * rows, 0)[None, :], 0.0)
    # and backward: the gradients of the rows that write, as these stand after token i
    near_k, near_a = tl.zeros([BLOCK, BK], tl.float32), tl.zeros([BLOCK, BK], tl.float32)
    for back in range(0, BLOCK):
        i = BLOCK - 1 - back
        factor = tl.exp(one_row(g, first, i, rest, hv, HV, K, channel, BK))[None, :]
        at = number + (top + i) * width + top + small
        at_q = one_row(q, first, i, rest, h, H, K, channel, BK)[None, :]
        w = tl.load(scores_grad + at)[:, None]
        if ERASE == LOW_RANK:
            wa = tl.load(scores_grad + at + C)[:, None]
        if not READ_BEFORE:
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
            if not ERASE_BEFORE:
                near_k += wb * at_b
        passed = small[:, None] < i  # written before token i, so its decay lies on their way
        near_k = tl.where(passed, near_k * factor, near_k)
        if READ_BEFORE:
            near_k += w * at_q
        if ERASE != NO_ERASE and ERASE_BEFORE:
            near_k += wb * at_b
        if ERASE == LOW_RANK:
            near_a = tl.where(passed, near_a * factor, near_a)
            if READ_BEFORE:
                near_a += wa * at_q
            near_a += tl.load(scores_grad + at + C * width + C)[:, None] * at_b
    of_k += near_k
    of_a += near_a
    return finish_block(
        q, k, b, a, g, beta, dq, dk, db, da, dg, dbeta, of_q, of_k, of_b, of_a, carried, first,
        rest, part, h, hb, hv, H, HB, HV, K, channel, ERASE, READ_BEFORE, ERASE_BEFORE, BK,
    )  # fmt: skip


@triton.jit
def finish_block(
    q, k, b, a, g, beta,         # as in `vector_rows_kernel`
    dq, dk, db, da, dg,          # out [BT, HV, K], fp32
    dbeta,                       # out [tiles of K, BT, HV], fp32
    of_q, of_k, of_b, of_a,      # [BLOCK, BK], fp32: gradients of rows; of_b without -beta
    carried,                     # [BK]: as in `block_gradient`
    first,                       # int64, the block's first token
    rest,                        # how many tokens it has
    part,                        # int64, offset of this tile's part of dbeta
    h, hb, hv, H, HB, HV,
    K: tl.constexpr,
    channel,
    ERASE: tl.constexpr,
    READ_BEFORE: tl.constexpr,
    ERASE_BEFORE: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Stores a block's gradients of rows, and from them those of its rates and log decays: per
    channel, dg_t is what reads from token t on give less what writes from t on give.
    """
    Q = load_rows(q, first, rest, h, H, K, channel, BLOCK, BK)
    keys = load_rows(k, first, rest, h, H, K, channel, BLOCK, BK)
    read, early = of_q * Q, tl.zeros([BLOCK, BK], tl.float32)
    if READ_BEFORE:
        read, early = early, read
    if ERASE != NO_ERASE:
        erase = load_rows(b, first, rest, hb, HB, K, channel, BLOCK, BK)
        if ERASE == DELTA:
            rate = load_row(beta, first, rest, hv, HV, BLOCK).to(tl.float32)
            store_row(dbeta + part, -tl.sum(of_b * erase, 1), first, rest, hv, HV, BLOCK)
            of_b = -rate[:, None] * of_b
        if ERASE_BEFORE:
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
