# SPDX-License-Identifier: MIT
"""The native kernels of the recurrence as torch operators, so that `torch.compile` sees through."""

from __future__ import annotations

from struct import pack_into
from typing import Any

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import count_sequences
from fla.core.operator import empty_gradients, needs_gradient
from fla.ops.engine.native import library
from fla.ops.engine.native.library import BLOCK, PANEL, TYPES, Problem, readable, view
from fla.ops.engine.recurrence.operators import (
    SWITCHES,
    TERMS,
    chunk_schema,
    define_tokens,
    run_tokens,
    split,
)
from fla.ops.engine.recurrence.terms import DELTA, LOW_RANK, NONE, Point, Switches, Terms

NO_DECAY, SCALAR, VECTOR = range(3)
ERASES = {NONE: 0, DELTA: 1, LOW_RANK: 2}
OFFSETS = [getattr(Problem, name).offset for name in TERMS]
TASKS = 4  # a backward pass is split into this many, if it has the value channels


def chunk(
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`recurrence.chunk.chunk` in C++, or `recurrence.columns` with gv (which comes alone), for
    dtypes below fp64 on a CPU. The state is fp32.
    """
    inputs = (*terms.named(TERMS), initial_state)
    save = needs_gradient(*inputs)
    o, final, _ = operator.call(
        "native_chunk",
        *inputs,
        cu_seqlens,
        float(switches.scale),
        switches.l2norm,
        switches.read_before,
        save,
    )
    return o, final


def recurrent(
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """`recurrence.token.recurrent` in C++, without gradients. With `overwrite` the final state is
    written over `initial_state`, contiguous fp32.
    """
    terms = terms.merged()
    if type(terms.q) is Tensor and not torch.compiler.is_compiling():
        # dispatching an operator costs as much as the step
        return _token_form(terms, switches, initial_state, cu_seqlens, overwrite)
    return run_tokens("native_tokens", terms, switches, initial_state, cu_seqlens, overwrite)


def trained_columns(point: Point) -> str | None:
    """Why the chunk form has no gradients of a call, or None."""
    if point.rates or (
        point.columns and (point.decay, point.erase, point.read_before) != ("none", "none", False)
    ):
        return (
            "there are no native kernels for gradients through a beta per value channel, or "
            "through a decay of value channels beside other gates"
        )
    return None


# Problems without their pointers, by all that they say: a decode step takes as long as making one.
_templates: dict[tuple, Problem] = {}
TEMPLATES = 1024


def _template(terms: Terms, sequences: int, switches: Switches) -> Problem:
    q, v, g = terms.q, terms.v, terms.g
    _, T, H, K = q.shape
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return Problem(
        **{name: view(getattr(terms, name)) for name in TERMS}, o=view(o),
        N=sequences, T=T, H=H, HV=v.shape[2], K=K, V=v.shape[3], scale=switches.scale,
        decay=NO_DECAY if g is None else SCALAR if g.dim() == 3 else VECTOR,
        erase=ERASES[terms.erase], l2norm=switches.l2norm, read_before=switches.read_before,
    )  # fmt: skip


def _problem(
    terms: Terms, cu_seqlens: Tensor | None, sequences: int, switches: Switches
) -> tuple[Problem, list[Any]]:
    """The problem, with room for an o like v but contiguous, and what must live as long as it."""
    alive: list[Any] = [
        x if x is None or x.dtype in TYPES else x.float() for x in terms.named(TERMS)
    ]
    kinds = [x if x is None else (x.shape, x.stride(), x.dtype) for x in alive]
    key = (*kinds, sequences, switches[:3])
    template = _templates.get(key)
    if template is None:
        template = _template(split(TERMS, alive)[0], sequences, switches)
        if len(_templates) < TEMPLATES:
            _templates[key] = template
    p = Problem.from_buffer_copy(template)
    for offset, x in zip(OFFSETS, alive, strict=True):
        if x is not None:
            pack_into("P", p, offset, x.data_ptr())
    if cu_seqlens is not None:
        bounds = library.bounds("recurrence", cu_seqlens, alive[0].shape[1])
        p.bounds = bounds.data_ptr()
        alive.append(bounds)
    return p, alive


def _state(x: Tensor | None, p: Problem, name: str, alive: list[Any]) -> None:
    """Point the problem at a state, as contiguous fp32."""
    if x is not None:
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.to(torch.float32).contiguous()
        alive.append(x)
        setattr(p, name, x.data_ptr())


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state, and where `save` the first state of every block of tokens."""
    terms, (initial_state, cu_seqlens, *switches, save) = split(TERMS, args)
    o, final, states = _empty_outputs(*args)
    p, alive = _problem(terms, cu_seqlens, len(final), Switches(*switches))
    _state(initial_state, p, "initial", alive)
    p.o, p.final_state = view(o), final.data_ptr()
    p.states = states.data_ptr() if save else None
    library.call("fla_forward", p)
    return o, final, states


def _empty_outputs(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    terms, (_, cu_seqlens, *_, save) = split(TERMS, args)
    q, v = terms.q, terms.v
    sequences, T = count_sequences(q, cu_seqlens), q.shape[1]
    o = q.new_empty(v.shape)
    final = q.new_empty(terms.state_shape(sequences), dtype=torch.float32)
    blocks = sequences * -(-T // BLOCK) if cu_seqlens is None else T // BLOCK + sequences
    shape = (blocks, v.shape[2], -(-v.shape[3] // PANEL), q.shape[3], PANEL)
    return o, final, final.new_empty(shape if save else (0,))


def _backward(do: Tensor, dfinal: Tensor | None, states: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of all terms (empty if absent) and of the initial state."""
    terms, (cu_seqlens, *switches, _save) = split(TERMS, args)
    q, v, tensors = terms.q, terms.v, args[: len(TERMS)]
    grads = empty_gradients(tensors)
    shape = terms.state_shape(count_sequences(q, cu_seqlens))
    dstate = q.new_empty(shape, dtype=torch.float32)
    p, alive = _problem(terms, cu_seqlens, len(dstate), Switches(*switches))
    _state(dfinal, p, "dfinal", alive)
    p.parts = _parts(len(dstate), q.shape[2], v.shape[3])
    targets = [
        _target(x, 1 if name in PER_VALUE_CHANNEL else p.parts)
        for name, x in zip(TERMS, grads, strict=True)
    ]
    for name, x, target in zip(TERMS, tensors, targets, strict=True):
        if x is not None:
            setattr(p, "dg" if name == "gv" else f"d{name}", view(target))
    do = readable(do)
    p.o, p.states, p.dinitial = view(do), states.data_ptr(), dstate.data_ptr()
    library.call("fla_backward", p)
    for grad, target in zip(grads, targets, strict=True):
        if target is not grad and grad.numel():
            grad.copy_(target.view(-1, *grad.shape).sum(0))
    return *grads, dstate


PER_VALUE_CHANNEL = ("v", "gv")  # whose gradients are not sums over the channels of v


def _parts(sequences: int, heads: int, V: int) -> int:
    """Parts of the value channels in a backward pass: several where there are few heads to spread
    over cores, though two parts cost 1.4 times as much as one. By shape alone, for sums whose order
    no number of threads changes.
    """
    return max(1, min(-(-V // PANEL) // 2, TASKS // max(1, sequences * heads)))


def _target(grad: Tensor, parts: int) -> Tensor:
    """The tensor that the kernels write a gradient to: `grad`, or `parts` in fp32 to be summed."""
    if parts == 1 and grad.dtype in TYPES:
        return grad
    B, *rest = grad.shape
    return torch.empty(parts * B, *rest, dtype=torch.float32)


operator.define(
    "native_chunk",
    chunk_schema(TERMS, f"{SWITCHES}, bool save", saved=1),
    forward=_forward,
    fake=_empty_outputs,
    backward=_backward,
    device_types="cpu",
)


def _token_form(
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """o and the final state: a new tensor, or `initial_state` itself, overwritten."""
    q = terms.q
    N = count_sequences(q, cu_seqlens)
    final = initial_state if overwrite else None
    if final is None:
        final = torch.empty(terms.state_shape(N), dtype=torch.float32)
    p, alive = _problem(terms, cu_seqlens, N, switches)
    o = torch.empty_like(alive[2], memory_format=torch.contiguous_format)
    _state(initial_state, p, "initial", alive)
    p.o.data, p.final_state = o.data_ptr(), final.data_ptr()
    library.call("fla_token", p)
    return o if o.dtype == q.dtype else o.to(q.dtype), final


define_tokens("native_tokens", _token_form, "cpu")
