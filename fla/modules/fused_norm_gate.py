# SPDX-License-Identifier: MIT
"""RMSNorm with an output gate: `y = rms_norm(x + residual) * act(g)`, computed in fp32 for lower
dtypes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.modules.layernorm import RMSNorm, rms_norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm(x + residual) * activation(g)`; with `prenorm` the pair (y, x + residual)."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"rms_norm_gated: activation is {activation!r}; expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    y, total = rms_norm(x.to(wide), weight, bias, residual, eps, True, residual_in_fp32)
    y = (y * ACTIVATIONS[activation](g.to(wide))).to(x.dtype)
    return (y, total if residual_in_fp32 else total.to(x.dtype)) if prenorm else y


class FusedRMSNormGated(RMSNorm):
    """`rms_norm(x) * activation(g)` over the last axis, `[..., hidden_size]`; activation is swish,
    silu or sigmoid.

    Example:
        >>> x, g = torch.randn(2, 2, 3, 8)
        >>> FusedRMSNormGated(8)(x, g).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, False, eps, device, dtype)
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"FusedRMSNormGated: activation is {activation!r}; expected one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm_gated(
            x,
            g,
            self.weight,
            self.bias,
            self.activation,
            residual,
            prenorm,
            residual_in_fp32,
            self.eps,
        )


class FusedRMSNormSwishGate(FusedRMSNormGated):
    """`FusedRMSNormGated` with the swish activation, under its older name."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, eps, "swish", device, dtype)
