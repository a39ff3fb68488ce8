# SPDX-License-Identifier: MIT
"""The context in which operators and models take a rank's own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fla.core.parallel import SequenceParallel, current, using
from fla.ops.engine.sharding import Ranks, group_of


@contextmanager
def sequence_parallel(
    ranks: Ranks = None, lengths: list[int] | None = None
) -> Iterator[SequenceParallel]:
    """Inside the block every sequence lies on the ranks of a process group or a 1-D `DeviceMesh`
    (all processes if absent): rank p holds the tokens after those of the ranks before it, and
    operators, layers and models take and return its own. `lengths` are the tokens of each rank;
    if absent the ranks tell each other once, at the first operator.

    `cu_seqlens` bounds the sequences of the whole row. Initial states are given on every rank, and
    final states come out on every rank. A gradient is this rank's share: sum parameters' over the
    ranks (`reduce_gradients`).

    What has no such form raises `ValueError`; a rank that dies makes the others fail within the
    timeout of the process group.

    Example (under torchrun):
        tokens = shard_sequence(tokens)
        with sequence_parallel():
            o, _ = fla.chunk_gated_delta_rule(q, k, v, g, beta)
    """
    group = group_of("sequence_parallel", ranks)
    if current() is not None:
        raise ValueError("sequence_parallel: it is already active; leave the outer block first")
    size = dist.get_world_size(group)
    if lengths is not None and len(lengths) != size:
        raise ValueError(
            f"sequence_parallel: lengths is {lengths}; expected one number for each of {size} ranks"
        )
    known = None if lengths is None else tuple(lengths)
    parallel = SequenceParallel(group, dist.get_rank(group), size, known)
    with using(parallel):
        yield parallel


def split_evenly(total: int, size: int) -> list[int]:
    """Lengths that differ by one at most, the longer ones first.

    Example:
        >>> split_evenly(10, 4)
        [3, 3, 2, 2]
    """
    return [total // size + (p < total % size) for p in range(size)]


def shard_sequence(x: Tensor, ranks: Ranks = None, dim: int = 1) -> Tensor:
    """This rank's part of x along its tokens, as `split_evenly` cuts it."""
    group = group_of("sequence_parallel", ranks)
    lengths = split_evenly(x.shape[dim], dist.get_world_size(group))
    return x.split(lengths, dim)[dist.get_rank(group)].contiguous()


def gather_sequence(x: Tensor, ranks: Ranks = None, dim: int = 1) -> Tensor:
    """all_gather of the ranks' parts into the whole sequence, on every rank, without a gradient."""
    group = group_of("sequence_parallel", ranks)
    mine = torch.tensor([x.shape[dim]], device=x.device)
    lengths = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, mine, group=group)
    longest = int(max(lengths))
    room = x.detach().new_zeros(*x.shape[:dim], longest, *x.shape[dim + 1 :])
    room.narrow(dim, 0, x.shape[dim]).copy_(x.detach())
    rooms = [torch.empty_like(room) for _ in lengths]
    dist.all_gather(rooms, room, group=group)
    parts: list[Any] = [y.narrow(dim, 0, int(n)) for y, n in zip(rooms, lengths, strict=True)]
    return torch.cat(parts, dim)


def reduce_gradients(module: nn.Module, ranks: Ranks = None) -> None:
    """Sum the gradients of a module's parameters over the ranks; one without is zero."""
    group = group_of("sequence_parallel", ranks)
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            dist.all_reduce(p.grad, group=group)
