# SPDX-License-Identifier: MIT
"""The gradient of `scores.py` and `state.py`. With Z the gradient of the state behind a chunk, from
the last chunk to the first:

    m = attention^T (scale do) + k Z                  the gradient of what right rows wrote
    delta      r = T^T m_u        dv = beta r         db S = -beta r
    low rank   r = T^T m_u        dv = m_v + M^T m_u  db S = r
    Z' = last Z + q^T (scale do) + b^T (db S)

and then, chunk by chunk and all at once, the gradients of rows and of their scores. For a delta
rule the gradient of b is kept without its factor -beta, as `y`: then dbeta = r v - b y.

The gradient of one log decay a token is summed over all ways that pass it: from a write or the
chunk's start before it to a read or the chunk's end behind it. (What reads give less what writes
give is the same sum, but for its cancellation.)
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
    q, k, b, a, do, g, beta, last, attention, inverse, mixed, states_grad, solved, dv,
    dfinal, dinitial, bounds, first_chunks, scale, plane, HQ, HK, HB, HV, K: tl.constexpr,
    V: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr, EARLY: tl.constexpr,
    OWN: tl.constexpr, FINAL: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of one sequence, value head and tile of value channels, the last first; without
    erase also one tile of key channels, whose sums for dv are parts of `plane` numbers.
    `states_grad` receives Z, `solved` r.
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
        keys = leave(load_rows(k, first, live, hk, HK, K, channel, C, BK), total, all, DECAY)
        weights = load_square(attention, number * C * width, 0, 0, width, C, C)
        m = tl.dot(tl.trans(weights), grad, input_precision=PRECISION)
        m *= (channel == 0).to(tl.float32)
        m = tl.dot(keys, Z.to(dtype), m, input_precision=PRECISION)
        if ERASE == NO_ERASE:
            store_rows(dv, m, first, live, hv, HV, V, column, C, BV)
        else:
            T = tl.trans(load_square(inverse, number * C * C, 0, 0, C, C, C))
            if ERASE == DELTA:
                r = tl.dot(T, m.to(dtype), input_precision=PRECISION)
                rate = load_row(beta, first, live, hv, HV, C).to(tl.float32)
                m = rate[:, None] * r
                read = -m
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
        Z *= last_factor(last, number, all, K, channel, DECAY, BK)[:, None]
        rows = load_rows(q, first, live, hq, HQ, K, channel, C, BK)
        rows = enter(rows, total - one if EARLY else total, DECAY)
        Z = tl.dot(tl.trans(rows), grad, Z, input_precision=PRECISION)
        if ERASE != NO_ERASE:
            rows = load_rows(b, first, live, hb, HB, K, 0, C, BK)
            rows = enter(rows, total - one if OWN else total, DECAY)
            Z = tl.dot(tl.trans(rows), read.to(dtype), Z, input_precision=PRECISION)
    store_state(dinitial, Z, (n * HV + hv) * K * V, K, V, channel, column, BK, BV)


@triton.jit
def score_gradient_kernel(
    do, v, beta, written, solved, attention, below, scores_grad, rate_grad, dg, starts, ends,
    scale, HV, V: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr,
    EARLY: tl.constexpr, OWN: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the rows of q and b, `[L C, R C]` without the decay between, of one chunk
    and value head; for a delta rule also r v, and what the ways within the chunk give to dg.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    of_q = tl.zeros([C, C], tl.float32)
    q_a, of_b, b_a = of_q, of_q, of_q
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
    seen, strict = lower(EARLY, C), lower(True, C)
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
        number = (chunk * HV + hv) * C * width
        ways = of_q * load_square(attention, number, 0, 0, width, C, C)
        if ERASE == LOW_RANK:
            ways += q_a * load_square(attention, number, 0, C, width, C, C)
        total = passing(ways, EARLY, C)
        if ERASE != NO_ERASE:
            ways = of_b * load_square(below, number, 0, 0, width, C, C)
            if ERASE == DELTA:
                ways *= -load_row(beta, first, live, hv, HV, C).to(tl.float32)[:, None]
            else:
                ways += b_a * load_square(below, number, 0, C, width, C, C)
            total += passing(ways, OWN, C)
        store_row(dg, total, first, live, hv, HV, C)


@triton.jit
def passing(ways, EARLY: tl.constexpr, C: tl.constexpr):
    """Of ways `[i, j]` from the write of token j to the read of token i, the sum of those that pass
    token t; EARLY: reads before the decay of its token.
    """
    before = tl.cumsum(ways, 1) - ways
    return tl.sum(tl.where(lower(EARLY, C), before, 0.0), 0)


@triton.jit
def edge_kernel(
    q, k, b, a, do, v, g, beta, last, states, states_grad, written, solved, dq, dk, db, da, dg,
    dlast, starts, ends, scale, plane, HK, HB, HV, K: tl.constexpr, V: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, EARLY: tl.constexpr, OWN: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk, value head and tile of key channels: what the states at the chunk's edges give
    to the gradients of rows, in fp32, and of the decay. Where that is per channel, the decays to
    and from the edges come later, and `dlast` is the gradient of the log decay of the whole chunk;
    else dg is written in parts of `plane` numbers, one per tile.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BK
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    number = chunk * HV + hv
    of_q, of_k = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    of_b, of_a = of_q, of_q
    through = tl.zeros([BK], tl.float32)
    for column in range(0, V, BV):
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
        logs_q = total - one if EARLY else total
        logs_b = total - one if OWN else total
        of_q = of_q * tl.exp(logs_q.to(tl.float32))[:, None]
        of_b = of_b * tl.exp(logs_b.to(tl.float32))[:, None]
        to_end = tl.exp((all - total).to(tl.float32))[:, None]
        of_k *= to_end
        of_a *= to_end
        late = tl.sum(of_q * load_rows(q, first, live, hk, HK, K, channel, C, BK), 1)
        early = tl.zeros([C], tl.float32)
        if EARLY:
            late, early = early, late
        if ERASE != NO_ERASE:
            read = load_rows(b, first, live, hv // (HV // HB), HB, K, channel, C, BK)
            read = tl.sum(of_b * read, 1)
            if ERASE == DELTA:
                read *= -load_row(beta, first, live, hv, HV, C).to(tl.float32)
            if OWN:
                early += read
            else:
                late += read
        left = tl.sum(of_k * load_rows(k, first, live, hk, HK, K, channel, C, BK), 1)
        if ERASE == LOW_RANK:
            left += tl.sum(of_a * load_rows(a, first, live, hv, HV, K, channel, C, BK), 1)
        reads, left, early = (
            (late + early).to(tl.float64),
            left.to(tl.float64),
            early.to(tl.float64),
        )
        grad = tl.cumsum(reads, 0, reverse=True) - early + tl.cumsum(left, 0) - left
        part = dg + tl.program_id(2).to(tl.int64) * plane
        store_row(part, grad + tl.sum(through.to(tl.float64)), first, live, hv, HV, C)
    if DECAY == VECTOR:  # k and a come decayed to the end
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
    q, k, b, a, g, beta, scores_grad, dq, dk, db, da, dbeta, starts, ends, plane, H, HB, HV,
    K: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr, EARLY: tl.constexpr,
    OWN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """To what the edges gave, the gradients through the scores, for a decay that is none or one
    number a token. dbeta is written in parts of `plane` numbers, one per tile of key channels.
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
    by_q, by_b = score_decays(g, first, live, hv, HV, DECAY, EARLY, OWN, C)
    dtype = Q.dtype
    W = (load_square(scores_grad, number, 0, 0, width, C, C) * by_q).to(dtype)
    of_q = tl.dot(W, keys, of_q, input_precision=PRECISION)
    of_k = tl.dot(tl.trans(W), Q, of_k, input_precision=PRECISION)
    if ERASE != NO_ERASE:
        erase = load_rows(b, first, live, hb, HB, K, channel, C, BK)
        of_b = load_rows(db, first, live, hv, HV, K, channel, C, BK)
        W = load_square(scores_grad, number, C, 0, width, C, C) * by_b
        of_b = tl.dot(W.to(dtype), keys, of_b, input_precision=PRECISION)
    if ERASE == DELTA:
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
