# SPDX-License-Identifier: MIT
"""The rows of `fused_cross_entropy.py` and their gradient: one program per row, which reads its
logits once for the sums and once for the gradient. The gradient may be written over the logits.

M rows (tokens), V logits of each; BLOCK logits at a time in registers. Per row there is one number
of all that is not logits, fp32 unless a comment names another dtype.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla.modules.losses import LogitShape

BLOCK, WARPS = 4096, 8  # logits at a time


@triton.jit
def shaped(
    z,                    # [BLOCK], of any dtype
    SCALE: tl.constexpr,
    CAP: tl.constexpr,    # 0: none
):  # fmt: skip
    """`cap tanh(scale z / cap)`, or scale z without a cap; `[BLOCK]` in fp32."""
    z = z.to(tl.float32) * SCALE
    if CAP != 0:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        z = CAP * (1.0 - 2.0 / (tl.exp(2.0 * z / CAP) + 1.0))
    return z


@triton.jit
def grown(
    most, total,  # of the blocks so far: the maximum, and the sum of exp(z - maximum)
    z,            # [BLOCK], -inf where there is no logit
):  # fmt: skip
    """`most` and `total` with one more block."""
    larger = tl.maximum(most, tl.max(z, 0))
    # -inf - (-inf) would be NaN where all logits so far are -inf
    base = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, total * tl.exp(most - base) + tl.sum(tl.exp(z - base), 0)


@triton.jit
def cross_entropy_kernel(
    logits,                   # [M, V], of any dtype
    targets,                  # [M], int64
    loss, z_loss,             # out [M]: the loss, z-loss included, and the z-loss; 0 if ignored
    lses,                     # out [M]: log of the sum of exponentials
    tops,                     # out [M], int32: number of the largest logit
    V,
    ignore,                   # the target of rows without a loss
    SCALE: tl.constexpr,      # logits are multiplied by it,
    CAP: tl.constexpr,        # and capped; 0: not
    SMOOTHING: tl.constexpr,  # share of the loss that all logits have evenly
    SQUARE: tl.constexpr,     # factor of the z-loss, lse squared
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The losses of one row, and what its gradient needs, in one pass over the logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    most, total, sums = float("-inf"), 0.0, 0.0
    best, top = float("-inf"), 0
    for first in range(0, V, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        raw = tl.load(logits + row * V + cols, mask=cols < V, other=0.0)
        z = tl.where(cols < V, shaped(raw, SCALE, CAP), float("-inf"))
        most, total = grown(most, total, z)
        sums += tl.sum(tl.where(cols < V, z, 0.0), 0)
        block_best, block_top = tl.max(z, 0), tl.argmax(z, 0)
        top = tl.where(block_best > best, first + block_top, top)
        best = tl.maximum(best, block_best)
    lse = most + tl.log(total)
    kept = target != ignore
    known = (target >= 0) & (target < V)
    # a target outside the vocabulary gives NaN, and no read outside the row
    raw = tl.load(logits + row * V + target, mask=kept & known, other=0.0)
    picked = tl.where(known, shaped(raw, SCALE, CAP), float("nan"))
    own = lse - (1.0 - SMOOTHING) * picked - SMOOTHING * sums / V
    squared = SQUARE * lse * lse
    tl.store(loss + row, tl.where(kept, own + squared, 0.0))
    tl.store(z_loss + row, tl.where(kept, squared, 0.0))
    tl.store(lses + row, lse)
    tl.store(tops + row, top)


@triton.jit
def cross_entropy_gradient_kernel(
    logits,                   # [M, V], of any dtype
    targets,                  # [M], int64
    lses,                     # [M]
    tops,                     # [M], int32
    dloss, dz_loss,           # [M]
    out,                      # out [M, V]; may be `logits`
    V,
    ignore,                   # the target of rows without a loss
    factor,                   # for WARP
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SQUARE: tl.constexpr,
    WARP: tl.constexpr,       # factor (largest logit) is added to its gradient, ignored or not
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one row's logits. Each block is read before it is written, and by the same
    program, so `out` may be `logits`.
    """
    row = tl.program_id(0).to(tl.int64)
    target, lse, top = tl.load(targets + row), tl.load(lses + row), tl.load(tops + row)
    kept = target != ignore
    grad = tl.where(kept, tl.load(dloss + row), 0.0)
    squares = grad + tl.where(kept, tl.load(dz_loss + row), 0.0)
    mass = grad + squares * 2.0 * SQUARE * lse  # the gradient of lse
    for first in range(0, V, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        z = shaped(tl.load(logits + row * V + cols, mask=cols < V, other=0.0), SCALE, CAP)
        dz = tl.exp(z - lse) * mass - grad * SMOOTHING / V
        dz -= tl.where(cols == target, grad * (1.0 - SMOOTHING), 0.0)
        dz = tl.where(kept, dz, 0.0)
        if WARP:
            dz += tl.where(cols == top, z * factor, 0.0)
        if CAP != 0:  # the slope of the cap, 1 - tanh^2
            dz *= 1.0 - z / CAP * (z / CAP)
        tl.store(out + row * V + cols, (dz * SCALE).to(out.dtype.element_ty), mask=cols < V)


def _switches(shape: LogitShape) -> dict[str, float]:
    names = ("SCALE", "CAP", "SMOOTHING", "SQUARE")
    return {name: float(x or 0.0) for name, x in zip(names, shape[:4], strict=True)}


class Rows(NamedTuple):
    """What the forward pass finds for each row, `[M]`: loss, z-loss (0 where ignored), log of the
    sum of exponentials, and the number of the largest logit.
    """

    loss: Tensor
    z_loss: Tensor
    lse: Tensor
    top: Tensor


def forward(logits: Tensor, target: Tensor, shape: LogitShape) -> Rows:
    """logits `[M, V]`, target `[M]`."""
    M, V = logits.shape
    loss, z_loss, lse = logits.new_empty(3, M, dtype=torch.float32)
    rows = Rows(loss, z_loss, lse, logits.new_empty(M, dtype=torch.int32))
    cross_entropy_kernel[(M,)](
        logits, target, *rows, V, shape.ignore_index, **_switches(shape),
        BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS,
    )  # fmt: skip
    return rows


def backward(
    logits: Tensor,
    target: Tensor,
    rows: Rows,
    dloss: Tensor,
    dz_loss: Tensor,
    shape: LogitShape,
    out: Tensor,
    factor: float | None = None,
) -> Tensor:
    """The gradient of the logits, written into `out`, which may be `logits`; see the kernel."""
    M, V = logits.shape
    cross_entropy_gradient_kernel[(M,)](
        logits, target, rows.lse, rows.top, dloss, dz_loss, out, V, shape.ignore_index,
        factor or 0.0, **_switches(shape), WARP=factor is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS,
    )  # fmt: skip
    return out
