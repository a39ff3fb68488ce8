# SPDX-License-Identifier: MIT
"""Cross entropy of logits whose vocabulary is split over processes.

Rank r of a group holds the logits `[M, V]` of tokens `r V` to `(r + 1) V - 1` of P V in all;
targets number the whole vocabulary and are the same on every rank, as are the losses. With z the
local logits and m the number of all tokens:

    lse = log sum_ranks sum_j exp(z_j)
    loss = lse - (1 - s) z_target - s / m sum_ranks sum_j z_j + zw lse^2
    dz = (1 + 2 zw lse) exp(z - lse) - (1 - s) [j = target] - s / m
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fla.modules.losses import LogitShape


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, target: Tensor, shape: LogitShape, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        V, m = z.shape[1], z.shape[1] * dist.get_world_size(group)
        kept = target != shape.ignore_index
        local = target - dist.get_rank(group) * V
        here = kept & (local >= 0) & (local < V)
        column = local.where(here, 0)
        top = z.amax(1)
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        chosen = z.gather(1, column[:, None])[:, 0].where(here, 0)
        sums = torch.stack([(z - top[:, None]).exp().sum(1), chosen, z.sum(1)])
        dist.all_reduce(sums, group=group)
        lse, (_, chosen, total) = top + sums[0].log(), sums
        z_loss = shape.lse_square_scale * lse.square() * kept
        smooth = shape.label_smoothing
        loss = (lse - (1 - smooth) * chosen - smooth / m * total) * kept + z_loss
        ctx.save_for_backward(z, lse, column, here, kept)
        ctx.shape, ctx.tokens = shape, m
        return loss, z_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, dz_loss: Tensor) -> tuple[Tensor, None, None, None]:
        z, lse, column, here, kept = ctx.saved_tensors
        shape, dloss = ctx.shape, dloss * kept
        dlse = dloss + 2 * shape.lse_square_scale * lse * (dloss + dz_loss * kept)
        dz = dlse[:, None] * (z - lse[:, None]).exp()
        dz -= (shape.label_smoothing / ctx.tokens) * dloss[:, None]
        chosen = (1 - shape.label_smoothing) * dloss * here
        return dz.scatter_add_(1, column[:, None], -chosen[:, None]), None, None, None


def vocab_parallel_cross_entropy(
    z: Tensor, target: Tensor, shape: LogitShape, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Loss and z-loss `[M]` of a rank's logits z `[M, V]`, in fp32 or fp64, after scale and cap.

    Raises `ValueError`, on every rank, for shares of different widths and for a target outside the
    whole vocabulary.
    """
    width = torch.tensor([z.shape[1]], device=z.device)
    every = [torch.empty_like(width) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, width, group=group)
    widths = [int(x) for x in every]
    if len(set(widths)) > 1:
        raise ValueError(
            f"cross_entropy_loss: the ranks of process_group hold {widths} logits of each row; "
            "equal shares of the vocabulary were expected: pad it to a multiple of the ranks"
        )
    tokens = z.shape[1] * dist.get_world_size(group)
    kept = target[target != shape.ignore_index]
    if kept.numel() and not (int(kept.min()) >= 0 and int(kept.max()) < tokens):
        raise ValueError(
            f"cross_entropy_loss: target holds {int(kept.min())} to {int(kept.max())}; expected 0 "
            f"to {tokens - 1}, the tokens of all ranks, or {shape.ignore_index} to ignore one"
        )
    return _VocabParallel.apply(z, target, shape, group)
