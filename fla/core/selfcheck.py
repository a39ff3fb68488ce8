# SPDX-License-Identifier: MIT
"""The first use of a kernel on a device is checked: compilers have given wrong gradients before, on
one architecture, for one width.

A small problem runs through the kernels and through the torch form in fp32, forward and backward.
FLA_TRITON_CHECK=0 switches the check off, 1 switches it on in Triton's interpreter too.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# relative to the largest value
LIMITS = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}


def difference(
    kernels: Callable[..., Any], plain: Callable[..., Any], args: tuple[Any, ...], gradients: bool
) -> str | None:
    """How the kernels differ from the torch form on a small problem, or None where they do not."""
    tensors = _tensors(plain, args)
    dtype = next(x.dtype for x in tensors.values() if x.is_floating_point())
    device = next(iter(tensors.values())).device
    exact = {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}
    with torch.autocast(device.type, enabled=False):
        try:
            got = _results(kernels, plain, args, tensors, gradients)
        except Exception as error:  # whatever a compiler or driver raises
            return f"do not run ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        want = _results(plain, plain, args, exact, gradients)
    for name, x in want.items():
        off = ((got[name].float() - x).abs().max() / x.abs().max().clamp(min=1e-3)).item()
        if not off <= LIMITS[dtype]:
            return f"are off by {off:.1e} of the largest value in {name}"
    return None


def _results(
    form: Callable[..., Any],
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    tensors: dict[str, Tensor],
    gradients: bool,
) -> dict[str, Tensor]:
    """The results of a form by name, and the gradients of all tensors that can have one."""
    leaves = {
        n: x.detach().clone().requires_grad_(gradients and x.is_floating_point())
        for n, x in tensors.items()
    }
    with torch.set_grad_enabled(gradients):
        y = form(*_with_tensors(plain, args, leaves))
        outputs = [x for x in (y if isinstance(y, tuple) else (y,)) if x.is_floating_point()]
        found = {f"result {i}": x.detach() for i, x in enumerate(outputs)}
        if gradients:
            moving = {n: x for n, x in leaves.items() if x.requires_grad}
            total = sum(out.float().sum() for out in outputs)
            grads = torch.autograd.grad(total, list(moving.values()))
            found |= {f"the gradient of {n}": x for n, x in zip(moving, grads, strict=True)}
    return found


def _names(plain: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    return list(inspect.signature(plain).parameters)[: len(args)]


def _tensors(plain: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Tensor]:
    """The tensors among the arguments, those in a record by the names of its fields."""
    found: dict[str, Tensor] = {}
    for name, x in zip(_names(plain, args), args, strict=True):
        parts = x._asdict() if hasattr(x, "_asdict") else {name: x}
        found |= {n: y for n, y in parts.items() if isinstance(y, Tensor)}
    return found


def _with_tensors(
    plain: Callable[..., Any], args: tuple[Any, ...], tensors: dict[str, Tensor]
) -> list[Any]:
    """The arguments with other tensors."""
    return [
        x._replace(**{n: tensors[n] for n in x._fields if n in tensors})
        if hasattr(x, "_replace")
        else tensors.get(name, x)
        for name, x in zip(_names(plain, args), args, strict=True)
    ]
