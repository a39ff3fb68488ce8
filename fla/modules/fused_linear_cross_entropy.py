# SPDX-License-Identifier: MIT
"""The last linear layer and its cross entropy in chunks of tokens: the full `[M, V]` logits never
exist.

    logits = x W^T + b,  then the loss of `fused_cross_entropy.py`

Each chunk's logits are turned into gradients at once and forgotten, so memory is one chunk of
logits, in the forward as in the backward. With p = softmax(z) and y the smoothed target,
`dz = p - y + 2 zw lse(z) p`, taken through the soft cap (`1 - (z/cap)^2`) and the scale.
l2warp (RWKV) adds `factor * max(z) / M` to the gradient of the largest logit of each of the M rows,
those with an ignored label too, as `l2_warp` does.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import check_targets, check_width, checked
from fla._lazy import lazy_names
from fla.core.checks import refuse
from fla.core.stage import Facts, Form, Stage, first_tensor, not_compiled, tokenwise
from fla.modules.fused_cross_entropy import shape_logits
from fla.modules.losses import LogitShape
from fla.ops.engine.kernels import support
from fla.ops.engine.kernels.tensors import on_device

# loads torch's DTensor, which takes a second
__getattr__, _names = lazy_names(__name__, {"fla.modules.parallel": ["LinearLossParallel"]})


@dataclass(frozen=True)
class LinearLoss:
    """The loss's options, under the names of `FusedLinearCrossEntropyLoss`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    logit_softcapping: float | None = None
    num_chunks: int = 8
    reduction: str = "mean"
    use_l2warp: bool = False
    l2_penalty_factor: float = 1e-4
    accumulate_grad_in_fp32: bool = True
    lse_square_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                f"linear cross entropy: reduction is {self.reduction!r}; expected 'mean' or 'sum'"
            )
        if self.num_chunks < 1:
            raise ValueError(
                f"linear cross entropy: num_chunks is {self.num_chunks}; expected at least 1"
            )

    def penalty(self, rows: int) -> float | None:
        """l2warp's factor for each of all the rows; None without l2warp."""
        return self.l2_penalty_factor / max(1, rows) if self.use_l2warp else None

    def rows(
        self, logits: Tensor, target: Tensor, weight: Tensor, penalty: float | None
    ) -> tuple[Tensor, Tensor]:
        """Summed loss of one chunk, and the gradient of its logits `[rows, V]`, which are
        overwritten, of the loss times `weight`, with `penalty` times its largest logit for every
        row.
        """
        V = logits.shape[-1]
        z = shape_logits(logits, self.logit_scale, self.logit_softcapping)
        kept = (target != self.ignore_index).unsqueeze(-1)
        index = target.clamp(min=0).unsqueeze(-1)
        picked = z.gather(-1, index)
        lse = picked - z.log_softmax(-1).gather(-1, index)
        loss = lse - (1 - self.label_smoothing) * picked + self.lse_square_scale * lse.square()
        if self.label_smoothing:
            loss = loss - self.label_smoothing * z.mean(-1, keepdim=True)
        grad = z.softmax(-1)  # on CPUs many times faster than exp
        if self.lse_square_scale:
            grad.mul_(1 + 2 * self.lse_square_scale * lse)
        if self.label_smoothing:
            grad.sub_(self.label_smoothing / V)
        grad.scatter_add_(-1, index, torch.full_like(picked, self.label_smoothing - 1))
        grad.mul_(kept * weight)
        if penalty is not None:
            largest, where = z.max(-1, keepdim=True)
            grad.scatter_add_(-1, where, largest * penalty)
        if self.logit_softcapping:
            grad.mul_(1 - (z / self.logit_softcapping).square())
        return (loss * kept).sum(), grad.mul_(self.logit_scale)

    def rows_in_triton(
        self, logits: Tensor, target: Tensor, weight: Tensor, penalty: float | None
    ) -> tuple[Tensor, Tensor]:
        """`rows` in Triton, without a copy of the logits."""
        from fla.modules.kernels import cross_entropy

        shape = LogitShape(**{name: getattr(self, name) for name in LogitShape._fields})
        with on_device(logits.device):
            rows = cross_entropy.forward(logits, target, shape)
            dloss = weight.expand(len(target)).contiguous()
            zero = torch.zeros_like(dloss)
            cross_entropy.backward(logits, target, rows, dloss, zero, shape, logits, penalty)
        return rows.loss.sum(), logits


def _problem(facts: Facts) -> tuple[Any, ...]:
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(0))
    options = LinearLoss(3, 0.1, 1.5, 4.0, lse_square_scale=0.01)
    target, weight = torch.arange(1, 6, device=facts.device), torch.tensor(0.5, device=facts.device)
    return options, logits.to(facts.device, facts.dtype), target, weight, 0.1


