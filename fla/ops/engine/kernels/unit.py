# SPDX-License-Identifier: MIT
"""Rows of q and k divided by their norms, and the last step of their gradients: the sum over the
value heads of a query head, through that norm.
"""

import triton
import triton.language as tl


@triton.jit
def inverse_norm(x, EPS: tl.constexpr):
    """Of rows `[R, BK]` in fp32, as a column."""
    return tl.rsqrt(tl.sum(x * x, 1) + EPS)[:, None]


@triton.jit
def unit_kernel(
    x, unit, count, K, EPS: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BK)
    where = rows[:, None] * K + cols[None, :]
    there = (rows < count)[:, None] & (cols < K)[None, :]
    row = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
    row *= inverse_norm(row, EPS)
    tl.store(unit + where, row.to(unit.dtype.element_ty), mask=there)


@triton.jit
def head_gradient_kernel(
    x, grad, other, out, count, H, HV, K, OTHER: tl.constexpr, L2NORM: tl.constexpr,
    EPS: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`out` `[tokens, H, K]`: the sum over value heads of `grad` `[tokens, HV, K]`, and of `other`
    where there is one, through the norm of x. `count` rows of (token, query head).
    """
    rows, cols = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BK)
    there = (rows < count)[:, None] & (cols < K)[None, :]
    first = (rows // H * HV + rows % H * (HV // H))[:, None] * K + cols[None, :]
    total = tl.zeros([R, BK], tl.float32)
    for j in range(0, HV // H):
        total += tl.load(grad + first + j * K, mask=there, other=0.0)
        if OTHER:
            total += tl.load(other + first + j * K, mask=there, other=0.0)
    where = rows[:, None] * K + cols[None, :]
    if L2NORM:
        row = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
        inverse = inverse_norm(row, EPS)
        row *= inverse
        total = inverse * (total - row * tl.sum(row * total, 1)[:, None])
    tl.store(out + where, total.to(out.dtype.element_ty), mask=there)
