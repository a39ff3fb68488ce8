# SPDX-License-Identifier: MIT
"""Cross entropy with logit scale, soft cap, label smoothing and z-loss.

z = cap * tanh(scale * logits / cap)        (no cap: z = scale * logits)
loss = lse(z) - (1 - s) z_target - s mean(z) + zw * lse(z)^2         s: label smoothing, zw:
lse_square_scale
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import check_targets, checked, shaped
from fla.core.operator import transformed
from fla.core.stage import Facts, Form, Stage, first_tensor, not_compiled, tokenwise
from fla.modules.losses import LogitShape
from fla.modules.vocab_parallel import vocab_parallel_cross_entropy
from fla.ops.engine.kernels import support
from fla.ops.engine.kernels.tensors import on_device

REDUCTIONS = ("mean", "sum", "none")


@checked
def shape_logits(logits: Tensor, logit_scale: float, logit_softcapping: float | None) -> Tensor:
    """The z of the equation, in fp32 (fp64 for fp64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z if logit_scale == 1 else z * logit_scale
    return z if not logit_softcapping else logit_softcapping * torch.tanh(z / logit_softcapping)


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, shape: LogitShape, inplace: bool):
        from fla.modules.kernels import cross_entropy

        logits = logits.contiguous()
        with on_device(logits.device):
            rows = cross_entropy.forward(logits, target, shape)
        ctx.save_for_backward(logits, target, *rows)
        ctx.shape, ctx.inplace = shape, inplace
        return rows.loss, rows.z_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, dz_loss: Tensor):
        from fla.modules.kernels import cross_entropy

        logits, target, *rows = ctx.saved_tensors
        grads = (dloss.contiguous(), dz_loss.contiguous())
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        with on_device(logits.device):
            cross_entropy.backward(
                logits, target, cross_entropy.Rows(*rows), *grads, ctx.shape, out
            )
        return out, None, None, None


class _WriteOver(torch.autograd.Function):
    """x, whose gradient is written into its memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return ctx.saved_tensors[0].detach().copy_(dx)


def _plain(
    logits: Tensor, target: Tensor, shape: LogitShape, inplace: bool
) -> tuple[Tensor, Tensor]:
    logits = _WriteOver.apply(logits) if inplace and not transformed() else logits
    z = shape_logits(logits, shape.logit_scale, shape.logit_softcapping)
    how: Any = dict(ignore_index=shape.ignore_index, label_smoothing=shape.label_smoothing)
    loss = F.cross_entropy(z, target, **how, reduction="none")
    if not shape.lse_square_scale:
        return loss, torch.zeros_like(loss)
    kept = target != shape.ignore_index
    z_loss = shape.lse_square_scale * z.logsumexp(-1).square() * kept
    return loss + z_loss, z_loss


def _in_triton(
    logits: Tensor, target: Tensor, shape: LogitShape, inplace: bool
) -> tuple[Tensor, Tensor]:
    return _Triton.apply(logits, target, shape, inplace)


def _problem(facts: Facts) -> tuple[Any, ...]:
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(0))
    shape = LogitShape(1.5, 4.0, 0.1, 0.01, ignore_index=3)
    target = torch.arange(5, device=facts.device)
    return logits.to(facts.device, facts.dtype), target, shape, False


CROSS_ENTROPY = Stage(
    "cross_entropy",
    {
        "triton": Form(
            _in_triton,
            "two passes over a row in Triton; backward by hand",
            (not_compiled, support.runs),
            support.checked,
        ),
        "torch": Form(_plain, "in fp32, under plain autograd"),
    },
    first_tensor,
    tokenwise,
    _problem,
)


@shaped(logits="M V")
def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and z-loss (already part of the loss) of every row: logits `[M, V]`, target `[M]`; 0
    where ignored. `inplace_backward` writes the gradient over the logits, which nothing may read
    after that. With a `process_group` each rank holds its share of the vocabulary
    (`fla.modules.vocab_parallel`).

    Example:
        >>> loss, z_loss = cross_entropy_loss(torch.zeros(2, 4), torch.tensor([1, -100]))
        >>> loss.exp().round().tolist()
        [4.0, 1.0]
    """
    if process_group is None:
        check_targets(
            "cross_entropy_loss", ("logits", logits), target, logits.shape[-1], ignore_index
        )
    shape = LogitShape(
        logit_scale, logit_softcapping, label_smoothing, lse_square_scale, ignore_index
    )
    if process_group is not None:
        logits = _WriteOver.apply(logits) if inplace_backward else logits
        z = shape_logits(logits, logit_scale, logit_softcapping)
        return vocab_parallel_cross_entropy(z, target, shape, process_group)
    return CROSS_ENTROPY("cross_entropy_loss", None, logits, target, shape, inplace_backward)


class FusedCrossEntropyLoss(nn.Module):
    """`cross_entropy_loss` over logits `[..., V]` and targets `[...]`, averaged over the targets
    that count.

    With `return_z_loss` the result is the pair (loss, z-loss).

    Example:
        >>> loss = FusedCrossEntropyLoss(label_smoothing=0.1)
        >>> round(loss(torch.zeros(2, 4), torch.tensor([1, -100])).exp().item(), 4)
        4.0
    """

    @checked
    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        logit_softcapping: float | None = None,
        inplace_backward: bool = False,
        process_group: dist.ProcessGroup | None = None,
        return_z_loss: bool = False,
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"FusedCrossEntropyLoss: reduction is {reduction!r}; expected one of {REDUCTIONS}"
            )
        self.reduction, self.return_z_loss = reduction, return_z_loss
        self.options: dict[str, Any] = dict(
            label_smoothing=label_smoothing,
            logit_scale=logit_scale,
            lse_square_scale=lse_square_scale,
            logit_softcapping=logit_softcapping,
            ignore_index=ignore_index,
            inplace_backward=inplace_backward,
            process_group=process_group,
        )

    @checked
    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.options["process_group"] is None:  # else each rank holds some of the vocabulary
            name, ignored = type(self).__name__, self.options["ignore_index"]
            check_targets(name, ("input", input), target, input.shape[-1], ignored)
        rows = cross_entropy_loss(input.flatten(0, -2), target.flatten(), **self.options)
        count = (target != self.options["ignore_index"]).sum().clamp(min=1)
        results = []
        for x in rows:
            if self.reduction == "none":
                x = x.view(target.shape)
            else:
                x = x.sum() / count if self.reduction == "mean" else x.sum()
            results.append(x)
        return (results[0], results[1]) if self.return_z_loss else results[0]
