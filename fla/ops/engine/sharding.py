# SPDX-License-Identifier: MIT
"""What operators share on a sequence that lies on several ranks: the parts of sequences of one
rank, and sums and gathers over ranks.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fla.core.parallel import Own, SequenceParallel, Shard, exchange, tie

Ranks = dist.ProcessGroup | DeviceMesh | None
Parts = tuple[tuple[int, ...], ...]  # the numbers of the parts of a row that every rank holds


def group_of(op: str, ranks: Ranks) -> dist.ProcessGroup:
    """The group of `ranks`: itself, a 1-D mesh's, or all processes; `ValueError` without one."""
    if not dist.is_initialized():
        raise ValueError(
            f"{op}: torch.distributed is not initialised; launch with torchrun and "
            "call torch.distributed.init_process_group"
        )
    if isinstance(ranks, DeviceMesh):
        if ranks.ndim != 1:
            raise ValueError(
                f"{op}: the mesh has {ranks.ndim} dimensions; pass one of them, such "
                "as mesh['sequence']"
            )
        return ranks.get_group()
    return dist.group.WORLD if ranks is None else ranks  # type: ignore[return-value]


class _Shift(torch.autograd.Function):
    """x of the rank before, zeros on the first; its gradient goes back there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: SequenceParallel) -> Tensor:
        ctx.parallel = parallel
        return _shifted(parallel, x, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _shifted(ctx.parallel, grads[0], -1), None


def _shifted(parallel: SequenceParallel, x: Tensor, by: int) -> Tensor:
    """x of the rank `by` before, zeros where there is none."""
    out, to, source = x.new_zeros(x.shape), parallel.rank + by, parallel.rank - by
    x = x.contiguous()
    inside = range(parallel.size)
    exchange(
        parallel, [(x, to)] if to in inside else [], [(out, source)] if source in inside else []
    )
    return out


def halo(shard: Shard, x: Tensor, n: int) -> Tensor:
    """The n tokens before this rank's x `[B, T, ...]`, zeros before the first of all."""
    lengths = shard.parallel.lengths or ()
    # as many hops as the rank needs that has the shortest ones before it
    hops = 0
    for p in range(1, len(lengths)):
        reach = next((h for h in range(1, p + 1) if sum(lengths[p - h : p]) >= n), p)
        hops = max(hops, reach)
    tail = x[:, max(0, x.shape[1] - n) :]
    moving = torch.cat([x.new_zeros(x.shape[0], n - tail.shape[1], *x.shape[2:]), tail], 1)
    found = x[:, :0]
    for hop in range(1, hops + 1):
        moving = _Shift.apply(moving, shard.parallel)
        source = shard.rank - hop
        real = min(n, lengths[source]) if source >= 0 else 0
        found = torch.cat([moving[:, n - real :], found], 1)
    found = found[:, max(0, found.shape[1] - n) :]
    return torch.cat([x.new_zeros(x.shape[0], n - found.shape[1], *x.shape[2:]), found], 1)


class _Carry(torch.autograd.Function):
    """A state through the ranks in turn: `S_out = A S_in + S`, where S_in is what the rank before
    sent (zeros on the first). Returns S_in. Its gradient goes the other way round.
    """

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, S: Tensor, parallel: SequenceParallel, elementwise: bool
    ) -> Tensor:
        ctx.parallel, ctx.elementwise = parallel, elementwise
        arrived = S.new_zeros(S.shape)
        if parallel.rank > 0:
            exchange(parallel, [], [(arrived, parallel.rank - 1)])
        if parallel.rank + 1 < parallel.size:
            out = torch.addcmul(S, A, arrived) if elementwise else S + A @ arrived
            exchange(parallel, [(out.contiguous(), parallel.rank + 1)], [])
        ctx.save_for_backward(A, arrived)
        return arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        A, arrived = ctx.saved_tensors
        dout = arrived.new_zeros(arrived.shape)
        if ctx.parallel.rank + 1 < ctx.parallel.size:
            exchange(ctx.parallel, [], [(dout, ctx.parallel.rank + 1)])
        darrived = grads[0] + (A * dout if ctx.elementwise else A.mT @ dout)
        if ctx.parallel.rank > 0:
            exchange(ctx.parallel, [(darrived.contiguous(), ctx.parallel.rank - 1)], [])
        dA = (dout * arrived).sum_to_size(A.shape) if ctx.elementwise else dout @ arrived.mT
        return dA, dout, None, None


