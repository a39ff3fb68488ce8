# SPDX-License-Identifier: MIT
"""The gradient of `scores.py` and `state.py`. With Z the gradient of the state after a chunk, from
the last chunk to the first:

    m = attention^T (scale do) + k Z                  the gradient of what k wrote, and m_u, with
                                                      a for k, of what a wrote
    delta      r = T^T m_u        dv = beta r         db S = -beta r
    low rank   r = T^T m_u        dv = m_v + M^T m_u  db S = r
    Z' = last Z + q^T (scale do) + b^T (db S)

and then, for all chunks at once, the gradients of rows and of their scores. For a delta rule the
gradient of b is kept without its factor -beta, as `y`: then dbeta = r v - b y.

The gradient of one log decay per token is summed over all paths that pass it: from a write, or the
chunk's start, before it to a read, or the chunk's end, after it. The difference of what reads give
and what writes give is the same sum, but loses digits to cancellation.

For the letters in the shapes see `parts.py`: BT tokens in all, N sequences, NC chunks, HQ, HK, HB,
HV heads of q, k, b and v, K, V channels, C tokens per chunk, BK, BV channels per program, L = 2
kinds of rows that read with an erase, R = 2 kinds of rows that write for LOW_RANK, else 1.
"""

import triton
import triton.language as tl

from fla.ops.engine.kernels.parts import (
    DELTA,
    LOW_RANK,
    NO_ERASE,
    SCALAR,
    VECTOR,
    load_row,
    load_rows,
    load_square,
    load_state,
    logs,
    lower,
    score_decays,
    store_row,
    store_rows,
    store_square,
    store_state,
)
from fla.ops.engine.kernels.state import enter, last_factor, leave


