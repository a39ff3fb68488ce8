# SPDX-License-Identifier: MIT
"""What the kernels share: rows in and out of memory, the decays of a chunk, and the inverse of its
triangular system. The other files of this folder use the same letters:

    BT             tokens of all sequences, which lie in one row
    N, NC          sequences, and chunks of all sequences
    H, HB, HV      heads of q and k, heads of b, value heads
    K, V           channels per head of keys and of values
    C, BK, BV      tokens per chunk; channels of keys and of values per program (its tile)
    L, R           kinds of rows that read (q, with an erase also b: 2) and that write (k, with a
                   low-rank erase also a: 2)

Tensors are contiguous. Their dtype is that of v unless a comment names another. A chunk is C tokens
from `first` on, of which the first `live` exist; the others read as zeros and are not stored.
"""

import triton
import triton.language as tl

NO_DECAY, SCALAR, VECTOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_ERASE, DELTA, LOW_RANK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG_ZERO = tl.constexpr(-200.0)  # its exponential is zero in fp32
BLOCK = tl.constexpr(16)  # rows of a diagonal block; the smallest side of a matrix product


@triton.jit
def load_rows(
    x,                # [BT, heads, width]
    first,            # int64, as in all helpers: an offset into x may exceed 32 bits
    live,
    head,
    heads,
    width,
    channel,          # first channel of the tile
    C: tl.constexpr,
    BK: tl.constexpr,
    low=0,            # first row that is read
):  # fmt: skip
    """Rows `low <= i < live` of `[C, BK]`, channels from `channel` on; zeros elsewhere."""
    rows, cols = tl.arange(0, C), channel + tl.arange(0, BK)
    at = ((first + rows) * heads + head)[:, None] * width + cols[None, :]
    there = ((rows >= low) & (rows < live))[:, None] & (cols < width)[None, :]
    return tl.load(x + at, mask=there, other=0.0)


