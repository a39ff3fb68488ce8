# SPDX-License-Identifier: MIT
"""The context of a call whose tokens lie on several ranks, and what an operator does with it.

Rank r of P holds tokens `[r T / P, (r + 1) T / P)` of a packed row of T tokens. The boundaries of
the whole row go to `build_cp_context`; operators take the rank's own tokens, and compute what they
compute inside `fla.distributed.sequence_parallel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fla.core.boundaries import boundaries_to_list
from fla.core.checks import check_boundaries, refuse
from fla.core.parallel import SequenceParallel, current, using
from fla.ops.engine.sharding import Ranks, group_of

Result = TypeVar("Result")


@dataclass(eq=False)
class FLACPContext:
    """What a rank holds of a packed row. `build_cp_context` fills it in.

    Fields:
        group: the processes; None in a plan for a given rank, which no operator takes.
        cu_seqlens, cu_seqlens_cpu: boundaries of the rank's own parts of sequences, from 0, int32.
        is_first_rank, is_last_rank: whether the rank's first sequence starts here, and whether its
            last one ends here.
        pre_num_ranks, post_num_ranks: earlier ranks that hold its first sequence, later ones that
            hold its last.
        conv1d_kernel_size: taps of the short convolution; checked against its filters if given.
        pre_num_conv_tokens: tokens of its first sequence on earlier ranks.
        whole, whole_cpu: the boundaries of the whole row.
        parallel: the ranks and how many tokens each holds.
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
            the ranks of the group must divide T.
        group: a process group, a 1-D `DeviceMesh`, or None for all processes.
        conv1d_kernel_size: taps of the short convolution, to be checked where it runs.
        cu_seqlens_cpu: the same boundaries on the host, which spares a device a synchronisation.
        use_tf32x3_affine_chain: states pass between ranks in fp32 or wider, so only True is
            accepted.
        layout: "contiguous"; zigzag parts are refused.

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
    if layout != "contiguous":
        raise ValueError(
            f"build_cp_context: layout is {layout!r}; only 'contiguous' parts are supported: give "
            "rank r the tokens from r T / P to (r + 1) T / P"
        )
    processes = group_of("build_cp_context", group)
    return get_cp_cu_seqlens(
        cu_seqlens, cu_seqlens_cpu, group=processes, conv1d_kernel_size=conv1d_kernel_size
    )


def get_cp_cu_seqlens(
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor | None = None,
    world_size: int | None = None,
    rank: int | None = None,
    group: dist.ProcessGroup | None = None,
    conv1d_kernel_size: int | None = None,
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
    if total == 0 or total % world_size:
        raise ValueError(
            f"{op}: cu_seqlens ends at {total} tokens, which {world_size} ranks cannot share "
            "evenly; pad the row to a multiple of the ranks, or use "
            "fla.distributed.sequence_parallel, whose ranks may hold any number of tokens"
        )
    each = total // world_size
    parallel = None
    if group is not None:
        parallel = SequenceParallel(group, rank, world_size, (each,) * world_size)
    own = torch.tensor(_own(bounds, rank * each, each), dtype=torch.int32)
    first = max(a for a, b in pairwise(bounds) if a <= rank * each < b)
    last = min(b for a, b in pairwise(bounds) if a < (rank + 1) * each <= b)
    before, after = rank - first // each, (last - 1) // each - rank
    return FLACPContext(
        group, own.to(cu_seqlens.device), own, after == 0, before, before == 0, after,
        conv1d_kernel_size, rank * each - first, cu_seqlens, host, parallel,
    )  # fmt: skip


def _own(bounds: list[int], begin: int, length: int) -> list[int]:
    """The boundaries inside `length` tokens from `begin`, counted from there."""
    inside = {x - begin for x in bounds if 0 < x - begin < length}
    return [0, *sorted(inside), length]


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
        return function(**arguments)


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
