# SPDX-License-Identifier: MIT
"""From chunk to chunk: the state, what each chunk writes into it, and what is read of it. With S
the state at a chunk's start, decays included in q, b, k and a as `enter` and `leave` below,

    delta      u = T beta (v - b S)          S' = last S + k^T u
    low rank   u = T (b S) + M v             S' = last S + k^T v + a^T u
    no erase                                 S' = last S + k^T v
    output     o = scale (q S + attention [v; u])

Decay per channel comes multiplied into q, b, k, a already (`vector.py`), with `last` beside it.
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
    store_rows,
    store_state,
)


@triton.jit
def enter(x, logs_read, DECAY: tl.constexpr):
    """Rows that read, times the decay from the chunk's start."""
    if DECAY == SCALAR:
        return (x * tl.exp(logs_read.to(tl.float32))[:, None]).to(x.dtype)
    else:
        return x


@triton.jit
def leave(x, total, all, DECAY: tl.constexpr):
    """Rows that write, times the decay to the chunk's end."""
    if DECAY == SCALAR:
        return (x * tl.exp((all - total).to(tl.float32))[:, None]).to(x.dtype)
    else:
        return x


@triton.jit
def last_factor(last, number, all, K, k, DECAY: tl.constexpr, BK: tl.constexpr):
    """The decay of a whole chunk, `[BK]`."""
    if DECAY == SCALAR:
        return tl.exp(all.to(tl.float32)) + tl.zeros([BK], tl.float32)
    elif DECAY == VECTOR:
        rows = k + tl.arange(0, BK)
        return tl.load(last + number * K + rows, mask=rows < K, other=1.0)
    else:
        return tl.zeros([BK], tl.float32) + 1.0


@triton.jit
def state_kernel(
    k, b, a, v, g, beta, last, inverse, mixed, states, written, initial, final,
    bounds, first_chunks, HK, HB, HV, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr,
    ERASE: tl.constexpr, OWN: tl.constexpr, INITIAL: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of one sequence, value head and tile of value channels; without erase also one
    tile of key channels. `states` receives the first state of every chunk, `written` u.
    """
    n, hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    column, channel = tl.program_id(1) * BV, tl.program_id(2) * BK
    begin, end = tl.load(bounds + n), tl.load(bounds + n + 1)
    chunk = tl.load(first_chunks + n)
    hk, hb = hv // (HV // HK), hv // (HV // HB)
    dtype = k.dtype.element_ty
    S = tl.zeros([BK, BV], tl.float32)
    if INITIAL:
        S += load_state(initial, (n * HV + hv) * K * V, K, V, channel, column, BK, BV)
    for first in range(begin, end, C):
        live = tl.minimum(end - first, C)
        number = chunk * HV + hv
        store_state(states, S, number * K * V, K, V, channel, column, BK, BV)
        one, total = logs(g, first, live, hv, HV, C) if DECAY == SCALAR else (0.0, 0.0)
        all = tl.sum(one) if DECAY == SCALAR else 0.0
        values = load_rows(v, first, live, hv, HV, V, column, C, BV)
        keys = leave(load_rows(k, first, live, hk, HK, K, channel, C, BK), total, all, DECAY)
        if ERASE != NO_ERASE:
            erase = load_rows(b, first, live, hb, HB, K, 0, C, BK)
            erase = enter(erase, total - one if OWN else total, DECAY)
            read = tl.dot(erase, S.to(dtype), input_precision=PRECISION)
            T = load_square(inverse, number * C * C, 0, 0, C, C, C)
            if ERASE == DELTA:
                rate = load_row(beta, first, live, hv, HV, C).to(tl.float32)
                error = (rate[:, None] * (values - read)).to(dtype)
                u = tl.dot(T, error, input_precision=PRECISION).to(dtype)
            else:
                M = load_square(mixed, number * C * C, 0, 0, C, C, C)
                u = tl.dot(T, read.to(dtype), input_precision=PRECISION)
                u = tl.dot(M, values, u, input_precision=PRECISION).to(dtype)
            store_rows(written, u, first, live, hv, HV, V, column, C, BV)
        S *= last_factor(last, number, all, K, channel, DECAY, BK)[:, None]
        if ERASE == DELTA:
            S = tl.dot(tl.trans(keys), u, S, input_precision=PRECISION)
        else:
            S = tl.dot(tl.trans(keys), values, S, input_precision=PRECISION)
        if ERASE == LOW_RANK:
            rows = leave(load_rows(a, first, live, hv, HV, K, 0, C, BK), total, all, DECAY)
            S = tl.dot(tl.trans(rows), u, S, input_precision=PRECISION)
        chunk += 1
    store_state(final, S, (n * HV + hv) * K * V, K, V, channel, column, BK, BV)


@triton.jit
def output_kernel(
    q, v, written, g, attention, states, o, starts, ends, scale, HQ, HV,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr,
    EARLY: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk, value head and tile of value channels."""
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * BV
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    number, hq = chunk * HV + hv, hv // (HV // HQ)
    one, total = logs(g, first, live, hv, HV, C) if DECAY == SCALAR else (0.0, 0.0)
    out = tl.zeros([C, BV], tl.float32)
    for channel in range(0, K, BK):
        rows = load_rows(q, first, live, hq, HQ, K, channel, C, BK)
        rows = enter(rows, total - one if EARLY else total, DECAY)
        S = load_state(states, number * K * V, K, V, channel, column, BK, BV)
        out = tl.dot(rows, S, out, input_precision=PRECISION)
    width: tl.constexpr = C * (2 if ERASE == LOW_RANK else 1)
    values = load_rows(v, first, live, hv, HV, V, column, C, BV)
    if ERASE != NO_ERASE:
        u = load_rows(written, first, live, hv, HV, V, column, C, BV)
    weights = load_square(attention, number * C * width, 0, 0, width, C, C)
    if ERASE == DELTA:
        out = tl.dot(weights, u, out, input_precision=PRECISION)
    else:
        out = tl.dot(weights, values, out, input_precision=PRECISION)
    if ERASE == LOW_RANK:
        weights = load_square(attention, number * C * width, 0, C, width, C, C)
        out = tl.dot(weights, u, out, input_precision=PRECISION)
    store_rows(o, out * scale, first, live, hv, HV, V, column, C, BV)
