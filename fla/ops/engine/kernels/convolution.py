# SPDX-License-Identifier: MIT
"""Short causal depthwise convolution, `fla/modules/convolution.py`, and its gradient. With e the
sequence after its W rows of history, and tap i reading `lag = W - 1 - i` tokens back,

    z_t = bias + sum_i w_i e_{t - lag}        y = z or silu(z)        de_s = sum_i w_i dz_{s + lag}

One program per chunk of tokens and tile of channels. BT tokens of all sequences in one row, N
sequences, NC chunks, D channels, W taps, C tokens per chunk, BD channels per program. Rows of a
history are the last W tokens, the oldest first. Tensors are contiguous and have x's dtype unless a
comment names another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.engine.kernels.launch import CHUNK, Cuts
from fla.ops.engine.rows.convolution import rows

CHANNELS, WARPS = 64, 4


@triton.jit
def extended(
    x,                      # [BT, D]
    history,                # [N, W, D], fp32, for HISTORY
    r,                      # [C], int64: tokens; those before `begin` lie in the history
    begin,                  # first token of the sequence
    there,                  # [C, BD], mask
    n,                      # number of the sequence
    D,
    cols,                   # [BD]
    W: tl.constexpr,
    HISTORY: tl.constexpr,  # there is a history; else it is zeros
):  # fmt: skip
    """e, `[C, BD]` in fp32: rows r of the sequence, or of the history before it."""
    inside = there & (r >= begin)[:, None]
    rows = tl.load(x + r[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if HISTORY:
        at = n * W + W + r - begin
        before = there & (r < begin)[:, None]
        rows += tl.load(history + at[:, None] * D + cols[None, :], mask=before, other=0.0)
    return rows


@triton.jit
def activation_input(
    x,                      # [BT, D]
    weight,                 # [W, D], fp32
    bias,                   # [D], for BIAS
    history,                # [N, W, D], fp32, for HISTORY
    t,                      # [C], int64: tokens
    begin,
    there,                  # [C, BD], mask
    n,
    D,
    cols,                   # [BD]
    W: tl.constexpr,
    BIAS: tl.constexpr,
    HISTORY: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """z `[C, BD]` of tokens t, in fp32."""
    z = tl.zeros([C, BD], tl.float32)
    if BIAS:
        z += tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(W):
        w = tl.load(weight + i * D + cols, mask=cols < D, other=0.0)
        lagged = t - (W - 1 - i)
        z += w[None, :] * extended(x, history, lagged, begin, there, n, D, cols, W, HISTORY)
    return z


@triton.jit
def conv_kernel(
    x,                      # [BT, D]
    weight,                 # [W, D], fp32
    bias,                   # [D], for BIAS
    history,                # [N, W, D], fp32, for HISTORY
    y,                      # out [BT, D]
    starts, ends, begins,   # [NC], int64: first token of a chunk, end and begin of its sequence
    owners,                 # [NC], int64: number of that sequence
    D,
    W: tl.constexpr,
    SILU: tl.constexpr,     # y = silu(z)
    BIAS: tl.constexpr,     # there is a bias
    HISTORY: tl.constexpr,  # there is a history
    C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """y of one chunk and tile of channels."""
    chunk, cols = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    t, end = tl.load(starts + chunk) + tl.arange(0, C), tl.load(ends + chunk)
    begin, n = tl.load(begins + chunk), tl.load(owners + chunk)
    there = (t < end)[:, None] & (cols < D)[None, :]
    z = activation_input(
        x, weight, bias, history, t, begin, there, n, D, cols, W, BIAS, HISTORY, C, BD
    )
    if SILU:
        z *= tl.sigmoid(z)
    tl.store(y + t[:, None] * D + cols[None, :], z.to(y.dtype.element_ty), mask=there)


@triton.jit
def conv_gradient_kernel(
    x,                      # [BT, D]
    weight,                 # [W, D], fp32
    bias,                   # [D], for BIAS
    history,                # [N, W, D], fp32, for HISTORY
    dy,                     # [BT, D]
    dz,                     # out [BT, D], fp32
    dweight,                # out [NC, W, D], fp32: each chunk's part
    dbias,                  # out [NC, D], fp32, for BIAS: each chunk's part
    starts, ends, begins,   # [NC], int64: first token of a chunk, end and begin of its sequence
    owners,                 # [NC], int64: number of that sequence
    D,
    W: tl.constexpr,
    SILU: tl.constexpr,     # y = silu(z)
    BIAS: tl.constexpr,
    HISTORY: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """dz of one chunk and tile of channels, and its parts of dweight and dbias: parts instead of
    atomic sums, whose order would change from run to run.
    """
    chunk, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    t, end = tl.load(starts + chunk) + tl.arange(0, C), tl.load(ends + chunk)
    begin, n = tl.load(begins + chunk), tl.load(owners + chunk)
    there = (t < end)[:, None] & (cols < D)[None, :]
    at = t[:, None] * D + cols[None, :]
    grad = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
    if SILU:  # z is computed again instead of kept
        z = activation_input(
            x, weight, bias, history, t, begin, there, n, D, cols, W, BIAS, HISTORY, C, BD
        )
        s = tl.sigmoid(z)
        grad *= s * (1.0 + z * (1.0 - s))
    tl.store(dz + at, grad, mask=there)
    for i in tl.static_range(W):
        rows = extended(x, history, t - (W - 1 - i), begin, there, n, D, cols, W, HISTORY)
        tl.store(dweight + (chunk * W + i) * D + cols, tl.sum(grad * rows, 0), mask=cols < D)
    if BIAS:
        tl.store(dbias + chunk * D + cols, tl.sum(grad, 0), mask=cols < D)


@triton.jit
def spread(
    dz,               # [BT, D], fp32
    weight,           # [W, D], fp32
    s,                # [C], int64: tokens, or places of the history before `begin`
    begin, end,       # of the sequence
    cols,             # [BD]
    D,
    W: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """`sum_i w_i dz_{s + lag}` over tokens of the sequence, `[C, BD]` in fp32."""
    total = tl.zeros([C, BD], tl.float32)
    for i in tl.static_range(W):
        t = s + (W - 1 - i)
        there = ((t >= begin) & (t < end))[:, None] & (cols < D)[None, :]
        w = tl.load(weight + i * D + cols, mask=cols < D, other=0.0)
        rows = tl.load(dz + t[:, None] * D + cols[None, :], mask=there, other=0.0)
        total += w[None, :] * rows
    return total


@triton.jit
def conv_input_kernel(
    dz,                    # [BT, D], fp32
    weight,                # [W, D], fp32
    dfinal,                # [N, W, D], fp32, for FINAL
    dx,                    # out [BT, D]
    starts, ends, begins,  # [NC], int64: first token of a chunk, end and begin of its sequence
    owners,                # [NC], int64: number of that sequence
    D,
    W: tl.constexpr,
    FINAL: tl.constexpr,   # the final history has a gradient
    C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """dx of one chunk and tile of channels. It is not part of `conv_gradient_kernel` since it reads
    dz of the next chunk.
    """
    chunk, cols = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    s, end = tl.load(starts + chunk) + tl.arange(0, C), tl.load(ends + chunk)
    begin, n = tl.load(begins + chunk), tl.load(owners + chunk)
    there = (s < end)[:, None] & (cols < D)[None, :]
    grad = spread(dz, weight, s, begin, end, cols, D, W, C, BD)
    if FINAL:  # the last W tokens are the final history too
        row = s - end + W
        kept = there & (row >= 0)[:, None]
        at = (n * W + row)[:, None] * D + cols[None, :]
        grad += tl.load(dfinal + at, mask=kept, other=0.0)
    tl.store(dx + s[:, None] * D + cols[None, :], grad.to(dx.dtype.element_ty), mask=there)


@triton.jit
def conv_edge_kernel(
    x,                       # [BT, D], unless BACKWARD
    weight,                  # [W, D], fp32
    history,                 # [N, W, D], fp32, for HISTORY
    dz,                      # [BT, D], fp32, for BACKWARD
    dfinal,                  # [N, W, D], fp32, for FINAL
    final,                   # out [N, W, D], fp32, unless BACKWARD
    dhistory,                # out [N, W, D], fp32, for BACKWARD
    bounds,                  # [N + 1], int64: as cu_seqlens
    D,
    W: tl.constexpr,
    HISTORY: tl.constexpr,   # there is a history
    BACKWARD: tl.constexpr,  # the gradient of the history instead of the final history
    FINAL: tl.constexpr,     # the final history has a gradient
    BW: tl.constexpr,        # the power of two that holds W
    BD: tl.constexpr,
):  # fmt: skip
    """The final history of one sequence, or the gradient of its initial history. A sequence of
    fewer than W tokens passes on rows of its own history.
    """
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    begin, end, rows = tl.load(bounds + n), tl.load(bounds + n + 1), tl.arange(0, BW)
    there = (rows < W)[:, None] & (cols < D)[None, :]
    at = (n * W + rows)[:, None] * D + cols[None, :]
    if BACKWARD:
        grad = spread(dz, weight, begin - W + rows, begin, end, cols, D, W, BW, BD)
        if FINAL:
            row = rows - (end - begin)
            kept = there & (row >= 0)[:, None]
            back = (n * W + row)[:, None] * D + cols[None, :]
            grad += tl.load(dfinal + back, mask=kept, other=0.0)
        tl.store(dhistory + at, grad, mask=there)
    else:
        last = extended(x, history, end - W + rows, begin, there, n, D, cols, W, HISTORY)
        tl.store(final + at, last, mask=there)


class Convolution:
    """A call of the convolution: x `[BT, D]`, its filter as rows in fp32, and its launches."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, cuts: Cuts
    ):
        self.x, self.bias, self.cuts, self.history = x, bias, cuts, history
        self.weight = rows(weight)
        self.W, self.D = self.weight.shape
        self.N, self.chunks = len(cuts.first_chunks), len(cuts.starts)
        self.where = (cuts.starts, cuts.ends, cuts.begins, cuts.owners)
        self.kind = dict(W=self.W, BD=CHANNELS, num_warps=WARPS)
        self.reads = dict(BIAS=bias is not None, HISTORY=history is not None, C=CHUNK)

    def grid(self, n: int) -> tuple[int, int]:
        return n, triton.cdiv(self.D, CHANNELS)

    def rows(self, n: int) -> Tensor:
        return self.x.new_empty(n, self.W, self.D, dtype=torch.float32)

    def forward(self, silu: bool) -> tuple[Tensor, Tensor]:
        y, final = torch.empty_like(self.x), self.rows(self.N)
        inputs = (self.x, self.weight, self.bias, self.history)
        conv_kernel[self.grid(self.chunks)](
            *inputs, y, *self.where, self.D, SILU=silu, **self.reads, **self.kind
        )
        conv_edge_kernel[self.grid(self.N)](
            self.x, self.weight, self.history, None, None, final, None, self.cuts.bounds, self.D,
            HISTORY=self.history is not None, BACKWARD=False, FINAL=False,
            BW=triton.next_power_of_2(self.W), **self.kind,
        )  # fmt: skip
        return y, final

    def backward(
        self, dy: Tensor, dfinal: Tensor | None, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, of the filter's rows, of the bias and of the history."""
        dx, dz = torch.empty_like(self.x), torch.empty_like(self.x, dtype=torch.float32)
        dweight, dhistory = self.rows(self.chunks), self.rows(self.N)
        dbias = dz.new_empty(self.chunks, self.D)
        inputs = (self.x, self.weight, self.bias, self.history)
        conv_gradient_kernel[self.grid(self.chunks)](
            *inputs, dy, dz, dweight, dbias, *self.where, self.D, SILU=silu, **self.reads,
            **self.kind,
        )  # fmt: skip
        conv_input_kernel[self.grid(self.chunks)](
            dz, self.weight, dfinal, dx, *self.where, self.D, FINAL=dfinal is not None, C=CHUNK,
            **self.kind,
        )  # fmt: skip
        conv_edge_kernel[self.grid(self.N)](
            self.x, self.weight, self.history, dz, dfinal, None, dhistory, self.cuts.bounds,
            self.D, HISTORY=self.history is not None, BACKWARD=True, FINAL=dfinal is not None,
            BW=triton.next_power_of_2(self.W), **self.kind,
        )  # fmt: skip
        return dx, dweight.sum(0), dbias.sum(0), dhistory