def carry(parallel: SequenceParallel, A: Tensor, S: Tensor, elementwise: bool = False) -> Tensor:
    """The state that reaches this rank, of every rank's transition and contribution: A is a matrix
    `[..., K, K]`, or with `elementwise` factors that spread over S `[..., K, V]`.
    """
    return _Carry.apply(A, S, parallel, elementwise)


class _Gather(torch.autograd.Function):
    """Every rank's x, `[size, ...]`; each gets the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: SequenceParallel) -> Tensor:
        ctx.parallel = parallel
        return _everyone(parallel, [x] * parallel.size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _everyone(ctx.parallel, list(grads[0])).sum(0), None


def _everyone(parallel: SequenceParallel, xs: list[Tensor]) -> Tensor:
    """all_to_all: sends `xs[p]` to rank p and stacks what the ranks send here."""
    mine = [x.contiguous() for x in xs]
    out = [x.new_zeros(x.shape) for x in mine]
    out[parallel.rank].copy_(mine[parallel.rank])
    others = [p for p in range(parallel.size) if p != parallel.rank]
    exchange(parallel, [(mine[p], p) for p in others], [(out[p], p) for p in others])
    return torch.stack(out)


def gather(parallel: SequenceParallel, x: Tensor) -> Tensor:
    """x of all ranks, `[size, ...]`."""
    return _Gather.apply(x, parallel)


class _Rearrange(torch.autograd.Function):
    """Parts of a row to other ranks; their gradients go back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parallel: SequenceParallel, held: Parts, wanted: Parts
    ) -> Tensor:
        ctx.parallel, ctx.held, ctx.wanted = parallel, held, wanted
        return _rearranged(parallel, x, held, wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _rearranged(ctx.parallel, grads[0], ctx.wanted, ctx.held), None, None, None


def _rearranged(parallel: SequenceParallel, x: Tensor, held: Parts, wanted: Parts) -> Tensor:
    rank = parallel.rank
    mine = [part.contiguous() for part in x.chunk(len(held[rank]), 1)]
    out = [torch.empty_like(mine[0]) for _ in wanted[rank]]
    sends, receives = [], []
    for part, number in zip(mine, held[rank], strict=True):
        to = next(p for p, numbers in enumerate(wanted) if number in numbers)
        if to == rank:
            out[wanted[rank].index(number)].copy_(part)
        else:
            sends.append((part, to))
    for part, number in zip(out, wanted[rank], strict=True):
        source = next(p for p, numbers in enumerate(held) if number in numbers)
        if source != rank:
            receives.append((part, source))
    exchange(parallel, sends, receives)
    return torch.cat(out, 1)


def zigzag_parts(ranks: int) -> Parts:
    """Of 2 P equal parts rank r holds parts r and 2 P - 1 - r.

    Example:
        >>> zigzag_parts(2)
        ((0, 3), (1, 2))
    """
    return tuple((r, 2 * ranks - 1 - r) for r in range(ranks))


def rearrange(parallel: SequenceParallel, x: Tensor, held: Parts, wanted: Parts) -> Tensor:
    """x `[B, T, ...]` with other parts of the row: rank p holds those numbered `held[p]`, equally
    long, and gets `wanted[p]`. Both count upwards, so that two parts between the same two ranks
    arrive in the order in which they are sent.
    """
    return _Rearrange.apply(x, parallel, held, wanted)


class _Sum(torch.autograd.Function):
    """The sum over the ranks, on every rank; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: SequenceParallel) -> Tensor:
        ctx.parallel = parallel
        return _summed(parallel, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(ctx.parallel, grads[0]), None


def _summed(parallel: SequenceParallel, x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=parallel.group)
    parallel.count(x)
    return x


def total(parallel: SequenceParallel, x: Tensor, source: Tensor) -> Tensor:
    """The sum of x over the ranks; `source` is what x comes from on the ranks that have some."""
    return _Sum.apply(tie(x, source), parallel)


def mean_over_ranks(
    mean: Tensor, count: int, source: Tensor, parallel: SequenceParallel
) -> tuple[Tensor, Tensor]:
    """(the mean over all ranks' tokens, their number), of a rank's own mean over `count`, which
    comes from `source`; the mean's gradient is the share of this rank.
    """
    share = mean * count if count else tie(source.new_zeros((), dtype=mean.dtype), source)
    both = _summed(parallel, torch.stack([share.detach(), share.new_tensor(float(count))]))
    share = share / both[1]
    return share + (both[0] / both[1] - share).detach(), both[1]


def sharded_next_tokens(labels: Tensor, layout: Any, ignore: int) -> Tensor:
    """`[B, l]`: at each token of this rank the label of the next one of its sequence, else
    `ignore`.
    """
    shard = layout.shard
    first = labels[:, :1] if labels.shape[1] else labels.new_zeros(len(labels), 1)
    every = _everyone(shard.parallel, [first] * shard.parallel.size)
    later = [p for p in range(shard.rank + 1, len(every)) if shard.ends[p] < shard.ends[p + 1]]
    after = every[later[0]] if later else torch.full_like(first, ignore)
    targets = torch.cat([labels, after], 1)[:, 1:][:, : labels.shape[1]]
    ends = [b - 1 - shard.begin for b in shard.bounds("labels", layout.cu_seqlens)[1:]]
    inside = [i for i in ends if 0 <= i < labels.shape[1]]
    return targets.index_fill(
        1, torch.tensor(inside, device=labels.device, dtype=torch.long), ignore
    )


class LocalSequences(NamedTuple):
    """The sequences of one call: this rank's shard, the parts of sequences on it, and the
    boundaries of all sequences.
    """

    shard: Shard
    own: Own
    bounds: list[int]
    packed: bool

    @classmethod
    def of(
        cls, op: str, parallel: SequenceParallel, x: Tensor, cu_seqlens: Tensor | None,
        length: int | None = None,
    ) -> "LocalSequences":  # fmt: skip
        shard = parallel.of(op, x.shape[1] if length is None else length)
        bounds = shard.bounds(op, cu_seqlens)
        return cls(shard, shard.own(bounds), bounds, cu_seqlens is not None)

    @property
    def continued(self) -> bool:
        """Whether the first part continues a sequence that an earlier rank began."""
        return self.own.continued if self.packed else self.shard.rank > 0

    @property
    def cuts(self) -> Tensor | None:
        """Boundaries of the parts on this rank; None for rows that are one part each."""
        return torch.tensor(self.own.cuts) if self.packed else None

    def starts(self, states: Tensor | None, like: Tensor) -> Tensor:
        """First states of the parts on this rank, from the states `[N, ...]` of all sequences;
        zeros where a part continues a sequence. `like` is a zero state `[1, ...]` or, for rows,
        `[B, ...]`.
        """
        if not self.packed:
            return like if states is None or self.continued else states.to(like.dtype)
        count = max(1, len(self.own.numbers))
        if states is None or not self.own.numbers:
            return like.expand(count, *like.shape[1:])
        found = states.to(like.dtype)[self.own.numbers]
        return torch.cat([like, found[1:]]) if self.own.continued else found

    def decays(self, g: Tensor, early: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The factor that log decays `[B, T, ...]` leave of a state that arrives: at every token
        (`early`: before it), behind the first part, and behind all; 0 where it does not reach.
        """
        end = (self.own.cuts[1] if self.packed else g.shape[1]) if self.continued else 0
        ones = torch.ones_like(g[:, :1]) if g.shape[1] else g.new_ones(len(g), 1, *g.shape[2:])
        left = torch.cat([ones, g[:, :end].cumsum(1).exp()], 1)
        seen = left[:, :-1] if early else left[:, 1:]
        first = left[:, -1] * self.continued
        alone = not self.packed or len(self.own.numbers) <= 1
        return torch.cat([seen, torch.zeros_like(g[:, end:])], 1), first, first * alone

    def finals(self, ends: Tensor, starts: Tensor | None, like: Tensor) -> Tensor:
        """Last states `[N, ...]` of all sequences, on every rank, from those of the parts here."""
        shard, bounds = self.shard, self.bounds
        if not self.packed:
            last = shard.rank + 1 == shard.parallel.size
            return total(shard.parallel, ends if last else torch.zeros_like(ends), ends)
        rows: list[Tensor] = []
        where = {n: j for j, n in enumerate(self.own.numbers)}
        for n, (a, b) in enumerate(pairwise(bounds)):
            if a == b:  # no tokens: it keeps its first state
                kept = starts if shard.rank == 0 else None
                rows.append(like if kept is None else kept[n : n + 1].to(like.dtype))
            else:
                here = n in where and b <= shard.end
                rows.append(ends[where[n]][None] if here else like)
        return total(shard.parallel, torch.cat(rows), ends)
