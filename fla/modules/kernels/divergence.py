# SPDX-License-Identifier: MIT
"""The rows of `fused_linear_divergence.py`: one program per row, which reads the logits of both
models for the sums, for the divergences, and for the gradient, which it writes over the student's.
"""

import triton
import triton.language as tl
from torch import Tensor

from fla.modules.kernels.cross_entropy import BLOCK, WARPS, grown
from fla.modules.losses import METRICS, Divergence

MODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
FORWARD, REVERSE, JSD = (tl.constexpr(x) for x in MODES.values())


@triton.jit
def logs(z, zt, lse, lse_t, inside, RATE: tl.constexpr):
    """log q, log p, q and p of a block; the latter 0 outside, where the former are 0 too."""
    log_q, log_p = tl.where(inside, z * RATE - lse, 0.0), tl.where(inside, zt * RATE - lse_t, 0.0)
    q, p = tl.where(inside, tl.exp(log_q), 0.0), tl.where(inside, tl.exp(log_p), 0.0)
    return log_q, log_p, q, p


@triton.jit
def mixed(log_q, log_p, BETA: tl.constexpr):
    """log m, `m = beta p + (1 - beta) q`."""
    most = tl.maximum(log_q, log_p)
    return most + tl.log(BETA * tl.exp(log_p - most) + (1.0 - BETA) * tl.exp(log_q - most))


@triton.jit
def expected(p, x):
    return tl.sum(tl.where(p > 0, p * x, 0.0), 0)


@triton.jit
def divergence_kernel(
    student, teacher, labels, metrics, V, width, width_t, RATE: tl.constexpr, BETA: tl.constexpr,
    WEIGHT: tl.constexpr, CE: tl.constexpr, MODE: tl.constexpr, LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """RATE: 1 / T. `student` and `teacher` hold rows of `width` and `width_t` logits, of which the
    first V are compared; the student's are overwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * width
    teacher += row * width_t
    low = float("-inf")
    most, total, most_t, total_t, most_1, total_1 = low, 0.0, low, 0.0, low, 0.0
    best, top, best_t, top_t = low, 0, low, 0
    for first in range(0, V, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        z = tl.load(student + cols, mask=cols < V, other=float("-inf"))
        zt = tl.load(teacher + cols, mask=cols < V, other=float("-inf"))
        most, total = grown(most, total, z * RATE)
        most_t, total_t = grown(most_t, total_t, zt * RATE)
        most_1, total_1 = grown(most_1, total_1, z)
        high, high_t = tl.max(z, 0), tl.max(zt, 0)
        top = tl.where(high > best, first + tl.argmax(z, 0), top)
        top_t = tl.where(high_t > best_t, first + tl.argmax(zt, 0), top_t)
        best, best_t = tl.maximum(best, high), tl.maximum(best_t, high_t)
    lse, lse_t, lse_1 = most + tl.log(total), most_t + tl.log(total_t), most_1 + tl.log(total_1)
    label, ce = -1, 0.0
    if LABELS:
        label = tl.load(labels + row).to(tl.int32)
        ce = lse_1 - tl.load(student + label)

    forward, reverse, entropy, entropy_t = 0.0, 0.0, 0.0, 0.0
    for first in range(0, V, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        z = tl.load(student + cols, mask=cols < V, other=0.0)
        zt = tl.load(teacher + cols, mask=cols < V, other=0.0)
        log_q, log_p, q, p = logs(z, zt, lse, lse_t, cols < V, RATE)
        entropy -= expected(q, log_q)
        entropy_t -= expected(p, log_p)
        if MODE == FORWARD:
            forward += expected(p, log_p - log_q)
        if MODE == REVERSE:
            reverse += expected(q, log_q - log_p)
        if MODE == JSD:
            log_m = mixed(log_q, log_p, BETA)
            forward += expected(p, log_p - log_m)
            reverse += expected(q, log_q - log_m)
    divergence = forward + reverse
    if MODE == JSD:
        divergence = BETA * forward + (1.0 - BETA) * reverse
    metrics += row * 5
    tl.store(metrics, divergence / (RATE * RATE))
    tl.store(metrics + 1, ce)
    tl.store(metrics + 2, entropy_t)
    tl.store(metrics + 3, entropy)
    tl.store(metrics + 4, tl.where(top == top_t, 1.0, 0.0))

    for first in range(0, width, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        z = tl.load(student + cols, mask=cols < V, other=0.0)
        zt = tl.load(teacher + cols, mask=cols < V, other=0.0)
        log_q, log_p, q, p = logs(z, zt, lse, lse_t, cols < V, RATE)
        if MODE == FORWARD:
            dz = q - p
        if MODE == REVERSE:
            dz = tl.where(q > 0, q * (log_q - log_p - reverse), 0.0)
        if MODE == JSD:
            log_m = mixed(log_q, log_p, BETA)
            dz = tl.where(q > 0, (1.0 - BETA) * q * (log_q - log_m - reverse), 0.0)
        dz *= WEIGHT / RATE
        if LABELS:
            own = tl.where(cols < V, tl.exp(z - lse_1), 0.0)
            dz += CE * (own - tl.where(cols == label, 1.0, 0.0))
        tl.store(student + cols, dz, mask=cols < width)


def rows(z: Tensor, teacher: Tensor, labels: Tensor | None, options: Divergence) -> Tensor:
    """Summed metrics; z `[rows, V]` in fp32, contiguous, becomes the gradient of the summed loss,
    0 for tokens that the teacher `[rows, V']` has not.
    """
    metrics = z.new_empty(len(z), len(METRICS))
    V = min(z.shape[1], teacher.shape[1])
    divergence_kernel[(len(z),)](
        z, teacher, labels, metrics, V, z.shape[1], teacher.shape[1],
        RATE=1 / options.temperature, BETA=options.beta, WEIGHT=options.weight,
        CE=options.ce_weight, MODE=MODES[options.kind], LABELS=labels is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS,
    )  # fmt: skip
    return metrics.sum(0)
