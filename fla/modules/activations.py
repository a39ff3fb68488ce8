# SPDX-License-Identifier: MIT
"""Gated activations whose intermediate product is recomputed rather than stored."""

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.silu(gate) * up, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up, weight = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        swish = gate * sigmoid
        rows = dy.flatten(0, -2)
        dweight = rows.mT @ (swish * up).flatten(0, -2)
        dproduct = dy @ weight
        dgate = dproduct * up * (sigmoid + swish * (1 - sigmoid))
        return dgate, dproduct * swish, dweight, rows.sum(0) if ctx.has_bias else None


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """`silu(x) * y`."""
    return F.silu(x) * y


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear(silu(x) * y)`; the product is recomputed in the backward instead of stored.

    Example:
        >>> x, y = torch.randn(2, 3, 8)
        >>> swiglu_linear(x, y, torch.randn(4, 8)).shape
        torch.Size([3, 4])
    """
    if torch.is_autocast_enabled(
        x.device.type
    ):  # the cast of the weight belongs to autograd's graph
        return F.linear(swiglu(x, y), weight, bias)
    return _SwiGLULinear.apply(x, y, weight, bias)
