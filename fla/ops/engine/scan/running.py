# SPDX-License-Identifier: MIT
"""Running sums and maxima that pages normalise with, restarted at every boundary; on a sequence
that lies on several ranks too.
"""

from itertools import pairwise

import torch
from torch import Tensor

from fla.core.boundaries import boundaries_to_list, count_sequences
from fla.core.parallel import sharded_by
from fla.ops.engine.scan import sharded

RUNNING = {
    "sum": lambda x: x.cumsum(1),
    "logsumexp": lambda x: x.logcumsumexp(1),
    "max": lambda x: x.cummax(1).values,
}


@sharded_by(sharded.running)
def running(kind: str, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum, logsumexp or maximum of x `[B, T, ...]` over the tokens of a sequence so far."""
    form = RUNNING[kind]
    if cu_seqlens is None:
        return form(x) if x.shape[1] else x
    bounds = boundaries_to_list(cu_seqlens, x.shape[1])
    parts = [form(x[:, a:b]) for a, b in pairwise(bounds) if a < b]
    return torch.cat(parts, 1) if parts else x


@sharded_by(sharded.starts)
def starts(x: Tensor, first: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x `[B, T, ...]` one token later: `first` `[N, ...]` at every sequence's first token."""
    if x.shape[1] == 0:
        return x
    if cu_seqlens is None:
        # no tensor of T - 1 tokens, whose size an exported graph of any length would fix
        return torch.cat([first.unsqueeze(1), x], 1)[:, :-1]
    bounds = boundaries_to_list(cu_seqlens, x.shape[1])
    parts = []
    for i, (a, b) in enumerate(pairwise(bounds)):
        if a < b:
            parts += [first[i : i + 1].unsqueeze(1), x[:, a : b - 1]]
    return torch.cat(parts, 1)


@sharded_by(sharded.lasts)
def lasts(x: Tensor, first: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last token of every sequence `[N, ...]`, or `first` of a sequence without any."""
    if cu_seqlens is None:
        return x[:, -1] if x.shape[1] else first
    bounds = boundaries_to_list(cu_seqlens, x.shape[1])
    rows = [x[0, b - 1] if a < b else first[i] for i, (a, b) in enumerate(pairwise(bounds))]
    return torch.stack(rows)


@sharded_by(sharded.repeat_rows)
def repeat_rows(first: Tensor, length: int, cu_seqlens: Tensor | None) -> Tensor:
    """`first` `[N, ...]` at every token of its sequence, `[B, T, ...]`."""
    if cu_seqlens is None:
        return first.unsqueeze(1).expand(first.shape[0], length, *first.shape[1:])
    lengths = cu_seqlens.diff().to(first.device)
    return first.repeat_interleave(lengths, 0, output_size=length).unsqueeze(0)


def log_cumulative_sum(
    x: Tensor, initial: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`z_t = log(exp(z_{t-1}) + exp(x_t))` per sequence: (z, z one token earlier, the last z).

    Example:
        >>> z, before, last = log_cumulative_sum(torch.zeros(1, 3, 1))
        >>> z.exp().flatten().tolist(), before[0, 0].item()
        ([1.0, 2.0, 3.0], -inf)
    """
    N = count_sequences(x, cu_seqlens)
    first = x.new_full((N, *x.shape[2:]), -torch.inf) if initial is None else initial.to(x)
    z = running("logsumexp", x, cu_seqlens)
    if initial is not None:
        z = torch.logaddexp(z, repeat_rows(first, x.shape[1], cu_seqlens))
    return z, starts(z, first, cu_seqlens), lasts(z, first, cu_seqlens)