@triton.jit
def state_gradient_kernel(
    q,                           # [BT, HQ, K]; for VECTOR rows that enter, and HQ = HV
    k,                           # [BT, HK, K]; for VECTOR rows that leave, and HK = HV
    b,                           # [BT, HB, K], with an erase; for VECTOR rows that enter
    a,                           # [BT, HV, K], for LOW_RANK; for VECTOR rows that leave
    do,                          # [BT, HV, V]
    g,                           # [BT, HV], log decays, for SCALAR
    beta,                        # [BT, HV], for DELTA
    last,                        # [NC, HV, K], fp32, for VECTOR
    attention,                   # [NC, HV, C, R C]
    inverse, mixed,              # [NC, HV, C, C]: T with an erase, M for LOW_RANK
    states_grad,                 # out [NC, HV, K, V]: Z of every chunk
    solved,                      # out [BT, HV, V], with an erase: r
    dv,                          # out [tiles of K, BT, HV, V], fp32 where there are several
    dfinal,                      # [N, HV, K, V], fp32, for FINAL
    dinitial,                    # out [N, HV, K, V], fp32
    bounds,                      # [N + 1], int64: as cu_seqlens
    first_chunks,                # [N], int64: number of a sequence's first chunk
    scale,
    plane,                       # BT HV V, numbers of one part of dv
    HQ, HK, HB, HV,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAY: tl.constexpr,         # NO_DECAY, SCALAR or VECTOR
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    FINAL: tl.constexpr,         # the final state has a gradient
    C: tl.constexpr,
    BK: tl.constexpr,            # with an erase all of K, as in `state_kernel`
    BV: tl.constexpr,
    PRECISION: tl.constexpr,     # of matrix products: "ieee" in fp32, else "tf32"
):  # fmt: skip
    """All chunks of one sequence, value head and tile of value channels, the last one first;
    without an erase also one tile of key channels, each of which writes a part of dv. Z stays in
    registers, in fp32.
    """
    n, hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    column, channel = tl.program_id(1) * BV, tl.program_id(2) * BK
    dv += tl.program_id(2).to(tl.int64) * plane
    begin, end = tl.load(bounds + n), tl.load(bounds + n + 1)
    chunks = (end - begin + C - 1) // C
    chunk = tl.load(first_chunks + n) + chunks
    hq, hk, hb = hv // (HV // HQ), hv // (HV // HK), hv // (HV // HB)
    dtype = k.dtype.element_ty
    width: tl.constexpr = C * (2 if ERASE == LOW_RANK else 1)
    Z = tl.zeros([BK, BV], tl.float32)
    if FINAL:
        Z += load_state(dfinal, (n * HV + hv) * K * V, K, V, channel, column, BK, BV)
    for back in range(0, chunks):
        first, chunk = begin + (chunks - 1 - back) * C, chunk - 1
        live = tl.minimum(end - first, C)
        number = chunk * HV + hv
        store_state(states_grad, Z, number * K * V, K, V, channel, column, BK, BV)
        one, total = logs(g, first, live, hv, HV, C) if DECAY == SCALAR else (0.0, 0.0)
        all = tl.sum(one) if DECAY == SCALAR else 0.0
        grad = load_rows(do, first, live, hv, HV, V, column, C, BV)
        grad = (grad.to(tl.float32) * scale).to(dtype)
        # m = attention^T (scale do) + k Z, with the Z of the chunk's end
        keys = leave(load_rows(k, first, live, hk, HK, K, channel, C, BK), total, all, DECAY)
        weights = load_square(attention, number * C * width, 0, 0, width, C, C)
        m = tl.dot(tl.trans(weights), grad, input_precision=PRECISION)
        m *= (channel == 0).to(tl.float32)  # tiles of key channels are added: once in all
        m = tl.dot(keys, Z.to(dtype), m, input_precision=PRECISION)
        if ERASE == NO_ERASE:
            store_rows(dv, m, first, live, hv, HV, V, column, C, BV)
        else:
            T = tl.trans(load_square(inverse, number * C * C, 0, 0, C, C, C))
            if ERASE == DELTA:
                r = tl.dot(T, m.to(dtype), input_precision=PRECISION)
                rate = load_row(beta, first, live, hv, HV, C).to(tl.float32)
                m = rate[:, None] * r  # dv
                read = -m  # the gradient of b S
            else:
                rows = leave(load_rows(a, first, live, hv, HV, K, 0, C, BK), total, all, DECAY)
                weights = load_square(attention, number * C * width, 0, C, width, C, C)
                of_u = tl.dot(tl.trans(weights), grad, input_precision=PRECISION)
                of_u = tl.dot(rows, Z.to(dtype), of_u, input_precision=PRECISION).to(dtype)
                M = tl.trans(load_square(mixed, number * C * C, 0, 0, C, C, C))
                m = tl.dot(M, of_u, m, input_precision=PRECISION)
                r = tl.dot(T, of_u, input_precision=PRECISION)
                read = r
            store_rows(solved, r, first, live, hv, HV, V, column, C, BV)
            store_rows(dv, m, first, live, hv, HV, V, column, C, BV)
        # Z' = last Z + q^T (scale do) + b^T (db S)
        Z *= last_factor(last, number, all, K, channel, DECAY, BK)[:, None]
        rows = load_rows(q, first, live, hq, HQ, K, channel, C, BK)
        rows = enter(rows, total - one if READ_BEFORE else total, DECAY)
        Z = tl.dot(tl.trans(rows), grad, Z, input_precision=PRECISION)
        if ERASE != NO_ERASE:
            rows = load_rows(b, first, live, hb, HB, K, 0, C, BK)
            rows = enter(rows, total - one if ERASE_BEFORE else total, DECAY)
            Z = tl.dot(tl.trans(rows), read.to(dtype), Z, input_precision=PRECISION)
    store_state(dinitial, Z, (n * HV + hv) * K * V, K, V, channel, column, BK, BV)


