# SPDX-License-Identifier: MIT
"""The last linear layers of two models and the KL divergence between what they predict, without
their logits: `fused_linear_divergence.py` under the names and arguments that users know.
"""

import torch.nn as nn
from torch import Tensor

from fla._arguments import checked
from fla.modules.fused_linear_divergence import fused_linear_divergence
from fla.modules.losses import Head


@checked
def fused_kl_div_loss(
    x: Tensor,
    target_x: Tensor,
    weight: Tensor,
    target_weight: Tensor,
    reduction: str = "batchmean",
    accumulate_grad_in_fp32: bool = True,
) -> Tensor:
    """`mean over tokens of KL(softmax(target_x target_weight^T) | softmax(x weight^T))`. Gradients
    are summed in fp32 or wider; asking for less (`accumulate_grad_in_fp32=False`) is refused.

    Example:
        >>> x, head = torch.randn(3, 8), torch.randn(16, 8)
        >>> round(fused_kl_div_loss(x, x, head, head).item(), 4)
        0.0
    """
    if reduction != "batchmean":
        raise ValueError(f"fused_kl_div_loss: reduction is {reduction!r}; expected 'batchmean'")
    if not accumulate_grad_in_fp32:
        raise ValueError(
            "fused_kl_div_loss: accumulate_grad_in_fp32=False has no effect here: gradients are "
            "summed in fp32; leave it out"
        )
    return fused_linear_divergence(x, Head(weight), (target_x, Head(target_weight)))[0]


class FusedKLDivLoss(nn.Module):
    """`fused_kl_div_loss` as a module."""

    @checked
    def __init__(self, reduction: str = "batchmean", accumulate_grad_in_fp32: bool = True):
        super().__init__()
        if reduction != "batchmean":
            raise ValueError(f"FusedKLDivLoss: reduction is {reduction!r}; expected 'batchmean'")
        self.reduction, self.accumulate = reduction, accumulate_grad_in_fp32

    @checked
    def forward(self, x: Tensor, target_x: Tensor, weight: Tensor, target_weight: Tensor) -> Tensor:
        return fused_kl_div_loss(
            x, target_x, weight, target_weight, self.reduction, self.accumulate
        )
