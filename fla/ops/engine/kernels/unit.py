# SPDX-License-Identifier: MIT
"""Rows of q and k divided by their norms, and the last step of their gradients: the sum over the
value heads of a query head, back through that norm.

BT tokens in all, H heads of q and k, HV value heads, K channels; one program per R rows, where a
row is one token and head.
"""

import triton
import triton.language as tl


@triton.jit
def inverse_norm(
    x,                  # [R, BK], fp32
    EPS: tl.constexpr,  # added to the squared norm: a row of zeros stays one
):  # fmt: skip
    """One over the norm of each row, `[R, 1]`."""
    return tl.rsqrt(tl.sum(x * x, 1) + EPS)[:, None]


@triton.jit
def unit_kernel(
    x,                  # [BT, H, K]
    unit,               # out [BT, H, K]
    count,              # BT H
    K,
    EPS: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,   # the power of two that holds K
):  # fmt: skip
    """R rows of x, divided by their norms."""
    rows, cols = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BK)
    where = rows[:, None] * K + cols[None, :]
    there = (rows < count)[:, None] & (cols < K)[None, :]
    row = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
    row *= inverse_norm(row, EPS)
    tl.store(unit + where, row.to(unit.dtype.element_ty), mask=there)


@triton.jit
def head_gradient_kernel(
    x,                     # [BT, H, K]: q or k as given, before the norm
    grad,                  # [BT, HV, K], fp32: gradient of the rows of each value head
    other,                 # [BT, HV, K], fp32, for OTHER: gradient of b, for which k stands
    out,                   # out [BT, H, K]
    count,                 # BT H
    H, HV, K,
    OTHER: tl.constexpr,   # there is an `other`
    L2NORM: tl.constexpr,  # rows were divided by their norms
    EPS: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,      # the power of two that holds K
):  # fmt: skip
    """R rows of the gradient of x: the sum over value heads, back through the norm."""
    rows, cols = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BK)
    there = (rows < count)[:, None] & (cols < K)[None, :]
    first = (rows // H * HV + rows % H * (HV // H))[:, None] * K + cols[None, :]
    total = tl.zeros([R, BK], tl.float32)
    for j in range(0, HV // H):
        total += tl.load(grad + first + j * K, mask=there, other=0.0)
        if OTHER:
            total += tl.load(other + first + j * K, mask=there, other=0.0)
    where = rows[:, None] * K + cols[None, :]
    if L2NORM:  # dx = (du - u (u . du)) / |x| with u = x / |x|
        row = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
        inverse = inverse_norm(row, EPS)
        row *= inverse
        total = inverse * (total - row * tl.sum(row * total, 1)[:, None])
    tl.store(out + where, total.to(out.dtype.element_ty), mask=there)