@triton.jit
def score_gradient_kernel(
    do, v,                       # [BT, HV, V]
    beta,                        # [BT, HV], for DELTA
    written, solved,             # [BT, HV, V], with an erase: u and r
    attention,                   # [NC, HV, C, R C]
    below,                       # [NC, HV, C, R C], fp32, with an erase: the scores of b
    scores_grad,                 # out [NC, HV, L C, R C], fp32
    rate_grad,                   # out [BT, HV], fp32, for DELTA: r v, a part of dbeta
    dg,                          # out [BT, HV], fp32, for SCALAR: the part of the chunk itself
    starts, ends,                # [NC], int64: first token of a chunk, end of its sequence
    scale,
    HV,
    V: tl.constexpr,
    DECAY: tl.constexpr,         # NO_DECAY, SCALAR or VECTOR
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    C: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores of q and b (not yet of q k^T and the like: the decays between the
    tokens come in `rows_kernel`), of one chunk and value head; also the part r v of dbeta, and what
    paths within the chunk give to dg.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    of_q = tl.zeros([C, C], tl.float32)  # scores of q with k
    q_a, of_b, b_a = of_q, of_q, of_q  # of q with a, of b with k, of b with a
    rate = tl.zeros([C], tl.float32)
    for column in range(0, V, BV):
        grad = load_rows(do, first, live, hv, HV, V, column, C, BV)
        values = load_rows(v, first, live, hv, HV, V, column, C, BV)
        grad = (grad.to(tl.float32) * scale).to(values.dtype)
        if ERASE == NO_ERASE:
            of_q = tl.dot(grad, tl.trans(values), of_q, input_precision=PRECISION)
        else:
            u = tl.trans(load_rows(written, first, live, hv, HV, V, column, C, BV))
            r = load_rows(solved, first, live, hv, HV, V, column, C, BV)
        if ERASE == DELTA:
            of_q = tl.dot(grad, u, of_q, input_precision=PRECISION)
            of_b = tl.dot(r, u, of_b, input_precision=PRECISION)
            rate += tl.sum(r.to(tl.float32) * values, 1)
        if ERASE == LOW_RANK:
            of_q = tl.dot(grad, tl.trans(values), of_q, input_precision=PRECISION)
            of_b = tl.dot(r, tl.trans(values), of_b, input_precision=PRECISION)
            q_a = tl.dot(grad, u, q_a, input_precision=PRECISION)
            b_a = tl.dot(r, u, b_a, input_precision=PRECISION)
    width: tl.constexpr = C * (2 if ERASE == LOW_RANK else 1)
    height: tl.constexpr = C * (1 if ERASE == NO_ERASE else 2)
    number = (chunk * HV + hv) * height * width
    # above the diagonal there are no scores
    seen, strict = lower(READ_BEFORE, C), lower(True, C)
    of_q, of_b = tl.where(seen, of_q, 0.0), tl.where(strict, of_b, 0.0)
    q_a, b_a = tl.where(seen, q_a, 0.0), tl.where(strict, b_a, 0.0)
    store_square(scores_grad, of_q, number, 0, 0, width, C, C)
    if ERASE != NO_ERASE:
        store_square(scores_grad, of_b, number, C, 0, width, C, C)
    if ERASE == LOW_RANK:
        store_square(scores_grad, q_a, number, 0, C, width, C, C)
        store_square(scores_grad, b_a, number, C, C, width, C, C)
    if ERASE == DELTA:
        store_row(rate_grad, rate, first, live, hv, HV, C)
    if DECAY == SCALAR:
        # a score times its gradient is what its path carries; stored scores contain the decay
        number = (chunk * HV + hv) * C * width
        ways = of_q * load_square(attention, number, 0, 0, width, C, C)
        if ERASE == LOW_RANK:
            ways += q_a * load_square(attention, number, 0, C, width, C, C)
        total = passing(ways, READ_BEFORE, C)
        if ERASE != NO_ERASE:
            ways = of_b * load_square(below, number, 0, 0, width, C, C)
            if ERASE == DELTA:
                ways *= -load_row(beta, first, live, hv, HV, C).to(tl.float32)[:, None]
            else:
                ways += b_a * load_square(below, number, 0, C, width, C, C)
            total += passing(ways, ERASE_BEFORE, C)
        store_row(dg, total, first, live, hv, HV, C)


@triton.jit
def passing(
    ways,                  # [C, C]: what the path from the write of j to the read of i carries
    BEFORE: tl.constexpr,  # the read is before the decay of its token
    C: tl.constexpr,
):  # fmt: skip
    """The sum over the paths that pass the decay of token t, `[C]`: those from a write j < t to a
    read i >= t, or i > t.
    """
    before = tl.cumsum(ways, 1) - ways  # [i, t]: over j < t
    return tl.sum(tl.where(lower(BEFORE, C), before, 0.0), 0)


@triton.jit
def edge_kernel(
    q, k,                        # [BT, HK, K]; for VECTOR rows that enter and leave, and HK = HV
    b,                           # [BT, HB, K], with an erase; for VECTOR rows that enter
    a,                           # [BT, HV, K], for LOW_RANK; for VECTOR rows that leave
    do, v,                       # [BT, HV, V]
    g,                           # [BT, HV], log decays, for SCALAR
    beta,                        # [BT, HV], for DELTA
    last,                        # [NC, HV, K], fp32, for VECTOR
    states, states_grad,         # [NC, HV, K, V]: S before, and Z after every chunk
    written, solved,             # [BT, HV, V], with an erase: u and r
    dq, dk,                      # out [BT, HV, K], fp32
    db, da,                      # out [BT, HV, K], fp32, with an erase, and for LOW_RANK
    dg,                          # out [tiles of K, BT, HV], fp32, for SCALAR
    dlast,                       # out [NC, HV, K], fp32, for VECTOR
    starts, ends,                # [NC], int64: first token of a chunk, end of its sequence
    scale,
    plane,                       # BT HV, numbers of one part of dg
    HK, HB, HV,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAY: tl.constexpr,         # NO_DECAY, SCALAR or VECTOR
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the states at the edges of one chunk give to the gradients of rows and of the decay, for
    one value head and tile of key channels. For VECTOR the gradients of rows still lack the decays
    to and from the edges (`vector_rows_kernel` multiplies them in), and `dlast` is the gradient of
    the log decay of the whole chunk; for SCALAR each tile writes its part of dg.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BK
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    number = chunk * HV + hv
    of_q, of_k = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    of_b, of_a = of_q, of_q
    through = tl.zeros([BK], tl.float32)  # S Z: what passes from edge to edge
    for column in range(0, V, BV):  # dq = scale do S, y = r S, dk = u Z (or v Z), da = u Z
        S = load_state(states, number * K * V, K, V, channel, column, BK, BV)
        Z = load_state(states_grad, number * K * V, K, V, channel, column, BK, BV)
        through += tl.sum(S.to(tl.float32) * Z, 1)
        S, Z = tl.trans(S), tl.trans(Z)
        grad = load_rows(do, first, live, hv, HV, V, column, C, BV)
        of_q = tl.dot((grad.to(tl.float32) * scale).to(S.dtype), S, of_q, input_precision=PRECISION)
        if ERASE != NO_ERASE:
            u = load_rows(written, first, live, hv, HV, V, column, C, BV)
            r = load_rows(solved, first, live, hv, HV, V, column, C, BV)
            of_b = tl.dot(r, S, of_b, input_precision=PRECISION)
        if ERASE == DELTA:
            of_k = tl.dot(u, Z, of_k, input_precision=PRECISION)
        else:
            values = load_rows(v, first, live, hv, HV, V, column, C, BV)
            of_k = tl.dot(values, Z, of_k, input_precision=PRECISION)
        if ERASE == LOW_RANK:
            of_a = tl.dot(u, Z, of_a, input_precision=PRECISION)
    one, total = logs(g, first, live, hv, HV, C) if DECAY == SCALAR else (0.0, 0.0)
    all = tl.sum(one) if DECAY == SCALAR else 0.0
    through *= last_factor(last, number, all, K, channel, DECAY, BK)
    hk = hv // (HV // HK)
    if DECAY == SCALAR:
        logs_q = total - one if READ_BEFORE else total
        logs_b = total - one if ERASE_BEFORE else total
        of_q = of_q * tl.exp(logs_q.to(tl.float32))[:, None]
        of_b = of_b * tl.exp(logs_b.to(tl.float32))[:, None]
        to_end = tl.exp((all - total).to(tl.float32))[:, None]
        of_k *= to_end
        of_a *= to_end
        # what each token's reads take from the chunk's start: after its own decay, or before it
        late = tl.sum(of_q * load_rows(q, first, live, hk, HK, K, channel, C, BK), 1)
        early = tl.zeros([C], tl.float32)
        if READ_BEFORE:
            late, early = early, late
        if ERASE != NO_ERASE:
            read = load_rows(b, first, live, hv // (HV // HB), HB, K, channel, C, BK)
            read = tl.sum(of_b * read, 1)
            if ERASE == DELTA:
                read *= -load_row(beta, first, live, hv, HV, C).to(tl.float32)
            if ERASE_BEFORE:
                early += read
            else:
                late += read
        # and what its writes give to the chunk's end
        left = tl.sum(of_k * load_rows(k, first, live, hk, HK, K, channel, C, BK), 1)
        if ERASE == LOW_RANK:
            left += tl.sum(of_a * load_rows(a, first, live, hv, HV, K, channel, C, BK), 1)
        reads, left, early = (
            (late + early).to(tl.float64),
            left.to(tl.float64),
            early.to(tl.float64),
        )
        # the decay of token t is passed by reads of later tokens, by its own reads after the decay,
        # and by writes of earlier tokens; in fp64, since a running sum less its own term cancels
        grad = tl.cumsum(reads, 0, reverse=True) - early + tl.cumsum(left, 0) - left
        part = dg + tl.program_id(2).to(tl.int64) * plane
        store_row(part, grad + tl.sum(through.to(tl.float64)), first, live, hv, HV, C)
    if DECAY == VECTOR:  # writes pass to the end as well; k and a come decayed to it
        keys = load_rows(k, first, live, hk, HK, K, channel, C, BK)
        through += tl.sum(of_k * keys, 0)
        if ERASE == LOW_RANK:
            rows = load_rows(a, first, live, hv, HV, K, channel, C, BK)
            through += tl.sum(of_a * rows, 0)
        cols = channel + tl.arange(0, BK)
        tl.store(dlast + number * K + cols, through, mask=cols < K)
    store_rows(dq, of_q, first, live, hv, HV, K, channel, C, BK)
    store_rows(dk, of_k, first, live, hv, HV, K, channel, C, BK)
    if ERASE != NO_ERASE:
        store_rows(db, of_b, first, live, hv, HV, K, channel, C, BK)
    if ERASE == LOW_RANK:
        store_rows(da, of_a, first, live, hv, HV, K, channel, C, BK)


@triton.jit
def rows_kernel(
    q, k,                        # [BT, H, K]
    b,                           # [BT, HB, K], with an erase
    a,                           # [BT, HV, K], for LOW_RANK
    g,                           # [BT, HV], log decays, for SCALAR
    beta,                        # [BT, HV], for DELTA
    scores_grad,                 # [NC, HV, L C, R C], fp32
    dq, dk,                      # in and out [BT, HV, K], fp32: what `edge_kernel` wrote
    db, da,                      # the same, with an erase, and for LOW_RANK
    dbeta,                       # out [tiles of K, BT, HV], fp32, for DELTA: the part -b y
    starts, ends,                # [NC], int64: first token of a chunk, end of its sequence
    plane,                       # BT HV, numbers of one part of dbeta
    H, HB, HV,
    K: tl.constexpr,
    DECAY: tl.constexpr,         # NO_DECAY or SCALAR
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    C: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the gradients through the scores to what the edges gave, for no decay or one number per
    token, of one chunk, value head and tile of key channels; each tile writes its part of dbeta.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BK
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    h, hb = hv // (HV // H), hv // (HV // HB)
    width: tl.constexpr = C * (2 if ERASE == LOW_RANK else 1)
    height: tl.constexpr = C * (1 if ERASE == NO_ERASE else 2)
    number = (chunk * HV + hv) * height * width
    Q = load_rows(q, first, live, h, H, K, channel, C, BK)
    keys = load_rows(k, first, live, h, H, K, channel, C, BK)
    of_q = load_rows(dq, first, live, hv, HV, K, channel, C, BK)
    of_k = load_rows(dk, first, live, hv, HV, K, channel, C, BK)
    by_q, by_b = score_decays(g, first, live, hv, HV, DECAY, READ_BEFORE, ERASE_BEFORE, C)
    dtype = Q.dtype
    # W: the gradient of q k^T, which is the gradient of its score times the decay in between
    W = (load_square(scores_grad, number, 0, 0, width, C, C) * by_q).to(dtype)
    of_q = tl.dot(W, keys, of_q, input_precision=PRECISION)
    of_k = tl.dot(tl.trans(W), Q, of_k, input_precision=PRECISION)
    if ERASE != NO_ERASE:
        erase = load_rows(b, first, live, hb, HB, K, channel, C, BK)
        of_b = load_rows(db, first, live, hv, HV, K, channel, C, BK)
        W = load_square(scores_grad, number, C, 0, width, C, C) * by_b
        of_b = tl.dot(W.to(dtype), keys, of_b, input_precision=PRECISION)
    if ERASE == DELTA:
        # of_b is y until here: dbeta has the part -b y; for k and b the factor -beta comes in
        rate = load_row(beta, first, live, hv, HV, C).to(tl.float32)
        W = -rate[:, None] * W
        by_rate = -tl.sum(of_b * erase, 1)
        part = dbeta + tl.program_id(2).to(tl.int64) * plane
        store_row(part, by_rate, first, live, hv, HV, C)
        of_b = -rate[:, None] * of_b
    if ERASE != NO_ERASE:
        of_k = tl.dot(tl.trans(W.to(dtype)), erase, of_k, input_precision=PRECISION)
    if ERASE == LOW_RANK:
        rows = load_rows(a, first, live, hv, HV, K, channel, C, BK)
        of_a = load_rows(da, first, live, hv, HV, K, channel, C, BK)
        W = (load_square(scores_grad, number, 0, C, width, C, C) * by_q).to(dtype)
        of_q = tl.dot(W, rows, of_q, input_precision=PRECISION)
        of_a = tl.dot(tl.trans(W), Q, of_a, input_precision=PRECISION)
        W = (load_square(scores_grad, number, C, C, width, C, C) * by_b).to(dtype)
        of_b = tl.dot(W, rows, of_b, input_precision=PRECISION)
        of_a = tl.dot(tl.trans(W), erase, of_a, input_precision=PRECISION)
        store_rows(da, of_a, first, live, hv, HV, K, channel, C, BK)
    store_rows(dq, of_q, first, live, hv, HV, K, channel, C, BK)
    store_rows(dk, of_k, first, live, hv, HV, K, channel, C, BK)
    if ERASE != NO_ERASE:
        store_rows(db, of_b, first, live, hv, HV, K, channel, C, BK)
