# SPDX-License-Identifier: MIT
"""From the public call of an operator to the engine: checks, defaults, layout of the state, choice
of the form.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla.core.checks import (
    check_groups,
    check_log_decay,
    check_same,
    check_sequences,
    check_shapes,
    checks_inputs,
)
from fla.core.parallel import SequenceParallel, current
from fla.core.precision import compute_dtype
from fla.ops.engine.dispatch import requested, resolve
from fla.ops.engine.kernels import recurrence as triton
from fla.ops.engine.native import recurrence as native
from fla.ops.engine.recurrence.chunk import CHUNK_SIZE, chunk
from fla.ops.engine.recurrence.columns import chunk_columns
from fla.ops.engine.recurrence.sharded import recurrence
from fla.ops.engine.recurrence.token import recurrent

KERNELS: dict[str, Any] = {"native": native, "triton": triton}


# Called with (op, options, tensors by name) at every run, while `fla.analysis.record` looks on.
observers: list[Callable[[str, "Options", dict[str, Tensor | None]], None]] = []


def announce(op: str, options: "Options", **tensors: Tensor | None) -> None:
    """Tell all observers of a run, with the tensors of `run` (`state` is the initial one). Scans,
    which do not come through `run`, say what they are as one: a head for each of their channels.
    """
    for look in observers:
        look(op, options, dict(tensors))


_overwriting = False


@contextmanager
def overwrite_states() -> Iterator[None]:
    """Inside the block an operator of the one recurrence writes its final state over the
    `initial_state` it was given and returns that tensor: a decode step then allocates no state, and
    a captured graph finds it where it was. The token form in kernels updates it where it lies;
    others compute it and copy it there. An operator that assembles its state of several returns a
    new one.

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


