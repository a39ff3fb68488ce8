# SPDX-License-Identifier: MIT
"""The context of a call whose tokens lie on several ranks, and what an operator does with it.

Rank r of P holds tokens `[r T / P, (r + 1) T / P)` of a packed row of T tokens, or with
`layout="zigzag"` parts r and 2 P - 1 - r of 2 P equal parts. The boundaries of the whole row go to
`build_cp_context`; operators take the rank's own tokens, and compute what they compute inside
`fla.distributed.sequence_parallel`. There a rank's tokens follow those of the ranks before it, so
zigzag parts are exchanged before an operator and its output after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fla.core.boundaries import boundaries_to_list
from fla.core.checks import check_boundaries, refuse
from fla.core.parallel import SequenceParallel, current, using
from fla.ops.engine.sharding import Ranks, group_of, rearrange, zigzag_parts

Result = TypeVar("Result")


@dataclass(eq=False)
class FLACPContext:
    """What a rank holds of a packed row. `build_cp_context` fills it in.

    Fields:
        group: the processes; None in a plan for a given rank, which no operator takes.
        cu_seqlens, cu_seqlens_cpu: boundaries of the rank's own parts of sequences, from 0, int32;
            in a zigzag layout the end of its first part is one of them.
        is_first_rank, is_last_rank: whether the rank's first sequence starts here, and whether its
            last one ends here.
        pre_num_ranks, post_num_ranks: earlier ranks that hold its first sequence, later ones that
            hold its last.
        conv1d_kernel_size: taps of the short convolution; checked against its filters if given.
        pre_num_conv_tokens: tokens of its first sequence on earlier ranks.
        whole, whole_cpu: the boundaries of the whole row.
        parallel: the ranks and how many tokens each holds.
        layout: "contiguous" or "zigzag".
        part_len: tokens of a zigzag part; front_num_seqs: sequences with tokens in the first one.
        pre_num_ranks_by_part, post_num_ranks_by_part, is_first_by_part, is_last_by_part,
        pre_num_conv_tokens_by_part: for a rank's two zigzag parts, what the fields without
            `_by_part` say of contiguous ranks, counted in parts.
    """

    group: dist.ProcessGroup | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    is_last_rank: bool | None = None
    pre_num_ranks: int | None = None
    is_first_rank: bool | None = None
    post_num_ranks: int | None = None
    conv1d_kernel_size: int | None = None
    pre_num_conv_tokens: int | None = None
    whole: Tensor | None = None
    whole_cpu: Tensor | None = None
    parallel: SequenceParallel | None = None
    layout: str = "contiguous"
    part_len: int | None = None
    front_num_seqs: int | None = None
    pre_num_ranks_by_part: tuple[int, int] | None = None
    post_num_ranks_by_part: tuple[int, int] | None = None
    is_first_by_part: tuple[bool, bool] | None = None
    is_last_by_part: tuple[bool, bool] | None = None
    pre_num_conv_tokens_by_part: tuple[int, int] | None = None

    @property
    def num_seqs(self) -> int:
        """The number of sequences with tokens on this rank."""
        return 0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def is_cp_enabled(self) -> bool:
        """Whether there is a group."""
        return self.group is not None

    def copy_for_backward(self) -> FLACPContext:
        """A copy. Backward passes need none here: they keep what they were recorded with."""
        return replace(self)


def build_cp_context(
    cu_seqlens: Tensor,
    group: Ranks,
    conv1d_kernel_size: int | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    use_tf32x3_affine_chain: bool = True,
    layout: str = "contiguous",
) -> FLACPContext:
    """The context for `cp_context=` of a call on this rank's tokens.

    Args:
        cu_seqlens: `[N + 1]`, the boundaries of the whole packed row of T tokens, on every rank;
            the P ranks of the group must divide T, and 2 P must in a zigzag layout.
        group: a process group, a 1-D `DeviceMesh`, or None for all processes.
        conv1d_kernel_size: taps of the short convolution, to be checked where it runs.
        cu_seqlens_cpu: the same boundaries on the host, which spares a device a synchronisation.
        use_tf32x3_affine_chain: states pass between ranks in fp32 or wider, so only True is
            accepted.
        layout: "contiguous", or "zigzag", whose parts are the ones that balance causal attention
            (`fla.ops.ring_attention.zigzag`).

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> build_cp_context(torch.tensor([0, 3, 8]), dist.group.WORLD).num_seqs
        2
        >>> dist.destroy_process_group()
    """
    if not use_tf32x3_affine_chain:
        raise ValueError(
            "build_cp_context: use_tf32x3_affine_chain is False; states pass between ranks in fp32 "
            "or wider here: drop it"
        )
    processes = group_of("build_cp_context", group)
    return get_cp_cu_seqlens(
        cu_seqlens, cu_seqlens_cpu, group=processes, conv1d_kernel_size=conv1d_kernel_size,
        layout=layout,
    )  # fmt: skip


def get_cp_cu_seqlens(
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor | None = None,
    world_size: int | None = None,
    rank: int | None = None,
    group: dist.ProcessGroup | None = None,
    conv1d_kernel_size: int | None = None,
    layout: str = "contiguous",
) -> FLACPContext:
    """The context of a group's rank, or without a group the plan for `rank` out of `world_size`.

    Example:
        >>> plan = get_cp_cu_seqlens(torch.tensor([0, 3, 8]), world_size=2, rank=1)
        >>> plan.cu_seqlens.tolist(), plan.pre_num_ranks, plan.pre_num_conv_tokens
        ([0, 4], 1, 1)
    """
    op = "get_cp_cu_seqlens"
    if world_size is None and group is not None:
        world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    if world_size is None or rank is None or not 0 <= rank < world_size:
        raise ValueError(
            f"{op}: world_size is {world_size} and rank is {rank}; pass a group, or both with "
            "0 <= rank < world_size"
        )
    check_boundaries(op, 1, cu_seqlens)
    host = cu_seqlens.cpu() if cu_seqlens_cpu is None else cu_seqlens_cpu
    if host.shape != cu_seqlens.shape or host.device.type != "cpu":
        raise ValueError(
            f"{op}: cu_seqlens_cpu has shape {list(host.shape)} on {host.device}; pass "
            "cu_seqlens.cpu()"
        )
    total = int(host[-1])
    bounds = boundaries_to_list(host, total, op)
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"{op}: layout is {layout!r}; expected 'contiguous' or 'zigzag'")
    parts = world_size * (2 if layout == "zigzag" else 1)
    if total == 0 or total % parts:
        raise ValueError(
            f"{op}: cu_seqlens ends at {total} tokens, which {world_size} ranks cannot share "
            f"evenly in a {layout} layout; pad the row to a multiple of {parts}, or use "
            "fla.distributed.sequence_parallel, whose ranks may hold any number of tokens"
        )
    parallel = None
    if group is not None:
        parallel = SequenceParallel(group, rank, world_size, (total // world_size,) * world_size)
    more: dict[str, Any]
    if layout == "contiguous":
        part = _part(bounds, rank, total // parts)
        own = part.cuts
        more = dict(
            is_last_rank=part.after == 0, pre_num_ranks=part.before, is_first_rank=part.before == 0,
            post_num_ranks=part.after, pre_num_conv_tokens=part.tokens_before,
        )  # fmt: skip
    else:
        length = total // parts
        pair = [_part(bounds, number, length) for number in zigzag_parts(world_size)[rank]]
        own = pair[0].cuts + [length + x for x in pair[1].cuts[1:]]
        more = dict(
            part_len=length, front_num_seqs=len(pair[0].cuts) - 1,
            pre_num_ranks_by_part=tuple(x.before for x in pair),
            post_num_ranks_by_part=tuple(x.after for x in pair),
            is_first_by_part=tuple(x.before == 0 for x in pair),
            is_last_by_part=tuple(x.after == 0 for x in pair),
            pre_num_conv_tokens_by_part=tuple(x.tokens_before for x in pair),
        )  # fmt: skip
    cuts = torch.tensor(own, dtype=torch.int32)
    return FLACPContext(
        group=group, cu_seqlens=cuts.to(cu_seqlens.device), cu_seqlens_cpu=cuts,
        conv1d_kernel_size=conv1d_kernel_size, whole=cu_seqlens, whole_cpu=host, parallel=parallel,
        layout=layout, **more,
    )  # fmt: skip


class _Part(NamedTuple):
    """The boundaries inside a part, counted from its start; how many parts before it hold its first
    sequence, how many after it its last; the tokens of its first sequence before it.
    """

    cuts: list[int]
    before: int
    after: int
    tokens_before: int


def _part(bounds: list[int], number: int, length: int) -> _Part:
    begin = number * length
    first = max(a for a, b in pairwise(bounds) if a <= begin < b)
    last = min(b for a, b in pairwise(bounds) if a < begin + length <= b)
    inside = {x - begin for x in bounds if 0 < x - begin < length}
    cuts = [0, *sorted(inside), length]
    return _Part(cuts, number - first // length, (last - 1) // length - number, begin - first)


def on_ranks(
    function: Callable[..., Result], arguments: dict[str, Any], taps: int | None = None
) -> Result:
    """`function(**arguments)` where `cp_context` among them says which tokens they hold: called
    again inside the context, with the boundaries of the whole row. `taps` are a convolution's.
    """
    op = getattr(function, "__name__", "operator")
    arguments = dict(arguments)
    context = arguments.pop("cp_context")
    if not isinstance(context, FLACPContext) or context.parallel is None:
        what = "without a group" if isinstance(context, FLACPContext) else "no such context"
        raise ValueError(
            f"{op}: cp_context is a {type(context).__name__} {what}; pass what "
            "fla.ops.cp.build_cp_context returns, or call it inside "
            "fla.distributed.sequence_parallel"
        )
    if current() is not None:
        raise ValueError(
            f"{op}: cp_context was given inside sequence_parallel; drop one of the two"
        )
    expected = context.conv1d_kernel_size
    if taps is not None and expected not in (None, taps):
        raise ValueError(
            f"{op}: cp_context was built with conv1d_kernel_size={expected}, but weight has {taps} "
            "taps; build it with the number of taps"
        )
    for name, own, whole in (
        ("cu_seqlens", context.cu_seqlens, context.whole),
        ("cu_seqlens_cpu", context.cu_seqlens_cpu, context.whole_cpu),
    ):
        if name in arguments:
            given = arguments[name]
            if given is not None and not any(_same(given, x) for x in (own, whole)):
                raise ValueError(
                    f"{op}: {name} differs from the boundaries in cp_context; drop it, or pass "
                    f"cp_context.{name}"
                )
            arguments[name] = whole
    if "chunk_indices" in arguments:  # of the rank's own boundaries; they follow from the whole's
        arguments["chunk_indices"] = None
    with using(context.parallel):
        if context.layout == "zigzag":
            return _on_zigzag_parts(function, arguments, context.parallel)
        return function(**arguments)


# Tensors that every rank has whole; all others hold its tokens.
WHOLE = {
    *("weight", "bias", "A_log", "dt_bias", "initial_state", "cache"),
    *("cu_seqlens", "cu_seqlens_cpu", "chunk_indices"),
}


def _on_zigzag_parts(
    function: Callable[..., Result], arguments: dict[str, Any], parallel: SequenceParallel
) -> Result:
    """`function` where its tokens follow those of the ranks before; the output comes back."""
    held = zigzag_parts(parallel.size)
    wanted = tuple((2 * r, 2 * r + 1) for r in range(parallel.size))
    moved = {
        name: rearrange(parallel, x, held, wanted)
        for name, x in arguments.items()
        if isinstance(x, Tensor) and name not in WHOLE
    }
    found: Any = function(**(arguments | moved))
    if isinstance(found, Tensor):
        return rearrange(parallel, found, wanted, held)  # type: ignore[return-value]
    return (rearrange(parallel, found[0], wanted, held), *found[1:])  # type: ignore[return-value]


def _same(x: Any, y: Tensor | None) -> bool:
    """Whether two tensors hold the same boundaries, of any integer type and device."""
    if x is y:
        return True
    if not isinstance(x, Tensor) or y is None or x.shape != y.shape:
        return False
    return torch.equal(x.to(y), y)


def refuse_cp_context(op: str, cp_context: object) -> None:
    """Raise `ValueError` for a context given to an operator that takes none."""
    fix = "call it inside `with fla.distributed.sequence_parallel(group):` instead, and drop it"
    refuse(op, "cp_context", cp_context, fix)
