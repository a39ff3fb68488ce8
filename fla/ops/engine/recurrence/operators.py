# SPDX-License-Identifier: MIT
"""The schemas that the operators of the recurrence share, made from the names of its terms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fla.core.boundaries import count_sequences
from fla.core.operator import Schema

CHUNK_TERMS = ("q", "k", "v", "g", "beta", "a", "b")  # without a decay of value channels
TERMS = ("q", "k", "v", "g", "beta", "gv", "a", "b")
SWITCHES = "float scale, bool l2norm, bool read_before"


def inputs(names: tuple[str, ...]) -> str:
    """The terms of a call in a schema; q, k and v are always there."""
    return ", ".join(f"Tensor{'' if n in 'qkv' else '?'} {n}" for n in names)


def chunk_schema(names: tuple[str, ...], switches: str, saved: int, **more: bool) -> Schema:
    """The schema of a chunk form that hands `saved` tensors to its backward."""
    return Schema(
        f"{inputs(names)}, Tensor? initial_state",
        f"Tensor? cu_seqlens, {switches}",
        returns=2 + saved,
        saved=tuple(range(2, 2 + saved)),
        **more,
    )


def define_tokens(name: str, form: Callable[..., Any], device_types: str | None = None) -> None:
    """Make `torch.ops.fla.<name>`, a token form without gradients that returns o and the final
    state, and `torch.ops.fla.<name>_`, which writes the final state over `state` and returns o.

    `form` takes the terms, the first state, cu_seqlens, the switches, and whether to overwrite.
    """
    kind: Any = dict(device_types=device_types)
    terms, rest = inputs(TERMS), f"Tensor? cu_seqlens, {SWITCHES}"

    def fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        cu_seqlens = others[len(TERMS) - 2]
        shape = (count_sequences(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
        return q.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)

    op = torch.library.custom_op(
        f"fla::{name}", lambda *args: form(*args, False), mutates_args=(),
        schema=f"({terms}, Tensor? initial_state, {rest}) -> (Tensor, Tensor)", **kind,
    )  # fmt: skip
    op.register_fake(fake)
    over = torch.library.custom_op(
        f"fla::{name}_", lambda *args: form(*args, True)[0], mutates_args=("state",),
        schema=f"({terms}, Tensor(a!) state, {rest}) -> Tensor", **kind,
    )  # fmt: skip
    over.register_fake(lambda *args: fake(*args)[0])
