# SPDX-License-Identifier: MIT
"""LayerNorm (Ba et al. 2016, arXiv:1607.06450) and RMSNorm (Zhang, Sennrich 2019,
arXiv:1910.07467), with a residual.

    s = x + residual        RMSNorm: y = w * s / sqrt(mean(s^2) + eps) + b
                            LayerNorm: y = w * (s - mean(s)) / sqrt(var(s) + eps) + b

Over the last axis, in fp32 for lower dtypes. With `prenorm` the result is the pair (y, s). The
`*_linear` forms are `linear(y)` in the dtype of the linear weight `[out, hidden_size]`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked, shaped
from fla._lazy import lazy_names
from fla.core.precision import promote_to_fp32
from fla.core.stage import Form, Stage, not_compiled, tokenwise
from fla.ops.engine.native import library
from fla.ops.engine.native import rows as native

# loads torch's DTensor, which takes a second
__getattr__, _names = lazy_names(__name__, {"fla.modules.parallel": ["NormParallel"]})


@shaped(x="... D", weight="D", bias="D", residual="... D")
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


@shaped(x="... D", weight="D", bias="D", residual="... D")
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

    @checked
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

    @checked
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


@shaped(x="... D", weight="D", bias="D", residual="... D")
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

    @checked
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

    @checked
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


Normed = Tensor | tuple[Tensor, Tensor]


@checked
def project(normed: Normed, weight: Tensor, bias: Tensor | None) -> Normed:
    """`linear(y)` of y or of (y, s)."""
    y, *rest = (normed,) if isinstance(normed, Tensor) else normed
    if y.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"norm and linear: linear_weight has shape {list(weight.shape)}; expected "
            f"[out, {y.shape[-1]}], as x has {y.shape[-1]} channels"
        )
    out = F.linear(y.to(weight.dtype), weight, bias)
    return (out, rest[0]) if rest else out


@checked
def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Normed:
    """`linear(norm(x + residual))`, normed over each of `num_groups` parts of the last axis.

    Example:
        >>> x, weight = torch.randn(2, 3, 8), torch.randn(4, 8)
        >>> layer_norm_linear(x, torch.ones(8), None, weight, None).shape
        torch.Size([2, 3, 4])
    """
    options = (residual, eps, prenorm, residual_in_fp32, is_rms_norm)
    if num_groups == 1:
        normed = layer_norm(x, norm_weight, norm_bias, *options)
    else:
        normed = group_norm(x, norm_weight, norm_bias, *options, num_groups)
    return project(normed, linear_weight, linear_bias)


@checked
def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Normed:
    """`linear(rms_norm(x + residual))`.

    Example:
        >>> x, weight = torch.randn(2, 3, 8), torch.randn(4, 8)
        >>> rms_norm_linear(x, None, None, weight, None).shape
        torch.Size([2, 3, 4])
    """
    normed = rms_norm(x, norm_weight, norm_bias, residual, eps, prenorm, residual_in_fp32)
    return project(normed, linear_weight, linear_bias)


group_norm_linear = layer_norm_linear  # the published name of the form with groups


class _ThenLinear(nn.Module):
    """Before a norm in a class's bases: the norm, then a linear layer that is given."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Normed:
        normed = super().forward(x, residual, prenorm, residual_in_fp32)
        return project(normed, weight, bias)


class LayerNormLinear(_ThenLinear, LayerNorm):  # type: ignore[misc]  # forward takes more
    """`LayerNorm`, then a linear layer that is given: forward takes its weight `[out,
    hidden_size]` and its bias.

    Example:
        >>> LayerNormLinear(8)(torch.randn(2, 3, 8), torch.randn(4, 8)).shape
        torch.Size([2, 3, 4])
    """


class RMSNormLinear(LayerNormLinear):
    """`RMSNorm`, then a linear layer that is given, as in `LayerNormLinear`.

    Example:
        >>> RMSNormLinear(8)(torch.randn(2, 3, 8), torch.randn(4, 8)).shape
        torch.Size([2, 3, 4])
    """

    is_rms_norm = True


class GroupNormLinear(_ThenLinear, GroupNorm):  # type: ignore[misc]  # as above
    """`GroupNorm`, then a linear layer that is given, as in `LayerNormLinear`.

    Example:
        >>> GroupNormLinear(2, 8)(torch.randn(2, 3, 8), torch.randn(4, 8)).shape
        torch.Size([2, 3, 4])
    """


@checked
def group_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    is_rms_norm: bool = False,
    prenorm: bool = False,
    upcast: bool = False,
) -> Normed:
    """`group_norm` term by term in plain torch, in the dtype of x, or in fp32 with `upcast`.

    Example:
        >>> group_norm_ref(torch.tensor([3.0, 4.0, 1.0, 1.0]), None, None, 2, is_rms_norm=True)[2:]
        tensor([1.0000, 1.0000])
    """
    if x.shape[-1] % num_groups:
        raise ValueError(
            f"group_norm_ref: num_groups is {num_groups}, which does not divide the "
            f"{x.shape[-1]} channels of x; pass a divisor"
        )
    total = x if residual is None else x + residual
    total = promote_to_fp32(total) if upcast else total.to(x.dtype)
    parts = total.unflatten(-1, (num_groups, -1))
    if not is_rms_norm:
        parts = parts - parts.mean(-1, keepdim=True)
    y = (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    y = y if weight is None else y * weight
    y = (y if bias is None else y + bias).to(x.dtype)
    return (y, total) if prenorm else y


@checked
def layer_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    upcast: bool = False,
) -> Normed:
    """`layer_norm` as `group_norm_ref` has it."""
    return group_norm_ref(x, weight, bias, 1, residual, eps, False, prenorm, upcast)


@checked
def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    upcast: bool = False,
) -> Normed:
    """`rms_norm` as `group_norm_ref` has it."""
    return group_norm_ref(x, weight, bias, 1, residual, eps, True, prenorm, upcast)


class GroupNormRef(GroupNorm):
    """`GroupNorm` as `group_norm_ref` has it, in fp32 for lower dtypes.

    Example:
        >>> x = torch.randn(2, 3, 8)
        >>> torch.allclose(GroupNormRef(2, 8)(x), GroupNorm(2, 8)(x), atol=1e-6)
        True
    """

    @checked
    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Normed:
        options = (self.num_groups, residual, self.eps, self.is_rms_norm, True, True)
        y, total = group_norm_ref(x, self.weight, self.bias, *options)
        total = total if residual_in_fp32 else total.to(x.dtype)
        return (y, total) if prenorm else y
