# SPDX-License-Identifier: MIT
"""From the public call of an operator to the engine: checks, defaults, layout of the state, choice
of the form.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fla.ops.engine.checks import check_groups, check_same, check_sequences, check_shapes
from fla.ops.engine.chunk import CHUNK_SIZE, chunk
from fla.ops.engine.dispatch import resolve
from fla.ops.engine.token import recurrent


@dataclass(frozen=True, slots=True)
class Options:
    """The non-tensor arguments shared by the operators of the family."""

    scale: float | None = None
    output_final_state: bool = False
    l2norm: bool = False
    state_v_first: bool = False
    reverse: bool = False
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
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments of the public function `op` and run its form: token by token for
    `fused_recurrent_*` (the only form with gk, gv or a beta per value channel), chunk by chunk for
    the others.
    """
    state_axes = "N HV V K" if options.state_v_first else "N HV K V"
    per_channel = beta is not None and beta.dim() == 4
    sizes = check_shapes(
        op,
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T HV V"),
        g=(g, "B T HV"),
        beta=(beta, "B T HV V" if per_channel else "B T HV"),
        gk=(gk, "B T HV K"),
        gv=(gv, "B T HV V"),
        initial_state=(initial_state, state_axes),
    )
    check_groups(op, sizes)
    check_same(op, q=q, k=k, v=v)
    check_same(op, dtype=False, q=q, g=g, beta=beta, gk=gk, gv=gv, initial_state=initial_state)
    check_sequences(op, sizes["B"], cu_seqlens, initial_state)
    cu_seqlens = host_boundaries(op, cu_seqlens, cu_seqlens_cpu)
    resolve(op, q.device, options.backend)
    scale = sizes["K"] ** -0.5 if options.scale is None else options.scale
    if options.state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    inputs: list[Any] = [q, k, v, g, beta]
    if options.reverse:
        inputs = [x if x is None else x.flip(1) for x in inputs]
        gk, gv = (x if x is None else x.flip(1) for x in (gk, gv))
        cu_seqlens = None if cu_seqlens is None else sizes["T"] - cu_seqlens.flip(0)
        initial_state = _flip_packed(initial_state, cu_seqlens)
    common: dict[str, Any] = dict(
        scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, l2norm=options.l2norm
    )
    autocast = torch.is_autocast_enabled(q.device.type)  # which is not for this arithmetic
    with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
        if op.startswith("fused_recurrent_"):
            o, final = recurrent(*inputs, gk=gk, gv=gv, **common)
        else:
            check_chunk_size(op, options.chunk_size)
            o, final = chunk(*inputs, chunk_size=options.chunk_size, **common)
    if options.reverse:
        o, final = o.flip(1), _flip_packed(final, cu_seqlens)
    if not options.output_final_state:
        return o, None
    return o, final.mT.contiguous() if options.state_v_first else final


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
