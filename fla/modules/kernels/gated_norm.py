# SPDX-License-Identifier: MIT
"""RMSNorm with an output gate, `(w x / sqrt(mean(x^2) + eps) + b) act(g)`, and its gradient: one
pass over the rows each way. The gradient of w is summed per program, then over the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384  # channels a program can hold
PROGRAMS = 512  # in the backward, on every device, so that sums do not depend on it
CELLS = 2048  # per tile


@triton.jit
def gate(g, SIGMOID: tl.constexpr):
    """act(g) and its derivative; act is sigmoid, or swish."""
    s = 1.0 / (1.0 + tl.exp(-g))
    if SIGMOID:
        value, slope = s, s * (1.0 - s)
    else:
        value, slope = g * s, s * (1.0 + g * (1.0 - s))
    return value, slope


@triton.jit
def normalised(x, there, D, eps):
    row = tl.load(x, mask=there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row, 1) / D + eps)[:, None]
    return row * inverse, inverse


@triton.jit
def gated_norm_kernel(
    x, g, w, b, y, count, D, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BD)
    where = rows[:, None] * D + cols[None, :]
    there = (rows < count)[:, None] & (cols < D)[None, :]
    out, _ = normalised(x + where, there, D, eps)
    if WEIGHT:
        out *= tl.load(w + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        out += tl.load(b + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    value, _ = gate(tl.load(g + where, mask=there, other=0.0).to(tl.float32), SIGMOID)
    tl.store(y + where, (out * value).to(y.dtype.element_ty), mask=there)


@triton.jit
def gated_norm_gradient_kernel(
    x, g, w, b, dy, dx, dg, dw, db, count, D, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SIGMOID: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    cols, program = tl.arange(0, BD), tl.program_id(0)
    weight = tl.full([BD], 1.0, tl.float32)
    bias = tl.zeros([BD], tl.float32)
    sum_w = tl.zeros([BD], tl.float32)
    sum_b = tl.zeros([BD], tl.float32)
    if WEIGHT:
        weight = tl.load(w + cols, mask=cols < D, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(b + cols, mask=cols < D, other=0.0).to(tl.float32)
    for first in range(program * R, count, tl.num_programs(0) * R):
        rows = tl.cast(first, tl.int64) + tl.arange(0, R)
        where = rows[:, None] * D + cols[None, :]
        there = (rows < count)[:, None] & (cols < D)[None, :]
        unit, inverse = normalised(x + where, there, D, eps)
        value, slope = gate(tl.load(g + where, mask=there, other=0.0).to(tl.float32), SIGMOID)
        grad = tl.load(dy + where, mask=there, other=0.0).to(tl.float32)
        dgate = grad * (unit * weight[None, :] + bias[None, :]) * slope
        tl.store(dg + where, dgate.to(dg.dtype.element_ty), mask=there)
        grad *= value
        sum_w += tl.sum(grad * unit, 0)
        sum_b += tl.sum(grad, 0)
        grad *= weight[None, :]
        grad = inverse * (grad - unit * (tl.sum(grad * unit, 1) / D)[:, None])
        tl.store(dx + where, grad.to(dx.dtype.element_ty), mask=there)
    if WEIGHT:
        tl.store(dw + program * D + cols, sum_w, mask=cols < D)
    if BIAS:
        tl.store(db + program * D + cols, sum_b, mask=cols < D)


def _sizes(D: int) -> dict[str, int]:
    BD = triton.next_power_of_2(D)
    return dict(R=max(1, CELLS // BD), BD=BD, num_warps=4 if BD <= 4096 else 16)


def forward(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, sigmoid: bool, eps: float
) -> Tensor:
    """y of contiguous x, g `[rows, D]`."""
    (count, D), y = x.shape, torch.empty_like(x)
    sizes = _sizes(D)
    gated_norm_kernel[(triton.cdiv(count, sizes["R"]),)](
        x, g, weight, bias, y, count, D, eps, WEIGHT=weight is not None, BIAS=bias is not None,
        SIGMOID=sigmoid, **sizes,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigmoid: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, g, weight and bias."""
    (count, D), sizes = x.shape, _sizes(x.shape[1])
    dx, dg, dy = torch.empty_like(x), torch.empty_like(g), dy.contiguous()
    programs = min(PROGRAMS, triton.cdiv(count, sizes["R"]))
    sums = [
        None if y is None else y.new_empty(programs, D, dtype=torch.float32) for y in (weight, bias)
    ]
    gated_norm_gradient_kernel[(programs,)](
        x, g, weight, bias, dy, dx, dg, *sums, count, D, eps, WEIGHT=weight is not None,
        BIAS=bias is not None, SIGMOID=sigmoid, **sizes,
    )  # fmt: skip
    dw, db = (
        None if y is None or total is None else total.sum(0).to(y.dtype)
        for y, total in zip((weight, bias), sums, strict=True)
    )
    return dx, dg, dw, db
