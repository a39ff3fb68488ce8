# SPDX-License-Identifier: MIT
"""LayerNorm (Ba et al. 2016, arXiv:1607.06450) and RMSNorm (Zhang, Sennrich 2019,
arXiv:1910.07467), with a residual.

    s = x + residual        RMSNorm: y = w * s / sqrt(mean(s^2) + eps) + b
                            LayerNorm: y = w * (s - mean(s)) / sqrt(var(s) + eps) + b

Over the last axis, in fp32 for lower dtypes. With `prenorm` the result is the pair (y, s).
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.core.stage import Form, Stage, not_compiled, tokenwise
from fla.ops.engine.native import library
from fla.ops.engine.native import rows as native


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`norm(x + residual)`; see the module's equation. `residual_in_fp32` adds and returns the sum
    in fp32.
    """
    total = x
    if residual is not None:
        total = residual.float() + x if residual_in_fp32 else x + residual
    elif residual_in_fp32:
        total = x.float()
    if is_rms_norm:
        y = RMS_NORM("rms_norm", None, total, weight, bias, eps)
    else:
        wide = promote_to_fp32(total)
        weight = None if weight is None else weight.to(wide.dtype)
        bias = None if bias is None else bias.to(wide.dtype)
        y = F.layer_norm(wide, total.shape[-1:], weight, bias, eps)
    y = y.to(x.dtype)
    return (y, total) if prenorm else y


class RowFacts(NamedTuple):
    """`misfit` is why the native kernels cannot read the rows, or None."""

    device: torch.device
    dtype: torch.dtype
    misfit: str | None


def _facts(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> RowFacts:
    return RowFacts(x.device, x.dtype, native.misfit(x, None, weight, bias))


def _rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    width = x.shape[-1:]
    if bias is None and (weight is None or weight.dtype == x.dtype):
        return F.rms_norm(x, width, weight, eps)  # in fp32 itself
    wide = promote_to_fp32(x)
    y = F.rms_norm(wide, width, None if weight is None else weight.to(wide.dtype), eps)
    return y if bias is None else y + bias.to(wide.dtype)


def _native_rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return native.rows(x, None, weight, bias, None, eps)


RMS_NORM = Stage(
    "rms_norm",
    {
        "native": Form(
            _native_rms_norm,
            library.in_cpp("a pass over the rows in {}; backward by hand"),
            (not_compiled, library.runs, lambda facts: facts.misfit),
        ),
        "torch": Form(_rms_norm, "torch's own"),
    },
    _facts,
    tokenwise,
    example=lambda device, dtype: RowFacts(device, dtype, None),
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm` without the mean."""
    return layer_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, `[..., hidden_size]`.

    Example:
        >>> LayerNorm(8)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(hidden_size, **factory))
            if bias:
                self.bias = nn.Parameter(torch.zeros(hidden_size, **factory))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return layer_norm(
            x,
            self.weight,
            self.bias,
            residual,
            self.eps,
            prenorm,
            residual_in_fp32,
            self.is_rms_norm,
        )

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, affine={self.weight is not None}"


class RMSNorm(LayerNorm):
    """RMSNorm over the last axis, `[..., hidden_size]`.

    Example:
        >>> RMSNorm(8)(torch.randn(2, 3, 8)).square().mean().round().item()
        1.0
    """

    is_rms_norm = True


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm` over each of `num_groups` equal parts of the last axis."""
    if x.shape[-1] % num_groups:
        raise ValueError(
            f"group_norm: num_groups is {num_groups}, which does not divide the {x.shape[-1]} "
            "channels of x; pass a divisor"
        )
    groups = (num_groups, -1)
    parts, rest = (
        x.unflatten(-1, groups),
        None if residual is None else residual.unflatten(-1, groups),
    )
    y, total = layer_norm(parts, None, None, rest, eps, True, residual_in_fp32, is_rms_norm)
    wide = torch.promote_types(y.dtype, torch.float32)
    y = y.flatten(-2).to(wide)
    y = y if weight is None else y * weight
    y = (y if bias is None else y + bias).to(x.dtype)
    return (y, total.flatten(-2)) if prenorm else y


class GroupNorm(nn.Module):
    """`group_norm` with its parameters, on `[..., hidden_size]`.

    Example:
        >>> GroupNorm(2, 8)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        num_groups: int,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        is_rms_norm: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if hidden_size % num_groups:
            raise ValueError(
                f"GroupNorm: num_groups is {num_groups}, which does not divide "
                f"hidden_size={hidden_size}; pass a divisor"
            )
        self.num_groups, self.hidden_size = num_groups, hidden_size
        self.eps, self.is_rms_norm = eps, is_rms_norm
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(hidden_size, **factory))
            if bias:
                self.bias = nn.Parameter(torch.zeros(hidden_size, **factory))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return group_norm(
            x,
            self.weight,
            self.bias,
            residual,
            self.eps,
            prenorm,
            residual_in_fp32,
            self.is_rms_norm,
            self.num_groups,
        )
