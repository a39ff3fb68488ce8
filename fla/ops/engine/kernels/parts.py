# SPDX-License-Identifier: MIT
"""What the kernels share: rows in and out of memory, the decays of a chunk, and the inverse of its
triangular system.

Tensors lie as `[tokens, heads, channels]`, all sequences in one row. A chunk is `C` tokens from
`first` on, of which `live` are there; the others read as zeros.
"""

import triton
import triton.language as tl

NO_DECAY, SCALAR, VECTOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_ERASE, DELTA, LOW_RANK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG_ZERO = tl.constexpr(-200.0)  # its exponential is zero in fp32
BLOCK = tl.constexpr(16)  # rows of a diagonal block


@triton.jit
def load_rows(
    x, first, live, head, heads, width, channel, C: tl.constexpr, BK: tl.constexpr, low=0
):
    """Rows `low <= i < live` of `[C, BK]`, channels from `channel` on; zeros elsewhere."""
    rows, cols = tl.arange(0, C), channel + tl.arange(0, BK)
    at = ((first + rows) * heads + head)[:, None] * width + cols[None, :]
    there = ((rows >= low) & (rows < live))[:, None] & (cols < width)[None, :]
    return tl.load(x + at, mask=there, other=0.0)


@triton.jit
def store_rows(
    x, value, first, live, head, heads, width, channel, C: tl.constexpr, BK: tl.constexpr
):
    rows, cols = tl.arange(0, C), channel + tl.arange(0, BK)
    at = ((first + rows) * heads + head)[:, None] * width + cols[None, :]
    there = (rows < live)[:, None] & (cols < width)[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=there)


@triton.jit
def load_row(x, first, live, head, heads, C: tl.constexpr):
    """One number a token, `[C]`."""
    rows = tl.arange(0, C)
    return tl.load(x + (first + rows) * heads + head, mask=rows < live, other=0.0)


@triton.jit
def store_row(x, value, first, live, head, heads, C: tl.constexpr):
    rows = tl.arange(0, C)
    tl.store(x + (first + rows) * heads + head, value.to(x.dtype.element_ty), mask=rows < live)


@triton.jit
def load_square(x, number, row, col, width, R: tl.constexpr, C: tl.constexpr):
    """Rows from `row` and columns from `col` on, `[R, C]`, of matrix `number` of `width` columns
    and 64 bits of offset.
    """
    rows, cols = row + tl.arange(0, R), col + tl.arange(0, C)
    return tl.load(x + number + rows[:, None] * width + cols[None, :])


@triton.jit
def store_square(x, value, number, row, col, width, R: tl.constexpr, C: tl.constexpr):
    rows, cols = row + tl.arange(0, R), col + tl.arange(0, C)
    at = x + number + rows[:, None] * width + cols[None, :]
    tl.store(at, value.to(x.dtype.element_ty))


@triton.jit
def load_state(x, number, K, V, k, v, BK: tl.constexpr, BV: tl.constexpr):
    """`[BK, BV]` of the state `[K, V]` that begins at `number`."""
    rows, cols = k + tl.arange(0, BK), v + tl.arange(0, BV)
    there = (rows < K)[:, None] & (cols < V)[None, :]
    return tl.load(x + number + rows[:, None] * V + cols[None, :], mask=there, other=0.0)


@triton.jit
def store_state(x, value, number, K, V, k, v, BK: tl.constexpr, BV: tl.constexpr):
    rows, cols = k + tl.arange(0, BK), v + tl.arange(0, BV)
    there = (rows < K)[:, None] & (cols < V)[None, :]
    at = x + number + rows[:, None] * V + cols[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=there)


@triton.jit
def logs(g, first, live, head, heads, C: tl.constexpr):
    """The log decay of every token and its sums, `[C]` in fp64: differences of large sums keep the
    small ones beside them.
    """
    x = tl.maximum(load_row(g, first, live, head, heads, C).to(tl.float64), LOG_ZERO)
    return x, tl.cumsum(x, 0)


@triton.jit
def decay_between(read, write, STRICT: tl.constexpr, C: tl.constexpr):
    """`exp(read_i - write_j)` for j <= i, or j < i; zeros elsewhere. Each of the fp64 sums goes as
    two fp32 numbers into the differences.
    """
    read_high, write_high = read.to(tl.float32), write.to(tl.float32)
    read_low = (read - read_high.to(tl.float64)).to(tl.float32)
    write_low = (write - write_high.to(tl.float64)).to(tl.float32)
    apart = read_high[:, None] - write_high[None, :] + (read_low[:, None] - write_low[None, :])
    below = lower(STRICT, C)
    return tl.where(below, tl.exp(tl.where(below, apart, 0.0)), 0.0)


@triton.jit
def lower(STRICT: tl.constexpr, C: tl.constexpr):
    rows = tl.arange(0, C)
    if STRICT:
        return rows[:, None] > rows[None, :]
    else:
        return rows[:, None] >= rows[None, :]


@triton.jit
def score_decays(
    g, first, live, head, heads, DECAY: tl.constexpr, EARLY: tl.constexpr, OWN: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The decay between what tokens write and what q reads of it, and what b does."""
    if DECAY == SCALAR:
        one, total = logs(g, first, live, head, heads, C)
        of_q = decay_between(total - one if EARLY else total, total, EARLY, C)
        of_b = decay_between(total - one if OWN else total, total, True, C)
    else:
        of_q = lower(EARLY, C).to(tl.float32)
        of_b = lower(True, C).to(tl.float32)
    return of_q, of_b


@triton.jit
def invert(N, C: tl.constexpr, PRECISION: tl.constexpr):
    """`(I + N)^-1` of a strictly lower N `[C, C]`: its diagonal blocks by substitution, and from
    their inverse D, with `Y = D (N off the diagonal blocks)`, whose fourth power is zero,
    `(I - Y) (I + Y^2) D`.
    """
    n: tl.constexpr = C // BLOCK
    rows, small = tl.arange(0, C), tl.arange(0, BLOCK)
    same = (rows // BLOCK)[:, None] == (rows // BLOCK)[None, :]
    inside = tl.where(same, N, 0.0)
    blocks = tl.sum(tl.reshape(inside, [C, n, BLOCK]), 1)
    blocks = tl.reshape(blocks, [n, BLOCK, BLOCK])
    eye = (small[:, None] == small[None, :]).to(tl.float32)
    X = tl.zeros([n, BLOCK, BLOCK], tl.float32) + eye[None, :, :]
    for i in range(1, BLOCK):
        now = (small == i)[None, :, None]
        row = tl.sum(tl.where(now, blocks, 0.0), 1)
        X -= tl.where(now, tl.sum(row[:, :, None] * X, 1)[:, None, :], 0.0)
    wide = tl.broadcast_to(tl.reshape(X, [C, 1, BLOCK]), [C, n, BLOCK])
    D = tl.where(same, tl.reshape(wide, [C, C]), 0.0)
    Y = tl.dot(D, N - inside, input_precision=PRECISION)
    unit = (rows[:, None] == rows[None, :]).to(tl.float32)
    square = unit + tl.dot(Y, Y, input_precision=PRECISION)
    return tl.dot(tl.dot(unit - Y, square, input_precision=PRECISION), D, input_precision=PRECISION)
