# SPDX-License-Identifier: MIT
"""RMSNorm with an output gate: `y = rms_norm(x + residual) * act(g)`, computed in fp32 for lower
dtypes. Autograd keeps x + residual and g alone. The same with LayerNorm, in plain torch, and
either of them before a linear layer that is given.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked, shaped
from fla.core.operator import transformed
from fla.core.precision import promote_to_fp32
from fla.core.stage import Form, Stage, not_compiled, tokenwise
from fla.modules.layernorm import LayerNorm, Normed, RMSNorm, layer_norm, project, rms_norm
from fla.ops.engine.kernels import support
from fla.ops.engine.kernels.tensors import on_device
from fla.ops.engine.native import library
from fla.ops.engine.native import rows as native

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


WIDEST = 16384  # channels a program of the kernels holds


class _Torch(torch.autograd.Function):
    """Keeps x, g and the inverse norms, where plain autograd keeps five tensors of their size."""

    @staticmethod
    def forward(ctx: Any, x, g, weight, bias, activation: str, eps: float) -> Tensor:
        row = promote_to_fp32(x)
        inverse = torch.rsqrt(row.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, g, weight, bias, inverse)
        ctx.activation = activation
        return _affine(row * inverse, weight, bias).mul_(
            ACTIVATIONS[activation](promote_to_fp32(g))
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, g, weight, bias, inverse = ctx.saved_tensors
        unit, gate = promote_to_fp32(x) * inverse, promote_to_fp32(g)
        sigmoid = gate.sigmoid()
        if ctx.activation == "sigmoid":
            value, slope = sigmoid, sigmoid * (1 - sigmoid)
        else:
            value = gate * sigmoid
            slope = torch.addcmul(sigmoid + value, value, sigmoid, value=-1)
        dg = slope.mul_(_affine(unit, weight, bias)).mul_(dy)
        dn = value * dy
        dweight = None if weight is None else (dn * unit).flatten(0, -2).sum(0).to(weight.dtype)
        dbias = None if bias is None else dn.flatten(0, -2).sum(0).to(bias.dtype)
        dn = dn if weight is None else dn.mul_(weight)
        dx = dn.addcmul_(unit, (dn * unit).mean(-1, keepdim=True), value=-1).mul_(inverse)
        return dx.to(x.dtype), dg.to(g.dtype), dweight, dbias, None, None


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A new tensor."""
    y = x.clone() if weight is None else x * weight
    return y if bias is None else y.add_(bias)


def _in_triton(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, eps: float
) -> Tensor:
    return _Triton.apply(x, g, weight, bias, activation, eps)


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, g, weight, bias, activation: str, eps: float) -> Tensor:
        from fla.modules.kernels import gated_norm

        ctx.shape, ctx.switches = x.shape, (activation == "sigmoid", eps)
        x, g = (y.reshape(-1, y.shape[-1]).contiguous() for y in (x, g))
        ctx.save_for_backward(x, g, weight, bias)
        with on_device(x.device):
            return gated_norm.forward(x, g, weight, bias, *ctx.switches).view(ctx.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor):
        from fla.modules.kernels import gated_norm

        x, g, weight, bias = ctx.saved_tensors
        with on_device(dy.device):
            grads = gated_norm.backward(dy.reshape(x.shape), x, g, weight, bias, *ctx.switches)
        dx, dg, *others = grads
        return dx.view(ctx.shape), dg.view(ctx.shape), *others, None, None


def _plain(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, eps: float
) -> Tensor:
    y: Tensor = rms_norm(promote_to_fp32(x), weight, bias, eps=eps)  # type: ignore[assignment]
    return y * ACTIVATIONS[activation](promote_to_fp32(g))


def _torch(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, eps: float
) -> Tensor:
    # a compiled graph keeps no more of the plain form than _Torch does
    form = _plain if torch.compiler.is_compiling() or transformed() else _Torch.apply
    return form(x, g, weight, bias, activation, eps)


class GatedFacts(NamedTuple):
    """D is the number of channels; `misfit` is why the native kernels cannot read the rows."""

    device: torch.device
    dtype: torch.dtype
    D: int
    activation: str
    misfit: str | None


def _facts(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, eps: float
) -> GatedFacts:
    misfit = native.misfit(x, g, weight, bias)
    return GatedFacts(x.device, x.dtype, x.shape[-1], activation, misfit)


def _narrow(facts: GatedFacts) -> str | None:
    return f"a program holds at most {WIDEST} channels" if facts.D > WIDEST else None


def _problem(facts: GatedFacts) -> tuple[Any, ...]:
    rows = torch.randn(2, 70, facts.D, generator=torch.Generator().manual_seed(0))
    x, g = rows.to(facts.device, facts.dtype)
    return x, g, x[0], None, facts.activation, 1e-6


RMS_NORM_GATED = Stage(
    "rms_norm_gated",
    {
        "triton": Form(
            _in_triton,
            "one pass over the rows in Triton; backward by hand",
            (not_compiled, support.runs, _narrow),
            support.checked,
        ),
        "native": Form(
            native.rows,
            library.in_cpp("a pass over the rows in {}; backward by hand"),
            (not_compiled, library.runs, lambda facts: facts.misfit),
        ),
        "torch": Form(_torch, "in fp32; backward by hand"),
    },
    _facts,
    tokenwise,
    _problem,
    lambda device, dtype: GatedFacts(device, dtype, 128, "swish", None),
    lambda facts: facts._replace(misfit=None),
)