LINEAR_ROWS = Stage(
    "linear_cross_entropy",
    {
        "triton": Form(
            LinearLoss.rows_in_triton,
            "logits of a chunk of tokens at a time, turned into gradients at once in Triton",
            (not_compiled, support.runs),
            support.checked,
        ),
        "torch": Form(
            LinearLoss.rows, "logits of a chunk of tokens at a time, turned into gradients at once"
        ),
    },
    lambda options, logits, *_: first_tensor(logits),
    tokenwise,
    _problem,
    differentiable=False,
)


@checked
def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, weight, bias, options: LinearLoss):
        need_x, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        rows = partial(LINEAR_ROWS, "fused_linear_cross_entropy_loss", None, options)
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = wide if options.accumulate_grad_in_fp32 else weight.dtype
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=sums) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=sums) if need_bias else None
        total = x.new_zeros((), dtype=wide)
        count = (target != options.ignore_index).sum().clamp(min=1).to(wide)
        share = 1 / count if options.reduction == "mean" else torch.ones_like(count)
        size, penalty = max(1, -(-len(x) // options.num_chunks)), options.penalty(len(x))
        for x_c, t_c, dx_c in zip(
            x.split(size), target.split(size), (x if dx is None else dx).split(size), strict=True
        ):
            loss, grad = rows(F.linear(x_c, weight, bias), t_c, share, penalty)
            total += loss
            if dbias is not None:
                dbias += grad.sum(0, dtype=sums)
            grad = grad.to(x.dtype)
            if dx is not None:
                torch.mm(grad, weight.to(x.dtype), out=dx_c)
            if dweight is not None:
                add_product(dweight, grad.mT, x_c)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(dx, dweight, dbias)
        return total * share

    @staticmethod
    def backward(ctx, scale: Tensor):
        dx, dweight, dbias = ctx.saved_tensors
        types = (None if dx is None else dx.dtype, *ctx.dtypes)
        grads = [
            None if d is None else (d * scale).to(t)
            for d, t in zip((dx, dweight, dbias), types, strict=True)
        ]
        return grads[0], None, grads[1], grads[2], None


def _refuse_group(op: str, process_group: object | None) -> None:
    fix = "drop it, and give a rank's logits to FusedCrossEntropyLoss(process_group=...)"
    refuse(op, "process_group", process_group, fix)


@checked
def fused_linear_cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcapping: float | None = None,
    num_chunks: int = 8,
    reduction: str = "mean",
    use_l2warp: bool = False,
    l2_penalty_factor: float = 1e-4,
    accumulate_grad_in_fp32: bool = True,
    process_group: object | None = None,
    lse_square_scale: float = 0.0,
) -> Tensor:
    """Loss of x `[..., D]` under the head weight `[V, D]` for targets `[...]`; see the module.
    `process_group` is refused: a vocabulary split over processes is `cross_entropy_loss`'s.

    Example:
        >>> x, head = torch.zeros(5, 8), torch.randn(16, 8)
        >>> round(fused_linear_cross_entropy_loss(x, torch.arange(5), head).exp().item(), 3)
        16.0
    """
    _refuse_group("fused_linear_cross_entropy_loss", process_group)
    options = LinearLoss(
        ignore_index,
        label_smoothing,
        logit_scale,
        logit_softcapping,
        num_chunks,
        reduction,
        use_l2warp,
        l2_penalty_factor,
        accumulate_grad_in_fp32,
        lse_square_scale,
    )
    op = "fused_linear_cross_entropy_loss"
    check_width(op, "weight", weight, None, 2, beside=x)
    check_width(op, "x", x, None)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has width {x.shape[-1]} but weight is {list(weight.shape)}; expected [V, "
            f"{x.shape[-1]}]"
        )
    check_targets(op, ("x", x), target, len(weight), ignore_index)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    x, target = x.flatten(0, -2), target.flatten()
    with torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, target, weight, bias, options)


class FusedLinearCrossEntropyLoss(nn.Module):
    """`fused_linear_cross_entropy_loss` as a module."""

    @checked
    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        logit_softcapping: float | None = None,
        num_chunks: int = 8,
        reduction: str = "mean",
        use_l2warp: bool = False,
        l2_penalty_factor: float = 1e-4,
        accumulate_grad_in_fp32: bool = True,
        process_group: object | None = None,
        lse_square_scale: float = 0.0,
    ):
        super().__init__()
        _refuse_group("FusedLinearCrossEntropyLoss", process_group)
        names = LinearLoss.__dataclass_fields__
        self.options = {name: value for name, value in locals().items() if name in names}
        LinearLoss(**self.options)

    @checked
    def forward(
        self, x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return fused_linear_cross_entropy_loss(x, target, weight, bias, **self.options)
