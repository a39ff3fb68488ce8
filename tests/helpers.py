# SPDX-License-Identifier: MIT
"""Comparisons shared by all suites: exact to fp64 rounding, or within a budget derived from
fp64."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor


def matrix(cases: Iterable[tuple], short: Callable[..., Any]) -> list:
    """Cases of a test that takes seconds each: of Triton kernels in the interpreter, of what Dynamo traces. `make
    test` runs those that `short(*case)` is true of and `make test-kernels` the others; with a GPU all of them run.
    """
    rest = () if torch.cuda.is_available() else pytest.mark.full_matrix
    return [pytest.param(*case, marks=() if short(*case) else rest) for case in cases]


def error(x: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    if x.numel() == 0:
        return 0.0
    difference = (x.double() - reference.double()).abs().max().item()
    return difference if difference == difference else float("inf")


def relative_error(x: Tensor, reference: Tensor) -> float:
    """Largest absolute difference in units of the largest reference; NaN counts as infinite."""
    size = reference.abs().max().item() if reference.numel() else 0.0
    return error(x, reference) / (size or 1.0)


def assert_same(x: Tensor, reference: Tensor, what: str, rtol: float = 1e-11) -> None:
    """Equal in fp64 up to the rounding of a few hundred operations."""
    assert x.shape == reference.shape, f"{what}: {list(x.shape)} instead of {list(reference.shape)}"
    if x.numel() == 0:
        return
    bound = rtol * max(1.0, reference.abs().max().item())
    assert error(x, reference) <= bound, f"{what}: off by {error(x, reference):.2e} > {bound:.2e}"


def assert_within_budget(
    x: Tensor, plain: Tensor, exact: Tensor, what: str, units: int = 1
) -> None:
    """`err(x) <= 2 err(plain torch in that dtype) + units eps max|exact|`, both errors against fp64."""
    budget = 2 * error(plain, exact) + units * torch.finfo(x.dtype).eps * exact.abs().max().item()
    assert error(x, exact) <= budget, (
        f"{what}: error {error(x, exact):.2e} over its budget {budget:.2e}"
    )


def gradients(outputs: list[Tensor], inputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of all outputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs
    ]
    total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    return dict(zip(inputs, grads, strict=True))
