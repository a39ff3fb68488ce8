# SPDX-License-Identifier: MIT
"""Linear maps with ternary weights and 8-bit activations; Ma et al. (2024), *The Era of 1-bit
LLMs*, arXiv:2402.17764.

    W~ = round(W / s) s  in {-1, 0, 1} s,  s = mean|W|
    x~ = round(127 x / m) m / 127,  m = max|x|
    y = W~ x~(norm(x)) + c

Both roundings pass gradients through unchanged.
"""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.modules.layernorm import RMSNorm


@checked
def activation_quant(x: Tensor) -> Tensor:
    """x rounded to 8 bits per token.

    Example:
        >>> activation_quant(torch.tensor([127.0, 3.4])).tolist()
        [127.0, 3.0]
    """
    scale = 127.0 / x.abs().amax(-1, keepdim=True).clamp_min(1e-5)
    return (x * scale).round().clamp(-128, 127) / scale


@checked
def weight_quant(w: Tensor) -> Tensor:
    """w rounded to -1, 0 or 1 times its mean magnitude.

    Example:
        >>> weight_quant(torch.tensor([1.0, -2.0, 0.3, 0.7])).tolist()
        [1.0, -1.0, 0.0, 1.0]
    """
    scale = 1.0 / w.abs().mean().clamp_min(1e-5)
    return (w * scale).round().clamp(-1, 1) / scale


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded value with the gradient of x."""
    return x + (rounded - x).detach()


@checked
def bit_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """The module's equation, with an RMSNorm before it."""
    width = x.shape[-1:]
    y = F.rms_norm(x, width, norm_weight, eps)
    y = y if norm_bias is None else y + norm_bias
    return _quantised(y, weight, bias)


def _quantised(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(_through(y, activation_quant(y)), _through(weight, weight_quant(weight)), bias)


class BitLinear(nn.Linear):
    """`bit_linear` with its weight `[out, in]` and its norm.

    Example:
        >>> BitLinear(8, 4)(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    @checked
    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, norm_eps: float = 1e-8
    ):
        super().__init__(in_features, out_features, bias)
        self.norm = RMSNorm(in_features, eps=norm_eps)

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return _quantised(self.norm(x), self.weight, self.bias)


class FusedBitLinear(BitLinear):
    """`BitLinear` under the name of its fused kernel."""

    @checked
    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