@triton.jit
def store_rows(
    x,                # [BT, heads, width], of any dtype
    value,            # [C, BK]
    first,
    live,
    head,
    heads,
    width,
    channel,
    C: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The counterpart of `load_rows`."""
    rows, cols = tl.arange(0, C), channel + tl.arange(0, BK)
    at = ((first + rows) * heads + head)[:, None] * width + cols[None, :]
    there = (rows < live)[:, None] & (cols < width)[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=there)


@triton.jit
def load_row(
    x,                # [BT, heads]
    first,
    live,
    head,
    heads,
    C: tl.constexpr,
):  # fmt: skip
    """One number per token, `[C]`; zeros where there is no token."""
    rows = tl.arange(0, C)
    return tl.load(x + (first + rows) * heads + head, mask=rows < live, other=0.0)


@triton.jit
def store_row(
    x,                # [BT, heads], of any dtype
    value,            # [C]
    first,
    live,
    head,
    heads,
    C: tl.constexpr,
):  # fmt: skip
    """The counterpart of `load_row`."""
    rows = tl.arange(0, C)
    tl.store(x + (first + rows) * heads + head, value.to(x.dtype.element_ty), mask=rows < live)


@triton.jit
def load_square(
    x,                # matrices of `width` columns, one per chunk and value head
    number,           # int64, offset of the matrix
    row,
    col,
    width,
    R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """`[R, C]` of a matrix, from row `row` and column `col` on. No mask: matrices of scores are
    stored whole, with zeros for tokens that do not exist.
    """
    rows, cols = row + tl.arange(0, R), col + tl.arange(0, C)
    return tl.load(x + number + rows[:, None] * width + cols[None, :])


@triton.jit
def store_square(
    x,                # matrices of `width` columns, of any dtype
    value,            # [R, C]
    number,
    row,
    col,
    width,
    R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The counterpart of `load_square`."""
    rows, cols = row + tl.arange(0, R), col + tl.arange(0, C)
    at = x + number + rows[:, None] * width + cols[None, :]
    tl.store(at, value.to(x.dtype.element_ty))


@triton.jit
def load_state(
    x,                # states [.., K, V]
    number,           # int64, offset of the state
    K,
    V,
    k,                # first key channel of the tile
    v,                # first value channel
    BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """`[BK, BV]` of the state `[K, V]` that begins at `number`; zeros outside it."""
    rows, cols = k + tl.arange(0, BK), v + tl.arange(0, BV)
    there = (rows < K)[:, None] & (cols < V)[None, :]
    return tl.load(x + number + rows[:, None] * V + cols[None, :], mask=there, other=0.0)


@triton.jit
def store_state(
    x,                # states [.., K, V], of any dtype
    value,            # [BK, BV]
    number,
    K,
    V,
    k,
    v,
    BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """The counterpart of `load_state`."""
    rows, cols = k + tl.arange(0, BK), v + tl.arange(0, BV)
    there = (rows < K)[:, None] & (cols < V)[None, :]
    at = x + number + rows[:, None] * V + cols[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=there)


@triton.jit
def logs(
    g,                # [BT, heads], log decays
    first,
    live,
    head,
    heads,
    C: tl.constexpr,
):  # fmt: skip
    """The log decay of every token and the running sum, both `[C]` in fp64. Decays are differences
    of these sums; in fp32 one large log decay would round away the small ones beside it. LOG_ZERO
    bounds them, since -inf - (-inf) is NaN.
    """
    x = load_row(g, first, live, head, heads, C).to(tl.float64)
    x = tl.where(x < LOG_ZERO, LOG_ZERO, x)  # a maximum would drop NaN on a GPU
    return x, tl.cumsum(x, 0)


@triton.jit
def decay_between(
    read,                  # [C], fp64: sum of log decays up to what row i reads
    write,                 # [C], fp64: sum of log decays up to the write of row j
    STRICT: tl.constexpr,  # j < i instead of j <= i
    C: tl.constexpr,
):  # fmt: skip
    """`exp(read_i - write_j)` `[C, C]` for j <= i, or j < i; zeros elsewhere."""
    # the square of differences in fp32, at twice its precision: each fp64 sum is split in two fp32
    read_high, write_high = read.to(tl.float32), write.to(tl.float32)
    read_low = (read - read_high.to(tl.float64)).to(tl.float32)
    write_low = (write - write_high.to(tl.float64)).to(tl.float32)
    apart = read_high[:, None] - write_high[None, :] + (read_low[:, None] - write_low[None, :])
    below = lower(STRICT, C)
    # masked before exp too: above the diagonal the difference is positive and may overflow
    return tl.where(below, tl.exp(tl.where(below, apart, 0.0)), 0.0)


@triton.jit
def lower(STRICT: tl.constexpr, C: tl.constexpr):
    """The mask `[C, C]` of j <= i, or of j < i."""
    rows = tl.arange(0, C)
    if STRICT:
        return rows[:, None] > rows[None, :]
    else:
        return rows[:, None] >= rows[None, :]


@triton.jit
def score_decays(
    g,                           # [BT, heads], log decays, for SCALAR
    first,
    live,
    head,
    heads,
    DECAY: tl.constexpr,         # NO_DECAY or SCALAR
    READ_BEFORE: tl.constexpr,   # o reads the state before its token
    ERASE_BEFORE: tl.constexpr,  # b is given, and reads the state before the decay
    C: tl.constexpr,
):  # fmt: skip
    """The decays `[C, C]` from the write of token j to the read of q, and of b, at token i."""
    # q sees the write of its own token, unless it reads before it; b never does
    if DECAY == SCALAR:
        one, total = logs(g, first, live, head, heads, C)
        of_q = decay_between(total - one if READ_BEFORE else total, total, READ_BEFORE, C)
        of_b = decay_between(total - one if ERASE_BEFORE else total, total, True, C)
    else:
        of_q = lower(READ_BEFORE, C).to(tl.float32)
        of_b = lower(True, C).to(tl.float32)
    return of_q, of_b


@triton.jit
def invert(
    N,                        # [C, C], fp32, strictly lower
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`(I + N)^-1`: the diagonal blocks of BLOCK rows by substitution, and from their inverse D,
    with `Y = D (N off the diagonal blocks)`, as `(I - Y) (I + Y^2) D`. This is exact: C is at most
    four blocks, so the fourth power of Y is zero.
    """
    n: tl.constexpr = C // BLOCK
    rows, small = tl.arange(0, C), tl.arange(0, BLOCK)
    same = (rows // BLOCK)[:, None] == (rows // BLOCK)[None, :]
    inside = tl.where(same, N, 0.0)
    blocks = tl.sum(tl.reshape(inside, [C, n, BLOCK]), 1)
    blocks = tl.reshape(blocks, [n, BLOCK, BLOCK])
    eye = (small[:, None] == small[None, :]).to(tl.float32)
    X = tl.zeros([n, BLOCK, BLOCK], tl.float32) + eye[None, :, :]
    for i in range(1, BLOCK):  # row i of all blocks at once; registers only, no matrix product
        now = (small == i)[None, :, None]
        row = tl.sum(tl.where(now, blocks, 0.0), 1)
        X -= tl.where(now, tl.sum(row[:, :, None] * X, 1)[:, None, :], 0.0)
    wide = tl.broadcast_to(tl.reshape(X, [C, 1, BLOCK]), [C, n, BLOCK])
    D = tl.where(same, tl.reshape(wide, [C, C]), 0.0)
    Y = tl.dot(D, N - inside, input_precision=PRECISION)
    unit = (rows[:, None] == rows[None, :]).to(tl.float32)
    square = unit + tl.dot(Y, Y, input_precision=PRECISION)
    return tl.dot(tl.dot(unit - Y, square, input_precision=PRECISION), D, input_precision=PRECISION)
