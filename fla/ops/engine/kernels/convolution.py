# SPDX-License-Identifier: MIT
"""Short causal depthwise convolution, `fla/modules/convolution.py`, and its gradient. With e the
sequence behind its W rows of history, and tap i reading `lag = W - 1 - i` tokens back,

    z_t = bias + sum_i w_i e_{t - lag}        y = z or silu(z)        de_s = sum_i w_i dz_{s + lag}

One program per chunk of tokens and tile of channels. Rows of D channels: weight [W], history and
its like [N, W] with the oldest first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.ops.engine.kernels.launch import CHUNK, Cuts
from fla.ops.engine.rows.convolution import rows

CHANNELS, WARPS = 64, 4


@triton.jit
def extended(x, history, r, begin, there, n, D, cols, W: tl.constexpr, HISTORY: tl.constexpr):
    """Rows r of the sequence from `begin` on, or of the history before it; zeros elsewhere."""
    inside = there & (r >= begin)[:, None]
    rows = tl.load(x + r[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if HISTORY:
        at = n * W + W + r - begin
        before = there & (r < begin)[:, None]
        rows += tl.load(history + at[:, None] * D + cols[None, :], mask=before, other=0.0)
    return rows


@triton.jit
def activation_input(
    x, weight, bias, history, t, begin, there, n, D, cols, W: tl.constexpr, BIAS: tl.constexpr,
    HISTORY: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """z `[C, BD]` of tokens t."""
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
    x, weight, bias, history, y, starts, ends, begins, owners, D, W: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, HISTORY: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
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
    x, weight, bias, history, dy, dz, dweight, dbias, starts, ends, begins, owners, D,
    W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, HISTORY: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dz in fp32, and of every chunk its part of dweight `[chunks, W, D]` and dbias."""
    chunk, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    t, end = tl.load(starts + chunk) + tl.arange(0, C), tl.load(ends + chunk)
    begin, n = tl.load(begins + chunk), tl.load(owners + chunk)
    there = (t < end)[:, None] & (cols < D)[None, :]
    at = t[:, None] * D + cols[None, :]
    grad = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
    if SILU:
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
def spread(dz, weight, s, begin, end, cols, D, W: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """`sum_i w_i dz_{s + lag}` over tokens of the sequence."""
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
    dz, weight, dfinal, dx, starts, ends, begins, owners, D, W: tl.constexpr,
    FINAL: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    chunk, cols = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    s, end = tl.load(starts + chunk) + tl.arange(0, C), tl.load(ends + chunk)
    begin, n = tl.load(begins + chunk), tl.load(owners + chunk)
    there = (s < end)[:, None] & (cols < D)[None, :]
    grad = spread(dz, weight, s, begin, end, cols, D, W, C, BD)
    if FINAL:
        row = s - end + W
        kept = there & (row >= 0)[:, None]
        at = (n * W + row)[:, None] * D + cols[None, :]
        grad += tl.load(dfinal + at, mask=kept, other=0.0)
    tl.store(dx + s[:, None] * D + cols[None, :], grad.to(dx.dtype.element_ty), mask=there)


@triton.jit
def conv_edge_kernel(
    x, weight, history, dz, dfinal, final, dhistory, bounds, D, W: tl.constexpr,
    HISTORY: tl.constexpr, BACKWARD: tl.constexpr, FINAL: tl.constexpr, BW: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Of one sequence, the last W rows; or the gradient of its history."""
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
    """A call of the convolution: x `[tokens, D]`, its filter as rows in fp32, and its launches."""

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
