# SPDX-License-Identifier: MIT
"""The schemas that the operators of the recurrence share, made from the names of its terms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import count_sequences
from fla.core.operator import Schema
from fla.ops.engine.recurrence.terms import Switches, Terms

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


def split(names: tuple[str, ...], args: Sequence[Any]) -> tuple[Terms, Sequence[Any]]:
    """The terms among the arguments of an operator, and the other arguments."""
    return Terms(**dict(zip(names, args, strict=False))), args[len(names) :]


def run_tokens(
    name: str,
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """Run what `define_tokens` made."""
    scale, l2norm, read_before, *_ = switches
    rest = (initial_state, cu_seqlens, float(scale), l2norm, read_before)
    if not torch.compiler.is_compiling():
        operator.refuse_forward_mode(name, *terms, initial_state)
    if overwrite and initial_state is not None:
        over = getattr(torch.ops.fla, f"{name}_")
        return over(*terms.named(TERMS), *rest), initial_state
    return getattr(torch.ops.fla, name)(*terms.named(TERMS), *rest)


def define_tokens(name: str, form: Callable[..., Any], device_types: str | None = None) -> None:
    """Make `torch.ops.fla.<name>`, a token form without gradients that returns o and the final
    state, and `torch.ops.fla.<name>_`, which writes the final state over `state` and returns o.

    `form` takes the terms, the switches, the first state, cu_seqlens, and whether to overwrite.
    """
    kind: Any = dict(device_types=device_types)
    schema, rest = inputs(TERMS), f"Tensor? cu_seqlens, {SWITCHES}"

    def run(*args: Any, overwrite: bool) -> tuple[Tensor, Tensor]:
        terms, (state, cu_seqlens, *switches) = split(TERMS, args)
        return form(terms, Switches(*switches), state, cu_seqlens, overwrite)

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        terms, (_, cu_seqlens, *_) = split(TERMS, args)
        q, shape = terms.q, terms.state_shape(count_sequences(terms.q, cu_seqlens))
        return q.new_empty(terms.v.shape), q.new_empty(shape, dtype=torch.float32)

    op = torch.library.custom_op(
        f"fla::{name}", lambda *args: run(*args, overwrite=False), mutates_args=(),
        schema=f"({schema}, Tensor? initial_state, {rest}) -> (Tensor, Tensor)", **kind,
    )  # fmt: skip
    op.register_fake(fake)
    over = torch.library.custom_op(
        f"fla::{name}_", lambda *args: run(*args, overwrite=True)[0], mutates_args=("state",),
        schema=f"({schema}, Tensor(a!) state, {rest}) -> Tensor", **kind,
    )  # fmt: skip
    over.register_fake(lambda *args: fake(*args)[0])
