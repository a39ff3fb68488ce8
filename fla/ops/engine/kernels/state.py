# SPDX-License-Identifier: MIT
"""From chunk to chunk: the state, what each chunk writes into it, and what is read of it. With S
the state at a chunk's start, rows q, b times the decay from the chunk's start (`enter`), rows k, a
times the decay to its end (`leave`), and `last` the decay of the whole chunk,

    delta      u = T beta (v - b S)          S' = last S + k^T u
    low rank   u = T (b S) + M v             S' = last S + k^T v + a^T u
    no erase                                 S' = last S + k^T v
    output     o = scale (q S + attention [v; u])

Rows that decay per channel come here already multiplied (`edges_kernel` of `vector.py`), per value
head, with `last` beside them. For the letters in the shapes see `parts.py`: BT tokens in all, N
sequences, NC chunks, HQ, HK, HB, HV heads of q, k, b and v, K, V channels, C tokens per chunk, BK,
BV channels per program, R = 2 kinds of rows that write for LOW_RANK, else 1.
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
def enter(
    x,                    # [C, BK]: rows that read
    logs_read,            # [C], fp64: log decay from the chunk's start to the read, for SCALAR
    DECAY: tl.constexpr,
):  # fmt: skip
    """Rows that read, times the decay from the chunk's start."""
    if DECAY == SCALAR:
        return (x * tl.exp(logs_read.to(tl.float32))[:, None]).to(x.dtype)
    else:
        return x


@triton.jit
def leave(
    x,                    # [C, BK]: rows that write
    total,                # [C], fp64: sum of log decays up to each token, for SCALAR
    all,                  # fp64: sum of the whole chunk
    DECAY: tl.constexpr,
):  # fmt: skip
    """Rows that write, times the decay to the chunk's end."""
    if DECAY == SCALAR:
        return (x * tl.exp((all - total).to(tl.float32))[:, None]).to(x.dtype)
    else:
        return x


@triton.jit
def last_factor(
    last,                 # [NC, HV, K], fp32, for VECTOR
    number,               # chunk and value head
    all,                  # fp64: sum of the chunk's log decays, for SCALAR
    K,
    k,                    # first key channel of the tile
    DECAY: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
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
    k,                           # [BT, HK, K]; for VECTOR rows that leave, and HK = HV
    b,                           # [BT, HB, K], with an erase; for VECTOR rows that enter
    a,                           # [BT, HV, K], for LOW_RANK; for VECTOR rows that leave
    v,                           # [BT, HV, V]
    g,                           # [BT, HV], log decays, for SCALAR
    beta,                        # [BT, HV], for DELTA
    last,                        # [NC, HV, K], fp32, for VECTOR
    inverse, mixed,              # [NC, HV, C, C]: T with an erase, M for LOW_RANK
    states,                      # out [NC, HV, K, V]: the state at each chunk's start
    written,                     # out [BT, HV, V], with an erase: u
    initial,                     # [N, HV, K, V], fp32, for INITIAL
    final,                       # out [N, HV, K, V], fp32
    bounds,                      # [N + 1], int64: as cu_seqlens
    first_chunks,                # [N], int64: number of a sequence's first chunk
    HK, HB, HV,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAY: tl.constexpr,         # NO_DECAY, SCALAR or VECTOR
    ERASE: tl.constexpr,         # NO_ERASE, DELTA or LOW_RANK
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    INITIAL: tl.constexpr,       # there is an initial state
    C: tl.constexpr,
    BK: tl.constexpr,            # with an erase all of K: b S sums over key channels
    BV: tl.constexpr,
    PRECISION: tl.constexpr,     # of matrix products: "ieee" in fp32, else "tf32"
):  # fmt: skip
    """All chunks of one sequence, value head and tile of value channels, one after the other;
    without an erase also one tile of key channels. S stays in registers, in fp32.
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
        if ERASE != NO_ERASE:  # u, from b S; before S is overwritten
            erase = load_rows(b, first, live, hb, HB, K, 0, C, BK)
            erase = enter(erase, total - one if ERASE_BEFORE else total, DECAY)
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
        # S' = last S + k^T v (or k^T u) [+ a^T u]
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
    q,                          # [BT, HQ, K]; for VECTOR rows that enter, and HQ = HV
    v,                          # [BT, HV, V]
    written,                    # [BT, HV, V], with an erase: u
    g,                          # [BT, HV], log decays, for SCALAR
    attention,                  # [NC, HV, C, R C]
    states,                     # [NC, HV, K, V]
    o,                          # out [BT, HV, V]
    starts, ends,               # [NC], int64: first token of a chunk, end of its sequence
    scale,
    HQ, HV,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAY: tl.constexpr,        # NO_DECAY, SCALAR or VECTOR
    ERASE: tl.constexpr,        # NO_ERASE, DELTA or LOW_RANK
    READ_BEFORE: tl.constexpr,  # o reads the state before its token
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o of one chunk, value head and tile of value channels. Chunks do not wait for each other
    here, since `state_kernel` stored the state at the start of each.
    """
    chunk, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * BV
    first = tl.load(starts + chunk)
    live = tl.minimum(tl.load(ends + chunk) - first, C)
    number, hq = chunk * HV + hv, hv // (HV // HQ)
    one, total = logs(g, first, live, hv, HV, C) if DECAY == SCALAR else (0.0, 0.0)
    out = tl.zeros([C, BV], tl.float32)
    for channel in range(0, K, BK):  # q S
        rows = load_rows(q, first, live, hq, HQ, K, channel, C, BK)
        rows = enter(rows, total - one if READ_BEFORE else total, DECAY)
        S = load_state(states, number * K * V, K, V, channel, column, BK, BV)
        out = tl.dot(rows, S, out, input_precision=PRECISION)
    # attention [v; u]: the first C columns weigh what k wrote, the others what a wrote
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
