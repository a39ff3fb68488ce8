# SPDX-License-Identifier: MIT
"""Activations, and gated ones whose intermediate product is recomputed rather than stored."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked, shaped
from fla.core.operator import transformed
from fla.core.precision import promote_to_fp32
from fla.core.stage import Form, Stage, not_compiled, tokenwise
from fla.ops.engine.native import library
from fla.ops.engine.native import rows as native


def _gated(activation: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """`activation(x) * y`, rounded once where they are in half precision."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return activation(x) * y
    return (activation(promote_to_fp32(x)) * promote_to_fp32(y)).to(
        torch.promote_types(x.dtype, y.dtype)
    )


def _swiglu(x: Tensor, y: Tensor) -> Tensor:
    return _gated(F.silu, x, y)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.has_bias = bias is not None
        return F.linear(_swiglu(gate, up), weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dweight = rows.mT @ _swiglu(gate, up).flatten(0, -2)
        dproduct = dy @ weight
        dgate, dup = SWIGLU_GRADIENT("swiglu_linear", None, gate, up, dproduct)
        return dgate, dup, dweight, rows.sum(0) if ctx.has_bias else None


class GateFacts(NamedTuple):
    """`misfit` is why the native kernels cannot read the rows, or None."""

    device: torch.device
    dtype: torch.dtype
    misfit: str | None


def _facts(gate: Tensor, up: Tensor, *_: Any) -> GateFacts:
    mixed = "they take one dtype" if gate.dtype != up.dtype else None
    return GateFacts(gate.device, gate.dtype, mixed or native.misfit(up, gate, None, None))


def _gradient(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid, swish = gate.sigmoid(), F.silu(gate)
    return dy * up * (sigmoid + swish * (1 - sigmoid)), dy * swish


def _native_gradient(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dup, dgate, *_ = native.backward(dy, up, gate, None, None, "silu", None)
    assert dgate is not None  # there is a gate
    return dgate, dup


def _native_swiglu(x: Tensor, y: Tensor) -> Tensor:
    return native.rows(y, x, None, None, "silu", None)


_LIMITS = (not_compiled, library.runs, lambda facts: facts.misfit)
SWIGLU_GRADIENT = Stage(
    "swiglu gradient",
    {
        "native": Form(_native_gradient, library.in_cpp("a pass over the rows in {}"), _LIMITS),
        "torch": Form(_gradient, "torch's own"),
    },
    _facts,
    tokenwise,
    example=lambda device, dtype: GateFacts(device, dtype, None),
)
SWIGLU = Stage(
    "swiglu with gradients",
    {
        "native": Form(
            _native_swiglu, library.in_cpp("a pass over the rows in {}; backward by hand"), _LIMITS
        ),
        "torch": Form(_swiglu, "torch's own"),
    },
    _facts,
    tokenwise,
    example=lambda device, dtype: GateFacts(device, dtype, None),
)


def activation(owner: str, name: str) -> Callable[[Tensor], Tensor]:
    """The function of a `hidden_act`, or `ValueError`."""
    if name not in ACT2FN:
        raise ValueError(f"{owner}: hidden_act is {name!r}; expected one of {', '.join(ACT2FN)}")
    return ACT2FN[name]


@shaped(x="... D", y="... D")
def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """`silu(x) * y`."""
    if not torch.is_grad_enabled():
        return _swiglu(x, y)  # for which torch is the fastest everywhere
    return SWIGLU("swiglu", None, x, y)


@shaped(x="... D", y="... D", weight="V D", bias="V")
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
    if transformed():
        return F.linear(_swiglu(x, y), weight, bias)
    return _SwiGLULinear.apply(x, y, weight, bias)


@shaped(x="... D", y="... D")
def sigmoidglu(x: Tensor, y: Tensor) -> Tensor:
    """`sigmoid(x) * y`."""
    return _gated(torch.sigmoid, x, y)


@shaped(x="... D", y="... D", weight="V D", bias="V")
def sigmoidglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear(sigmoid(x) * y)`."""
    return F.linear(sigmoidglu(x, y), weight, bias)


@shaped(x="... D", y="... D")
def powglu(x: Tensor, y: Tensor, power: float = 3.0) -> Tensor:
    """`x^(power / (sqrt(x) + 1)) * sigmoid(x) * y` where x > 0, elsewhere `x * sigmoid(x) * y`:
    near zero a power, for large x almost `sigmoid(x) * y`. Computed in fp32 or wider, in x's dtype.

    Example:
        >>> x = torch.tensor([2.0, -1.0])
        >>> [round(z, 4) for z in powglu(x, torch.ones(2)).tolist()]
        [2.0842, -0.2689]
    """
    wide = promote_to_fp32(x)
    positive = wide > 0
    # ones stand in for the others, whose root and logarithm would put NaN into the gradient
    base = wide.masked_fill(~positive, 1.0)
    gate = torch.where(positive, base.pow(power / (base.sqrt() + 1)), wide) * wide.sigmoid()
    return (gate * promote_to_fp32(y)).to(x.dtype)


@shaped(x="... D", y="... D", weight="V D", bias="V")
def powglu_linear(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, power: float = 3.0
) -> Tensor:
    """`linear(powglu(x, y, power))`.

    Example:
        >>> x, y = torch.randn(2, 3, 8)
        >>> powglu_linear(x, y, torch.randn(4, 8)).shape
        torch.Size([3, 4])
    """
    return F.linear(powglu(x, y, power), weight, bias)


@shaped(x="...")
def sqrelu(x: Tensor) -> Tensor:
    """`relu(x)^2`."""
    return F.relu(x).square()  # rounded once: relu is exact


@shaped(x="...")
def logsigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    """`log sigmoid(x) / temperature`."""
    return (F.logsigmoid(promote_to_fp32(x)) / temperature).to(x.dtype)


@shaped(x="...")
def fast_gelu_impl(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


@checked
def bias_gelu_impl(x: Tensor, bias: Tensor) -> Tensor:
    """`fast_gelu_impl(x + bias)`."""
    return fast_gelu_impl(x + bias)


sigmoid, swish = torch.sigmoid, F.silu

ACT2FN: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "sigmoid": sigmoid,
    "logsigmoid": logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": sqrelu,
    "gelu": fast_gelu_impl,
    "bias_gelu": bias_gelu_impl,
}
