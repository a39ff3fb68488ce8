# SPDX-License-Identifier: MIT
"""Takes a public call of an operator to the engine: checks, defaults, layout of the state, choice
of the form.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla.core.boundaries import boundaries_to_list
from fla.core.checks import (
    check_groups,
    check_log_decay,
    check_same,
    check_sequences,
    check_shapes,
    checks_inputs,
)
from fla.core.operator import needs_gradient
from fla.core.parallel import refuse_sharded
from fla.core.precision import compute_dtype, promote_to_fp32
from fla.core.stage import Stage
from fla.ops.engine.recurrence.stages import CHUNK, COLUMNS, TOKEN, TRAINED_TOKEN
from fla.ops.engine.recurrence.terms import AXES, CHUNK_SIZE, DECAYS, Point, Switches, Terms, point

TraceHook = Callable[[str, "Options", dict[str, Tensor | None]], None]
# Called with (op, options, tensors by name) at every call, while `fla.analysis.record` looks on.
trace_hooks: list[TraceHook] = []


def call_trace_hooks(op: str, options: "Options", **tensors: Tensor | None) -> None:
    """Tell all hooks of a call, with its terms by name, `state` (the first one) and `cu_seqlens`.
    Scans do not call `recurrence`; they report themselves as one with one head per channel.
    """
    for hook in trace_hooks:
        hook(op, options, dict(tensors))


_overwriting = False


@contextmanager
def overwrite_states() -> Iterator[None]:
    """Inside the block an operator of the one recurrence writes its final state over the
    `initial_state` it was given and returns that tensor: a decode step then allocates no state, and
    a captured graph finds it where it was. The token form in kernels updates it where it lies;
    others compute it and copy it there. An operator that assembles its state from several
    tensors returns a new one.

    Raises `ValueError` where a gradient is recorded, which needs the state as it was, or where the
    given one is not in the dtype of the result (fp32; fp64 for fp64 inputs).

    Example:
        >>> from fla.ops.linear_attn import fused_recurrent_linear_attn
        >>> x, state = torch.ones(1, 1, 2, 8), torch.zeros(1, 2, 8, 8)
        >>> with overwrite_states():
        ...     final = fused_recurrent_linear_attn(
        ...         x, x, x, initial_state=state, output_final_state=True
        ...     )[1]
        >>> final is state, bool((state == 1).all())
        (True, True)
    """
    global _overwriting
    previous, _overwriting = _overwriting, True
    try:
        yield
    finally:
        _overwriting = previous


def _check_overwritten(op: str, dtype: torch.dtype, terms: Terms, state: Tensor) -> None:
    if state.dtype != dtype:
        raise ValueError(
            f"{op}: initial_state is {state.dtype}, but overwrite_states() needs it in the dtype "
            f"of the result; pass initial_state.to({dtype})"
        )
    if needs_gradient(*terms, state):
        raise ValueError(
            f"{op}: overwrite_states() while a gradient is recorded, which needs the state as it "
            "was; use torch.no_grad(), or leave overwrite_states()"
        )


class Options(NamedTuple):
    """The non-tensor arguments shared by the operators of the family."""

    scale: float | None = None
    output_final_state: bool = False
    l2norm: bool = False
    state_v_first: bool = False
    reverse: bool = False
    read_before: bool = False
    chunk_size: int = CHUNK_SIZE
    backend: str | None = None


def recurrence(
    op: str,
    options: Options,
    terms: Terms,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    names: dict[str, str] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments of the public function `op` and run its form: token by token for
    `fused_recurrent_*` (the only form with a beta per value channel), chunk by chunk for the
    others. `names` are the caller's own for arguments that go by another name there.

    Where q, k and v mix half precision and fp32, fp32 computes and o is in the dtype of v.
    """
    where = _checked_point(op, options, terms, initial_state, cu_seqlens, names or {})
    dtype = terms.v.dtype
    if not terms.q.dtype == terms.k.dtype == dtype:
        wide = {name: promote_to_fp32(getattr(terms, name)) for name in "qkv"}
        sequences = (initial_state, cu_seqlens, cu_seqlens_cpu, names)
        computed = recurrence(op, options, terms._replace(**wide), *sequences)
        return computed[0].to(dtype), computed[1]
    if trace_hooks:
        tensors = terms._asdict() | dict(state=initial_state, cu_seqlens=cu_seqlens)
        call_trace_hooks(op, options, **tensors)
    cu_seqlens = host_boundaries(op, cu_seqlens, cu_seqlens_cpu)
    if options.reverse or _overwriting:
        what = "reverse=True" if options.reverse else "overwrite_states()"
        refuse_sharded(op, f"{what} is not possible there")
    overwritten = initial_state if _overwriting and options.output_final_state else None
    if overwritten is not None:
        _check_overwritten(op, compute_dtype(terms.q.dtype), terms, overwritten)
    if options.state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    if options.reverse:
        terms = Terms._make(x if x is None else x.flip(1) for x in terms)
        cu_seqlens = None if cu_seqlens is None else terms.q.shape[1] - cu_seqlens.flip(0)
        initial_state = _flip_packed(initial_state, cu_seqlens)
    stage = _stage(op, terms, initial_state)
    call: tuple[Any, ...] = (terms, _switches(op, options, terms), initial_state, cu_seqlens)
    if overwritten is not None and stage is TOKEN:
        call = (*call, initial_state is overwritten and overwritten.is_contiguous())
    autocast = torch.is_autocast_enabled(terms.q.device.type)  # which is not for this arithmetic
    with torch.autocast(terms.q.device.type, enabled=False) if autocast else nullcontext():
        o, final = stage(op, options.backend, *call, facts=where)
    if options.reverse:
        o, final = o.flip(1), _flip_packed(final, cu_seqlens)
    if not options.output_final_state:
        return o, None
    final = final.mT.contiguous() if options.state_v_first else final
    if overwritten is None or final is overwritten:
        return o, final
    return o, overwritten.copy_(final)


