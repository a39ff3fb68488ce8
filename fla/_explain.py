# SPDX-License-Identifier: MIT
"""`fla.explain`: which form of every stage ran a call, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from fla.core.precision import compute_dtype
from fla.core.stage import Decision, watch


@dataclass(frozen=True)
class Explanation:
    """The forms that ran a call, stage by stage; `backend`, `form`, `why` and `rejected` are those
    of the first stage.
    """

    op: str
    dtype: torch.dtype
    decisions: tuple[Decision, ...]

    @property
    def backend(self) -> str:
        return self.decisions[0].backend

    @property
    def form(self) -> str:
        return self.decisions[0].form

    @property
    def why(self) -> str:
        return self.decisions[0].why

    @property
    def rejected(self) -> dict[str, str]:
        return dict(self.decisions[0].rejected)

    def __str__(self) -> str:
        facts = self.decisions[0].facts
        dtypes = (self.dtype, compute_dtype(self.dtype))
        given, compute = (str(x).removeprefix("torch.") for x in dtypes)
        first = f"{self.op} on {facts.device}, {given} in, computed in {compute}"
        return "\n".join([first, *map(str, self.decisions)])


def explain(op: Callable[..., Any], *args: object, **kwargs: object) -> Explanation:
    """Which forms run `op(*args, **kwargs)`, on what, and why. It runs the call once and tells what
    each stage chose; `op` may be an operator, a module, a layer or a model.

    Example:
        >>> from fla.ops import chunk_linear_attn
        >>> x = torch.zeros(1, 4, 2, 8)
        >>> explain(chunk_linear_attn, x, x, x, backend="torch").backend
        'torch'
    """
    name = getattr(op, "__name__", type(op).__name__)
    with watch() as seen:
        op(*args, **kwargs)
    if not seen:
        raise ValueError(
            f"explain: {name} ran no stage of fla; pass an operator such as "
            "fla.ops.chunk_gated_delta_rule, a layer or a model"
        )
    floats = (x.dtype for x in (*args, *kwargs.values()) if _is_float(x))
    return Explanation(name, next(floats, seen[0].facts.dtype), tuple(seen))


def _is_float(x: object) -> TypeGuard[torch.Tensor]:
    return isinstance(x, torch.Tensor) and x.is_floating_point()
