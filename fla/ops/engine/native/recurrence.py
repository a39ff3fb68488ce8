# SPDX-License-Identifier: MIT
"""The native kernels of the recurrence as torch operators, so that `torch.compile` sees through."""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack_into
from typing import Any

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import boundaries_to_list, count_sequences
from fla.core.operator import empty_gradients
from fla.ops.engine.native import library
from fla.ops.engine.native.library import BLOCK, PANEL, TYPES, Problem, readable, view
from fla.ops.engine.recurrence.operators import SWITCHES, TERMS, chunk_schema, define_tokens
from fla.ops.engine.recurrence.terms import Point, Switches, Terms

NO_DECAY, SCALAR, VECTOR = range(3)
NO_ERASE, DELTA, LOW_RANK = range(3)
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
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final, _ = torch.ops.fla.native_chunk(
        *inputs, cu_seqlens, float(switches.scale), switches.l2norm, switches.read_before, save
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
    q, k, v, g, _, gv, beta, a, b = terms.merged()
    scale, l2norm, read_before, *_ = switches
    arguments = (
        q, k, v, g, beta, gv, a, b, initial_state, cu_seqlens, float(scale), l2norm, read_before
    )  # fmt: skip
    if type(q) is Tensor and not torch.compiler.is_compiling():
        # dispatching an operator costs as much as the step
        return _token_form(*arguments, overwrite=overwrite)
    if overwrite and initial_state is not None:
        return torch.ops.fla.native_tokens_(*arguments), initial_state
    return torch.ops.fla.native_tokens(*arguments)


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


def _template(tensors: list[Any], sequences: int, options: tuple[float, bool, bool]) -> Problem:
    q, _, v, g, beta, _, a, _ = tensors
    _, T, H, K = q.shape
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return Problem(
        **{name: view(x) for name, x in zip(TERMS, tensors, strict=True)}, o=view(o),
        N=sequences, T=T, H=H, HV=v.shape[2], K=K, V=v.shape[3], scale=options[0],
        decay=NO_DECAY if g is None else SCALAR if g.dim() == 3 else VECTOR,
        erase=LOW_RANK if a is not None else NO_ERASE if beta is None else DELTA,
        l2norm=options[1], read_before=options[2],
    )  # fmt: skip


def _problem(
    tensors: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    sequences: int,
    options: tuple[float, bool, bool],
) -> tuple[Problem, list[Any]]:
    """The problem, with room for an o like v but contiguous, and what must live as long as it."""
    alive: list[Any] = [x if x is None or x.dtype in TYPES else x.float() for x in tensors]
    kinds = [x if x is None else (x.shape, x.stride(), x.dtype) for x in alive]
    key = (*kinds, sequences, options)
    template = _templates.get(key)
    if template is None:
        template = _template(alive, sequences, options)
        if len(_templates) < TEMPLATES:
            _templates[key] = template
    p = Problem.from_buffer_copy(template)
    for offset, x in zip(OFFSETS, alive, strict=True):
        if x is not None:
            pack_into("P", p, offset, x.data_ptr())
    if cu_seqlens is not None:
        boundaries_to_list(cu_seqlens, alive[0].shape[1], "native")
        bounds = cu_seqlens.to(torch.int64).contiguous()
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


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, gv: Tensor | None,
    a: Tensor | None, b: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, l2norm: bool, read_before: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the final state, and where `save` the first state of every block of tokens."""
    tensors, options = (q, k, v, g, beta, gv, a, b), (scale, l2norm, read_before)
    o, final, states = _empty_outputs(*tensors, initial_state, cu_seqlens, *options, save)
    p, alive = _problem(tensors, cu_seqlens, len(final), options)
    _state(initial_state, p, "initial", alive)
    p.o, p.final_state = view(o), final.data_ptr()
    p.states = states.data_ptr() if save else None
    library.call("fla_forward", p)
    return o, final, states


def _empty_outputs(
    q, k, v, g, beta, gv, a, b, initial_state, cu_seqlens, scale, l2norm, read_before, save
):
    sequences, T = count_sequences(q, cu_seqlens), q.shape[1]
    o = q.new_empty(v.shape)
    final = q.new_empty((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    blocks = sequences * -(-T // BLOCK) if cu_seqlens is None else T // BLOCK + sequences
    shape = (blocks, v.shape[2], -(-v.shape[3] // PANEL), q.shape[3], PANEL)
    return o, final, final.new_empty(shape if save else (0,))


def _backward(
    do: Tensor, dfinal: Tensor | None, states: Tensor, q: Tensor, k: Tensor, v: Tensor,
    g: Tensor | None, beta: Tensor | None, gv: Tensor | None, a: Tensor | None, b: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, l2norm: bool, read_before: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, g, beta, gv, a, b (empty if absent) and of the initial state."""
    tensors, options = (q, k, v, g, beta, gv, a, b), (scale, l2norm, read_before)
    grads = empty_gradients(tensors)
    shape = (count_sequences(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    dstate = q.new_empty(shape, dtype=torch.float32)
    p, alive = _problem(tensors, cu_seqlens, len(dstate), options)
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    gv: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    read_before: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """o and the final state: a new tensor, or `initial_state` itself, overwritten."""
    N = count_sequences(q, cu_seqlens)
    final = initial_state if overwrite else None
    if final is None:
        final = torch.empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    p, alive = _problem((q, k, v, g, beta, gv, a, b), cu_seqlens, N, (scale, l2norm, read_before))
    o = torch.empty_like(alive[2], memory_format=torch.contiguous_format)
    _state(initial_state, p, "initial", alive)
    p.o.data, p.final_state = o.data_ptr(), final.data_ptr()
    library.call("fla_token", p)
    return o if o.dtype == q.dtype else o.to(q.dtype), final


define_tokens("native_tokens", _token_form, "cpu")