def recurrence_with_states(
    op: str,
    options: Options,
    terms: Terms,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    names: dict[str, str] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`recurrence`, and the states before every chunk: `[B, NT, HV, K, V]` for the NT chunks of a
    row, or of each packed sequence in turn, in the layout and dtype of the final state. It calls
    the operator once per chunk.

    Raises `ValueError` where a gradient is recorded.
    """
    _checked_point(op, options, terms, initial_state, cu_seqlens, names or {})
    check_chunk_size(op, options.chunk_size)
    refuse_sharded(op, "return_intermediate_states has no such form")
    if needs_gradient(*terms, initial_state):
        raise ValueError(
            f"{op}: return_intermediate_states while a gradient is recorded; the states have none: "
            "use torch.no_grad()"
        )
    host_boundaries(op, cu_seqlens, cu_seqlens_cpu)
    (B, T, HV, V), K = terms.v.shape, terms.q.shape[3]
    bounds = [0, T] if cu_seqlens is None else boundaries_to_list(cu_seqlens, T, op)
    rows = B if cu_seqlens is None else 1
    if initial_state is None:
        shape = (HV, V, K) if options.state_v_first else (HV, K, V)
        zeros = terms.v.new_zeros(rows, *shape, dtype=compute_dtype(terms.v.dtype))
        starts = [zeros] * (len(bounds) - 1)
    else:
        starts = list(initial_state.split(rows))
    step, outs, states, finals = options._replace(output_final_state=True), [], [], []
    for state, (begin, end) in zip(starts, pairwise(bounds), strict=True):
        for at in range(begin, end, options.chunk_size):
            chunk = slice(at, min(at + options.chunk_size, end))
            part = Terms._make(x if x is None else x[:, chunk] for x in terms)
            states.append(state)
            o, state = recurrence(op, step, part, state, names=names)  # type: ignore[assignment]
            outs.append(o)
        finals.append(state)
    h = torch.stack(states, 1) if states else starts[0].new_empty(rows, 0, *starts[0].shape[1:])
    final = torch.cat(finals) if options.output_final_state else None
    return torch.cat(outs, 1) if outs else terms.v, final, h


def state_layout(op: str, state_v_first: bool, transposed: bool | None) -> bool:
    """`state_v_first`, or what `transpose_state_layout`, its former name, says with a warning."""
    if transposed is None:
        return state_v_first
    if state_v_first and not transposed:
        raise ValueError(
            f"{op}: state_v_first=True and transpose_state_layout=False, its former name, "
            "contradict each other; drop transpose_state_layout"
        )
    if not torch.compiler.is_compiling():  # where a warning would break the graph
        warnings.warn(
            f"{op}: transpose_state_layout is the former name of state_v_first; pass "
            f"state_v_first={transposed}",
            FutureWarning,
            stacklevel=3,
        )
    return transposed


def _stage(op: str, terms: Terms, initial_state: Tensor | None) -> Stage:
    """The stage that computes a call."""
    if not op.startswith("fused_recurrent_"):
        return CHUNK if terms.gv is None else COLUMNS
    return TRAINED_TOKEN if needs_gradient(*terms, initial_state) else TOKEN


def _switches(op: str, options: Options, terms: Terms) -> Switches:
    check_chunk_size(op, options.chunk_size)
    return Switches(
        terms.q.shape[3] ** -0.5 if options.scale is None else options.scale,
        options.l2norm,
        options.read_before,
        options.chunk_size,
        options.output_final_state,
    )


# Calls whose arguments were found right, and their points: a decode step takes as long as its
# checks.
_checked: dict[tuple, Point] = {}
CHECKED = 4096


def _checked_point(
    op: str,
    options: Options,
    terms: Terms,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    names: dict[str, str],
) -> Point:
    """The call's point in the family, after the checks of its arguments."""
    kinds = None if torch.compiler.is_compiling() else _kinds(op, options, terms, initial_state)
    found = None if kinds is None else _checked.get(kinds)
    if found is None or cu_seqlens is not None or checks_inputs():
        _check(op, options, terms, initial_state, cu_seqlens, names)
        found = point(terms, options)
        if kinds is not None and len(_checked) < CHECKED:
            _checked[kinds] = found
    return found


def _kinds(op: str, options: Options, terms: Terms, state: Tensor | None) -> tuple | None:
    """All that the checks of a call look at; None where an argument is not a tensor."""
    tensors = (*terms, state)
    try:
        return op, options, *[x if x is None else (x.shape, x.dtype, x.device) for x in tensors]
    except AttributeError:
        return None


def _check(
    op: str,
    options: Options,
    terms: Terms,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    names: dict[str, str],
) -> None:
    """Raise `ValueError` unless the tensors of a call fit."""
    gates, axes = terms._asdict(), dict(AXES)
    if isinstance(terms.beta, Tensor) and terms.beta.dim() == 4:
        axes["beta"] = "B T HV V"
    own = {name: names.get(name, name) for name in gates}
    q, k, v = terms[:3]
    sizes = check_shapes(
        op,
        **{own["q"]: (q, "B T H K"), own["k"]: (k, "B T H K"), own["v"]: (v, "B T HV V")},
        **{own[name]: (gates[name], spec) for name, spec in axes.items()},
        initial_state=(initial_state, "N HV V K" if options.state_v_first else "N HV K V"),
    )
    check_groups(op, sizes)
    rows: Any = {own["q"]: q, own["k"]: k, own["v"]: v}
    check_row_dtypes(op, **rows)
    others: Any = {own["q"]: q} | {own[name]: gates[name] for name in axes}
    check_same(op, dtype=False, **others, initial_state=initial_state)
    check_sequences(op, sizes["B"], cu_seqlens, initial_state)
    decays: Any = {own[name]: gates[name] for name in DECAYS}
    check_log_decay(op, **decays)


def check_row_dtypes(op: str, **rows: Tensor) -> None:
    """Raise `ValueError` unless q, k and v are of one dtype, or mix half precision and fp32."""
    check_same(op, dtype=any(x.dtype == torch.float64 for x in rows.values()), **rows)


def _flip_packed(state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Reversing a packed row also reverses the order of its sequences."""
    return state if state is None or cu_seqlens is None else state.flip(0)


def check_chunk_size(op: str, chunk_size: int) -> None:
    """Raise `ValueError` unless the chunk size is a positive integer."""
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(
            f"{op}: chunk_size is {chunk_size!r}; a positive integer such as 64 was expected"
        )


def host_boundaries(
    op: str, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None
) -> Tensor | None:
    """`cu_seqlens_cpu`, the same boundaries on the host, spares a device its synchronisation."""
    if cu_seqlens_cpu is None:
        return cu_seqlens
    if cu_seqlens is None or cu_seqlens.shape != cu_seqlens_cpu.shape or cu_seqlens_cpu.is_cuda:
        raise ValueError(
            f"{op}: cu_seqlens_cpu must be the host copy of cu_seqlens (got shapes "
            f"{None if cu_seqlens is None else list(cu_seqlens.shape)} and "
            f"{list(cu_seqlens_cpu.shape)} "
            f"on {cu_seqlens_cpu.device}); pass cu_seqlens.cpu()"
        )
    if cu_seqlens.device.type == "cpu" and not torch.equal(
        cu_seqlens.long(), cu_seqlens_cpu.long()
    ):
        raise ValueError(f"{op}: cu_seqlens_cpu differs from cu_seqlens; pass cu_seqlens.cpu()")
    return cu_seqlens_cpu


def check_packed(
    op: str,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> None:
    """Raise `ValueError` unless `cu_seqlens_cpu` is `cu_seqlens` on the host and `chunk_indices` is
    a table of its chunks, `[chunks, 2]`. Both follow from `cu_seqlens`: neither changes a number.

    Example:
        >>> import torch
        >>> bounds = torch.tensor([0, 3, 5])
        >>> check_packed("demo", bounds, bounds, torch.tensor([[0, 0], [1, 0]]))
    """
    host_boundaries(op, cu_seqlens, cu_seqlens_cpu)
    if chunk_indices is None:
        return
    if cu_seqlens is None:
        raise ValueError(
            f"{op}: chunk_indices is given without cu_seqlens, which it is made from; pass both or "
            "neither"
        )
    if chunk_indices.dim() != 2 or chunk_indices.shape[1] != 2:
        raise ValueError(
            f"{op}: chunk_indices has shape {list(chunk_indices.shape)}; expected [chunks, 2], as "
            "prepare_chunk_indices makes it, or None"
        )