@checked
def check_activation(op: str, activation: str) -> None:
    """Raise `ValueError` for an activation that gates do not have."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )


def _sum(x: Tensor, residual: Tensor | None, in_fp32: bool) -> Tensor:
    """x + residual; x itself where there is nothing to add."""
    if residual is None:
        return promote_to_fp32(x) if in_fp32 else x
    return promote_to_fp32(x) + residual


@shaped(x="... D", g="<... D", weight="<... D", bias="<... D", residual="... D")
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
    check_activation("rms_norm_gated", activation)
    total = _sum(x, residual, residual_in_fp32)
    y = RMS_NORM_GATED("rms_norm_gated", None, total, g, weight, bias, activation, eps)
    y = y.to(x.dtype)
    return (y, total if residual_in_fp32 else total.to(x.dtype)) if prenorm else y


class FusedRMSNormGated(RMSNorm):
    """`rms_norm(x) * activation(g)` over the last axis, `[..., hidden_size]`; activation is swish,
    silu or sigmoid.

    Example:
        >>> x, g = torch.randn(2, 2, 3, 8)
        >>> FusedRMSNormGated(8)(x, g).shape
        torch.Size([2, 3, 8])
    """

    @checked
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
        check_activation(type(self).__name__, activation)
        self.activation = activation

    @checked
    def forward(  # type: ignore[override]  # the gate comes second
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

    @checked
    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, eps, "swish", device, dtype)


@shaped(x="... D", g="<... D", weight="<... D", bias="<... D", residual="... D")
def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normed:
    """`layer_norm(x + residual) * activation(g)`; with `prenorm` the pair (y, x + residual).

    Example:
        >>> x, g = torch.randn(2, 2, 3, 8)
        >>> layer_norm_gated(x, g, torch.ones(8), None, "sigmoid").shape
        torch.Size([2, 3, 8])
    """
    check_activation("layer_norm_gated", activation)
    total = _sum(x, residual, residual_in_fp32)
    y: Any = layer_norm(promote_to_fp32(total), weight, bias, eps=eps)
    y = (y * ACTIVATIONS[activation](promote_to_fp32(g))).to(x.dtype)
    return (y, total if residual_in_fp32 else total.to(x.dtype)) if prenorm else y


@checked
def layer_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normed:
    """`linear(layer_norm(x + residual) * swish(g))`.

    Example:
        >>> x, g = torch.randn(2, 2, 3, 8)
        >>> layer_norm_swish_gate_linear(x, g, None, None, torch.randn(4, 8), None).shape
        torch.Size([2, 3, 4])
    """
    options = ("swish", residual, prenorm, residual_in_fp32, eps)
    normed = layer_norm_gated(x, g, norm_weight, norm_bias, *options)
    return project(normed, linear_weight, linear_bias)


@checked
def rms_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normed:
    """`linear(rms_norm(x + residual) * swish(g))`, as `layer_norm_swish_gate_linear`.

    Example:
        >>> x, g = torch.randn(2, 2, 3, 8)
        >>> rms_norm_swish_gate_linear(x, g, None, None, torch.randn(4, 8), None).shape
        torch.Size([2, 3, 4])
    """
    options = ("swish", residual, prenorm, residual_in_fp32, eps)
    normed = rms_norm_gated(x, g, norm_weight, norm_bias, *options)
    return project(normed, linear_weight, linear_bias)


class FusedLayerNormGated(LayerNorm):
    """`layer_norm(x) * activation(g)` over the last axis, `[..., hidden_size]`; activation is
    swish, silu or sigmoid.

    Example:
        >>> x, g = torch.randn(2, 2, 3, 8)
        >>> FusedLayerNormGated(8, bias=True)(x, g).shape
        torch.Size([2, 3, 8])
    """

    @checked
    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        activation: str = "swish",
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, bias, eps, device, dtype)
        check_activation(type(self).__name__, activation)
        self.activation = activation

    @checked
    def forward(  # type: ignore[override]  # the gate comes second
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Normed:
        options = (self.activation, residual, prenorm, residual_in_fp32, self.eps)
        return layer_norm_gated(x, g, self.weight, self.bias, *options)


class FusedLayerNormSwishGate(FusedLayerNormGated):
    """`FusedLayerNormGated` with the swish activation, under its older name."""

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
        super().__init__(hidden_size, elementwise_affine, bias, "swish", eps, device, dtype)


class _GatedLinear(LayerNorm):
    """A norm without a bias, a swish gate, and a linear layer that is given."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, False, eps, device, dtype)

    def forward(  # type: ignore[override]  # the gate and the linear layer come second and third
        self,
        x: Tensor,
        g: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Normed:
        form = rms_norm_swish_gate_linear if self.is_rms_norm else layer_norm_swish_gate_linear
        options = (residual, prenorm, residual_in_fp32, self.eps)
        return form(x, g, self.weight, self.bias, weight, bias, *options)


class FusedLayerNormGatedLinear(_GatedLinear):
    """`layer_norm_swish_gate_linear` with the norm's weight; forward takes the linear layer's.

    Example:
        >>> x, g = torch.randn(2, 2, 3, 8)
        >>> FusedLayerNormGatedLinear(8)(x, g, torch.randn(4, 8)).shape
        torch.Size([2, 3, 4])
    """


class FusedRMSNormGatedLinear(_GatedLinear):
    """`rms_norm_swish_gate_linear` with the norm's weight; forward takes the linear layer's.

    Example:
        >>> x, g = torch.randn(2, 2, 3, 8)
        >>> FusedRMSNormGatedLinear(8)(x, g, torch.randn(4, 8)).shape
        torch.Size([2, 3, 4])
    """

    is_rms_norm = True


class FusedLayerNormSwishGateLinear(FusedLayerNormGatedLinear):
    """`FusedLayerNormGatedLinear` under its older name."""


class FusedRMSNormSwishGateLinear(FusedRMSNormGatedLinear):
    """`FusedRMSNormGatedLinear` under its older name."""
