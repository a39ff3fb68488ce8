# SPDX-License-Identifier: MIT
"""L2Wrap: keeps the largest logits small; Peng et al. (2023), arXiv:2305.13048."""

import torch
from torch import Tensor

from fla._arguments import checked


class _L2Wrap(torch.autograd.Function):
    @staticmethod
    def forward(loss: Tensor, logits: Tensor, factor: float) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, logits, factor = inputs
        largest, where = logits.max(-1, keepdim=True)
        ctx.save_for_backward(largest * (factor / max(1, logits.shape[:-1].numel())), where)
        ctx.shape = logits.shape

    @staticmethod
    def backward(ctx, grad: Tensor):
        push, where = ctx.saved_tensors
        return grad, push.new_zeros(ctx.shape).scatter_(-1, where, push) * grad, None


L2_FACTOR = 1e-4


@checked
def l2_warp(loss: Tensor, logits: Tensor, l2_penalty_factor: float = L2_FACTOR) -> Tensor:
    """loss, with `factor * max(z) / M` added to the gradient of the largest logit z of each of the
    M rows of `logits` `[..., vocab]`.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> l2_warp(z.sum(), z, 0.5).backward()
        >>> z.grad.tolist()
        [[1.0, 2.0]]
    """
    return _L2Wrap.apply(loss, logits, l2_penalty_factor)
