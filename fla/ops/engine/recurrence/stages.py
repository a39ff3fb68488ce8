# SPDX-License-Identifier: MIT
"""The stages of the recurrence: which forms compute it, and within what limits."""

from typing import Any

import torch
from torch import Tensor

from fla.core.stage import Form, Stage
from fla.ops.engine.kernels import operators as triton
from fla.ops.engine.kernels import support
from fla.ops.engine.native import library
from fla.ops.engine.native import recurrence as native
from fla.ops.engine.recurrence import sharded
from fla.ops.engine.recurrence.chunk import chunk
from fla.ops.engine.recurrence.columns import chunk_columns
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Point, Switches, Terms, point
from fla.ops.engine.recurrence.token import SEGMENT, recurrent

TOKENS, HEADS = 70, 2  # in the self-check's problem: more tokens than a chunk
BY_HAND = "backward by hand"


def problem(kind: Point) -> tuple[Any, ...]:
    """A small call at a point of the family."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, TOKENS, *shape, generator=generator)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    given, K, V = kind.erase.split(), kind.K, kind.V
    H = HEADS if kind.columns else 1  # torch's form of columns takes no groups
    x = dict(q=normal(H, K), k=unit(H, K), v=normal(HEADS, V))
    if "b" in given:
        x["b"] = unit(HEADS, K)
    if "a" in given:
        x["a"] = -0.5 * x["b"]
    x = {n: y.to(kind.dtype) for n, y in x.items()}
    if "beta" in given:
        x["beta"] = normal(HEADS, *([V] if kind.rates else [])).sigmoid()
    if kind.decay != "none":
        x["g"] = -normal(HEADS, *([K] if kind.decay == "vector" else [])).abs()
    if kind.columns:
        x["gv"] = -normal(HEADS, V).abs()
    terms = Terms(**{n: y.to(kind.device) for n, y in x.items()})
    return terms, Switches(K**-0.5, read_before=kind.read_before), None, None


def _stage(
    name: str, forms: dict[str, Form], columns: bool = False, differentiable: bool = True
) -> Stage:
    decay, erase = ("none", "none") if columns else ("scalar", "beta")

    def example(device: torch.device, dtype: torch.dtype) -> Point:
        return Point(device, dtype, decay, erase, columns, False, False, 64, 64)

    return Stage(
        name, forms, point, sharded.recurrence, problem, example, Point.rounded, differentiable
    )


_CHUNK_IN_CPP = library.in_cpp(f"chunks of 16 tokens in {{}}; {BY_HAND}")
_CHUNK_IN_TRITON = f"chunks of 64 tokens in Triton; {BY_HAND}"
_CHUNK_IN_TORCH = f"chunk form, chunk_size tokens per chunk (default {CHUNK_SIZE}); {BY_HAND}"
_TRITON: Any = dict(limits=(support.runs, triton.few_keys), checked=support.checked)

CHUNK = _stage(
    "recurrence.chunk",
    {
        "triton": Form(triton.chunk, _CHUNK_IN_TRITON, **_TRITON),
        "native": Form(native.chunk, _CHUNK_IN_CPP, (library.runs,)),
        "torch": Form(chunk, _CHUNK_IN_TORCH),
    },
)
# a decay of value channels
COLUMNS = _stage(
    "recurrence.columns",
    {
        "native": Form(native.chunk, _CHUNK_IN_CPP, (library.runs,)),
        "torch": Form(chunk_columns, _CHUNK_IN_TORCH),
    },
    columns=True,
)
# token by token, where no gradient is wanted
TOKEN = _stage(
    "recurrence.token",
    {
        "triton": Form(triton.recurrent, "token by token in Triton", **_TRITON),
        "native": Form(native.recurrent, library.in_cpp("token by token in {}"), (library.runs,)),
        "torch": Form(recurrent, "token form in torch"),
    },
    differentiable=False,
)
# the same with gradients, for which kernels have the chunk form alone
TRAINED_TOKEN = _stage(
    "recurrence.token with gradients",
    {
        "triton": Form(
            triton.chunk, _CHUNK_IN_TRITON, (support.runs, triton.few_keys, triton.trained),
            support.checked,
        ),
        "native": Form(native.chunk, _CHUNK_IN_CPP, (library.runs, native.trained_columns)),
        "torch": Form(
            recurrent, f"token form in torch, recomputed in segments of {SEGMENT} tokens"
        ),
    },
)  # fmt: skip
