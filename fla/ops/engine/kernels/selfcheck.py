# SPDX-License-Identifier: MIT
"""The first use of a kernel on a device is checked: compilers have given wrong gradients before, on
one architecture, for one width.

Once per device, dtype, member of the family and width a small problem runs through the kernels and
through the torch form, forward and backward. Where they differ, or the kernel does not run, a
warning says so and the torch form takes its place from then on. FLA_TRITON_CHECK=0 switches the
check off, 1 switches it on in the interpreter too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla.ops.engine.recurrence.chunk import chunk

TOKENS, HEADS = 70, 2  # more than a chunk
LIMITS = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}  # of the largest value

Form = Callable[..., tuple[Tensor, Tensor]]


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    device: torch.device
    dtype: torch.dtype
    decay: str
    erase: str
    read_before: bool
    K: int
    V: int
    gradients: bool

    def __str__(self) -> str:
        way = "forward and backward" if self.gradients else "token by token"
        return (
            f"decay {self.decay}, erase {self.erase}, K={self.K}, V={self.V}, {self.dtype}, {way}, "
            f"on {self.device}"
        )


def kind_of(inputs: dict[str, Tensor | None], read_before: bool, gradients: bool) -> Kind:
    """That of a call, by the names of its tensors; widths by the powers of two that hold them."""
    q, v, g = inputs["q"], inputs["v"], inputs["g"]
    decay = "none" if g is None else "scalar" if g.dim() == 3 else "vector"
    given = [name for name in ("beta", "a", "b") if inputs[name] is not None]
    K, V = (1 << (n - 1).bit_length() for n in (q.shape[3], v.shape[3]))
    erase = " ".join(given) or "none"
    return Kind(q.device, q.dtype, decay, erase, read_before, K, V, gradients)


_found: dict[Any, bool] = {}


def trusted(kind: Any, difference: Callable[[Any], str | None], interpreted: bool) -> bool:
    """Whether the kernels of a kind, which has a device and a dtype, give what the torch form
    gives; checked once.
    """
    if os.environ.get("FLA_TRITON_CHECK", "0" if interpreted else "1") == "0":
        return True
    if torch.compiler.is_compiling() or (
        kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    ):
        return True
    if kind not in _found:
        _found[kind] = True  # the check itself comes here again
        with torch.autocast(kind.device.type, enabled=False):
            reason = difference(kind)
        if reason is not None:
            _found[kind] = False
            warnings.warn(
                f"fla: the Triton kernels for {kind} {reason}; the torch form runs in their place. "
                "Another version of Triton may mend it; FLA_TRITON_CHECK=0 runs them regardless",
                RuntimeWarning,
                stacklevel=3,
            )
    return _found[kind]


def differs(form: Form, kind: Kind) -> str | None:
    """How the kernels of the recurrence differ from the torch form on a small problem, or None."""
    inputs = _problem(kind)
    exact = {n: x.float() for n, x in inputs.items()}
    return compare(
        lambda: _results(form, inputs, kind), lambda: _results(chunk, exact, kind), kind.dtype
    )


def differs_from(
    plain: Callable[..., Any],
    kernels: Callable[..., Any],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> str | None:
    """How a function of tensors differs from that in torch, given the inputs in fp32, in its
    results and in the gradients of the inputs that have some; None where it does not.
    """

    def results(form: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        with torch.enable_grad():
            y = form(**leaves)
            outputs = y if isinstance(y, tuple) else (y,)
            moving = {n: x for n, x in leaves.items() if x.requires_grad}
            total = sum(out.float().sum() for out in outputs)
            grads = torch.autograd.grad(total, list(moving.values()))
        found = {f"result {i}": out.detach() for i, out in enumerate(outputs)}
        return found | {f"the gradient of {n}": x for n, x in zip(moving, grads, strict=True)}

    exact = {n: x.float() if x.is_floating_point() else x for n, x in inputs.items()}
    return compare(lambda: results(kernels, inputs), lambda: results(plain, exact), dtype)


def compare(
    kernels: Callable[[], dict[str, Tensor]],
    plain: Callable[[], dict[str, Tensor]],
    dtype: torch.dtype,
) -> str | None:
    """What the results of kernels are off by, of those of torch by the same names, or None."""
    try:
        got = kernels()
    except Exception as error:  # whatever a compiler or driver raises
        return f"do not run ({type(error).__name__}: {str(error).splitlines()[0]})"
    for name, x in plain().items():
        off = ((got[name].float() - x).abs().max() / x.abs().max().clamp(min=1e-3)).item()
        if not off <= LIMITS[dtype]:
            return f"are off by {off:.1e} of the largest value in {name}"
    return None


def _problem(kind: Kind) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, TOKENS, *shape, generator=generator)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    x = dict(q=normal(1, kind.K), k=unit(1, kind.K), v=normal(HEADS, kind.V))
    if "b" in kind.erase.split():
        x["b"] = unit(HEADS, kind.K)
    if "a" in kind.erase.split():
        x["a"] = -0.5 * x["b"]
    x = {n: y.to(kind.dtype) for n, y in x.items()}
    if "beta" in kind.erase.split():
        x["beta"] = normal(HEADS).sigmoid()
    if kind.decay != "none":
        x["g"] = -normal(HEADS, *([kind.K] if kind.decay == "vector" else [])).abs()
    return {n: y.to(kind.device) for n, y in x.items()}


def _results(form: Form, inputs: dict[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    with torch.set_grad_enabled(kind.gradients):
        leaves = {n: x.detach().requires_grad_(kind.gradients) for n, x in inputs.items()}
        o, final = form(**leaves, scale=kind.K**-0.5, read_before=kind.read_before)
        found = {"o": o.detach(), "the final state": final.detach()}
        if kind.gradients:
            grads = torch.autograd.grad(o.float().sum() + final.sum(), list(leaves.values()))
            found |= {f"the gradient of {n}": x for n, x in zip(leaves, grads, strict=True)}
    return found
