# SPDX-License-Identifier: MIT
"""What ranks of a group say to each other. None of these has a gradient of its own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_into_tensor(
    inp: Tensor,
    out: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> tuple[Tensor, dist.Work | None]:
    """(the ranks' tensors `[world size, *inp.shape]`, what to wait for with `async_op`)."""
    if out is None:
        out = inp.new_empty(dist.get_world_size(group), *inp.shape)
    flat = inp.contiguous().view(-1)  # gloo takes ranks side by side, not stacked
    return out, dist.all_gather_into_tensor(out.view(-1), flat, group, async_op)


def all_reduce_sum(
    inp: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """(inp, which becomes the sum over the ranks; what to wait for with `async_op`)."""
    return inp, dist.all_reduce(inp, group=group, async_op=async_op)


def _neighbour(x: Tensor, group: dist.ProcessGroup, by: int) -> Tensor:
    """x of the rank `by` after this one, zeros where there is none."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    x, out = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
    work = []
    if rank - by in range(size):
        to = dist.get_global_rank(group, rank - by)
        work.append(dist.P2POp(dist.isend, x, to, group))
    if rank + by in range(size):
        source = dist.get_global_rank(group, rank + by)
        work.append(dist.P2POp(dist.irecv, out, source, group))
    for request in dist.batch_isend_irecv(work) if work else []:
        request.wait()
    return out


def send_recv_fwd(
    send_tensor: Tensor, group: dist.ProcessGroup, recv_from_prev: bool = True
) -> Tensor:
    """The tensor of the rank before, or after without `recv_from_prev`; zeros where none is."""
    return _neighbour(send_tensor, group, -1 if recv_from_prev else 1)


def send_recv_bwd(
    send_tensor: Tensor, group: dist.ProcessGroup, recv_from_next: bool = True
) -> Tensor:
    """The tensor of the rank after, or before without `recv_from_next`; zeros where none is."""
    return _neighbour(send_tensor, group, 1 if recv_from_next else -1)


def conv_cp_send_recv_fwd(tails: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The last tokens of the rank before, zeros on the first."""
    return send_recv_fwd(tails, group)


def conv_cp_send_recv_bwd(d_initial_state: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The gradient that the rank after has for this rank's last tokens, zeros on the last."""
    return send_recv_bwd(d_initial_state, group)
