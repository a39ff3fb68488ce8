# SPDX-License-Identifier: MIT
"""Cross entropy with logit scale, soft cap, label smoothing and z-loss.

z = cap * tanh(scale * logits / cap)        (no cap: z = scale * logits)
loss = lse(z) - (1 - s) z_target - s mean(z) + zw * lse(z)^2         s: label smoothing, zw:
lse_square_scale
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def shape_logits(logits: Tensor, logit_scale: float, logit_softcapping: float | None) -> Tensor:
    """The z of the equation, in fp32 (fp64 for fp64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    return z if not logit_softcapping else logit_softcapping * torch.tanh(z / logit_softcapping)


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Loss and z-loss (already part of the loss) of every row: logits `[M, V]`, target `[M]`; 0
    where ignored.
    """
    z = shape_logits(logits, logit_scale, logit_softcapping)
    kept = target != ignore_index
    lse = z.logsumexp(-1)
    picked = z.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - label_smoothing * z.mean(-1)
    z_loss = lse_square_scale * lse.square()
    return ((loss + z_loss) * kept, z_loss * kept)


class FusedCrossEntropyLoss(nn.Module):
    """`cross_entropy_loss` over logits `[..., V]` and targets `[...]`, averaged over the targets
    that count.

    With `return_z_loss` the result is the pair (loss, z-loss). Vocabulary-parallel logits
    (`process_group`) are refused.

    Example:
        >>> loss = FusedCrossEntropyLoss(label_smoothing=0.1)
        >>> round(loss(torch.zeros(2, 4), torch.tensor([1, -100])).exp().item(), 4)
        4.0
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        logit_softcapping: float | None = None,
        process_group: object | None = None,
        return_z_loss: bool = False,
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"FusedCrossEntropyLoss: reduction is {reduction!r}; expected one of {REDUCTIONS}"
            )
        if process_group is not None:
            raise ValueError(
                "FusedCrossEntropyLoss: process_group is not supported; gather the logits first"
            )
        self.reduction, self.return_z_loss = reduction, return_z_loss
        self.options: dict[str, Any] = dict(
            label_smoothing=label_smoothing,
            logit_scale=logit_scale,
            lse_square_scale=lse_square_scale,
            logit_softcapping=logit_softcapping,
            ignore_index=ignore_index,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
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