def _check_overwritten(op: str, dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> None:
    state = tensors[-1]
    if state is not None and state.dtype != dtype:
        raise ValueError(
            f"{op}: initial_state is {state.dtype}, but overwrite_states() wants it in the dtype "
            f"of the result; pass initial_state.to({dtype})"
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
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


def run(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    names: dict[str, str] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments of the public function `op` and run its form: token by token for
    `fused_recurrent_*` (the only form with a beta per value channel), chunk by chunk for the
    others. `names` are the caller's own for arguments that go by another name there.
    """
    gates = dict(g=g, beta=beta, gk=gk, gv=gv, a=a, b=b)
    tensors = (q, k, v, *gates.values(), initial_state)
    kinds = None if torch.compiler.is_compiling() else _kinds(op, options, tensors)
    if kinds is None or kinds not in _checked or cu_seqlens is not None or checks_inputs():
        _check(op, options, q, k, v, gates, initial_state, cu_seqlens, names or {})
        if kinds is not None and len(_checked) < CHECKED:
            _checked.add(kinds)
    if observers:
        announce(op, options, q=q, k=k, v=v, **gates, state=initial_state, cu_seqlens=cu_seqlens)
    cu_seqlens = host_boundaries(op, cu_seqlens, cu_seqlens_cpu)
    parallel = current()
    if parallel is not None:
        sequences = dict(initial_state=initial_state, cu_seqlens=cu_seqlens)
        return _sharded(op, options, parallel, q, k, v, **gates, **sequences)
    erases = beta is not None or a is not None
    kind = (q.dtype, q.shape[3] if erases else 0)
    backend = resolve(op, q.device, options.backend, *kind)
    given = initial_state if _overwriting and options.output_final_state else None
    if given is not None:
        _check_overwritten(op, compute_dtype(q.dtype), tensors)
    if options.state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    inputs: dict[str, Any] = dict(q=q, k=k, v=v, **gates)
    if options.reverse:
        inputs = {n: x if x is None else x.flip(1) for n, x in inputs.items()}
        cu_seqlens = None if cu_seqlens is None else q.shape[1] - cu_seqlens.flip(0)
        initial_state = _flip_packed(initial_state, cu_seqlens)
    inputs |= dict(
        scale=q.shape[3] ** -0.5 if options.scale is None else options.scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    autocast = torch.is_autocast_enabled(q.device.type)  # which is not for this arithmetic
    with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
        if op.startswith("fused_recurrent_"):
            inputs |= dict(l2norm=options.l2norm, read_before=options.read_before)
            if backend in KERNELS:
                there = initial_state is not None and initial_state is given
                overwrite = there and initial_state.is_contiguous()
                o, final = _tokens(op, options, backend, overwrite, **inputs)
            else:
                o, final = recurrent(**inputs)
        else:
            o, final = _chunk(op, options, backend, **inputs)
    if options.reverse:
        o, final = o.flip(1), _flip_packed(final, cu_seqlens)
    if not options.output_final_state:
        return o, None
    final = final.mT.contiguous() if options.state_v_first else final
    return o, final if given is None or final is given else given.copy_(final)


def _sharded(
    op: str, options: Options, parallel: SequenceParallel, q: Tensor, k: Tensor, v: Tensor,
    g: Tensor | None, gv: Tensor | None, initial_state: Tensor | None, **rest: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The same on a shard of every sequence, inside `sequence_parallel`."""
    if options.reverse or _overwriting:
        what = "reverse=True" if options.reverse else "overwrite_states()"
        raise ValueError(f"{op}: {what} is not possible inside sequence_parallel; call it outside")
    scale = q.shape[3] ** -0.5 if options.scale is None else options.scale
    local = options._replace(scale=scale, output_final_state=True, state_v_first=False)
    if options.state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    o, final = recurrence(
        partial(run, op, local), op, parallel, q, k, v, gv, initial_state, scale=scale,
        read_before=options.read_before, keep=options.output_final_state, g=g, **rest,
    )  # fmt: skip
    return o, final.mT.contiguous() if options.state_v_first and final is not None else final


# Calls whose arguments were found right: a decode step takes as long as its checks.
_checked: set[tuple] = set()
CHECKED = 4096


def _kinds(op: str, options: Options, tensors: tuple) -> tuple | None:
    """All that the checks of a call look at; None where an argument is no tensor."""
    try:
        return op, options, *[x if x is None else (x.shape, x.dtype, x.device) for x in tensors]
    except AttributeError:
        return None


def _check(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    names: dict[str, str],
) -> dict[str, int]:
    """The sizes of the axes, or `ValueError`."""
    beta = gates["beta"]
    axes = dict(
        g="B T HV",
        beta="B T HV V" if isinstance(beta, Tensor) and beta.dim() == 4 else "B T HV",
        gk="B T HV K",
        gv="B T HV V",
        a="B T HV K",
        b="B T HV K",
    )
    own = {name: names.get(name, name) for name in ("q", "k", "v", *axes)}
    sizes = check_shapes(
        op,
        **{own["q"]: (q, "B T H K"), own["k"]: (k, "B T H K"), own["v"]: (v, "B T HV V")},
        **{own[name]: (gates[name], spec) for name, spec in axes.items()},
        initial_state=(initial_state, "N HV V K" if options.state_v_first else "N HV K V"),
    )
    check_groups(op, sizes)
    rows: Any = {own["q"]: q, own["k"]: k, own["v"]: v}
    check_same(op, **rows)
    others: Any = {own["q"]: q} | {own[name]: gates[name] for name in axes}
    check_same(op, dtype=False, **others, initial_state=initial_state)
    check_sequences(op, sizes["B"], cu_seqlens, initial_state)
    decays: Any = {own[name]: gates[name] for name in ("g", "gk", "gv")}
    check_log_decay(op, **decays)
    return sizes


def row_decay(g: Tensor | None, gk: Tensor | None) -> Tensor | None:
    """One log decay for the rows of the state."""
    if gk is None:
        return g
    return gk if g is None else g.unsqueeze(-1) + gk


def _chunk(op: str, options: Options, backend: str, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The chunk form for the decays that were given."""
    check_chunk_size(op, options.chunk_size)
    gk, gv = inputs.pop("gk"), inputs.pop("gv")
    if gv is not None:  # comes alone
        inputs = {n: x for n, x in inputs.items() if x is not None}
        if backend == "native":
            return native.chunk(**inputs, gv=gv)
        return chunk_columns(**inputs, g=gv, chunk_size=options.chunk_size)
    inputs |= dict(
        g=row_decay(inputs["g"], gk), l2norm=options.l2norm, read_before=options.read_before
    )
    if backend in KERNELS:
        return KERNELS[backend].chunk(**inputs)
    return chunk(**inputs, chunk_size=options.chunk_size)


def _tokens(
    op: str, options: Options, backend: str, overwrite: bool, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """Token by token in kernels; with gradients the chunk form, which alone has a backward there,
    and torch where that cannot express the call.
    """
    kernels = KERNELS[backend]
    inputs["g"] = row_decay(inputs["g"], inputs.pop("gk"))
    if not torch.is_grad_enabled():
        return kernels.recurrent(**inputs, overwrite=overwrite)
    tensors = (x for x in inputs.values() if isinstance(x, Tensor))
    if not any(x.requires_grad for x in tensors):
        return kernels.recurrent(**inputs, overwrite=overwrite)
    beta, gv = inputs["beta"], inputs["gv"]
    alone = all(inputs[name] is None for name in ("g", "beta", "a", "b"))
    if gv is None and (beta is None or beta.dim() == 3):
        del inputs["gv"]
        return kernels.chunk(**inputs)
    if gv is not None and backend == "native" and alone and not options.read_before:
        return native.chunk(**inputs)
    if requested(options.backend)[0] == backend:
        raise ValueError(
            f"{op}: backend {backend!r} was asked for, but it has no kernel for gradients through "
            "a beta per value channel, or a decay of value channels beside other gates; use "
            "backend='torch', or let fla choose"
        )
    g = inputs.pop("g")
    kind = "g" if g is None or g.dim() == 3 else "gk"
    return recurrent(**inputs, **{kind: g})


ChunkForm = Callable[..., tuple[Tensor, Tensor]]


def chunk_form(op: str, backend: str, chunk_size: int) -> ChunkForm:
    """The engine's chunk form on a backend, for operators that are built of several runs of it."""
    check_chunk_size(op, chunk_size)
    if backend in KERNELS:
        return KERNELS[backend].chunk
    return partial(chunk, chunk_size=chunk_size)


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
