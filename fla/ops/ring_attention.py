# SPDX-License-Identifier: MIT
r"""# Ring attention: softmax attention over several ranks

Liu et al. (2023), *Ring Attention with Blockwise Transformers*, arXiv:2310.01889.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s      over s of the same sequence   (and s <= t)

| symbol | argument | shape |
|---|---|---|
| q | `q` | `[B, l, HQ, K]`, this rank's tokens; HQ a multiple of H |
| k, v | `k`, `v` | `[B, l, H, K]`, `[B, l, H, V]` |

Every rank keeps its queries; keys and values go round, one hop a step, and what each block adds is
merged by log-sum-exp. The backward goes round once more: a block's gradients travel with it and are
home after as many hops as there are ranks. A rank sends, forward, the keys and values of all ranks
but the one behind it: `2 B l (P - 1) H D` numbers for P ranks with l tokens each.

With `order="zigzag"` rank p holds the p-th and the (2P - 1 - p)-th of 2P equal chunks, so that
causal work is even (`zigzag`, `unzigzag`); else its tokens follow those of the ranks before it.

Numerics: merged in fp32 or wider; exact.

On the one equation: outside.
"""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core import parallel as P
from fla.core.checks import check_groups, check_same, check_sequences, check_shapes
from fla.core.parallel import SequenceParallel
from fla.core.precision import compute_dtype
from fla.ops.engine.attention.flash import attend, attend_backward, merge_
from fla.ops.engine.attention.pieces import compute
from fla.ops.engine.sharding import zigzag_parts

ORDERS = ("contiguous", "zigzag")


def naive_ring_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None
) -> Tensor:
    """The equation on a whole sequence."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (
        q.shape[3] ** -0.5 if scale is None else scale
    )
    if causal:
        above = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


class Span(NamedTuple):
    """Tokens of one sequence that lie together: their place in the whole row and on their rank."""

    sequence: int
    begin: int
    at: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.at, self.at + self.length)


def spans_of(lengths: tuple[int, ...], bounds: list[int], order: str) -> list[list[Span]]:
    """The spans of tokens that every rank holds."""
    size = len(lengths)
    if order == "zigzag":
        chunk = lengths[0] // 2
        held = [[(n * chunk, chunk) for n in parts] for parts in zigzag_parts(size)]
    else:
        held = [
            [(begin, n)] for begin, n in zip(accumulate(lengths, initial=0), lengths, strict=False)
        ]
    found: list[list[Span]] = []
    for chunks in held:
        mine, at = [], 0
        for begin, n in chunks:
            for i, (a, b) in enumerate(pairwise(bounds)):
                first, last = max(a, begin), min(b, begin + n)
                if first < last:
                    mine.append(Span(i, first, at + first - begin, last - first))
            at += n
        found.append(mine)
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, parallel: SequenceParallel,
        spans: list[list[Span]], causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """q, k, v `[B, H, l, D]`."""
        wide = compute_dtype(q.dtype)
        o = torch.zeros(*q.shape[:3], v.shape[3], dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
        rows = compute(q)
        blocks = [k, v]
        for step in range(parallel.size):
            source = (parallel.rank - step) % parallel.size
            keys, values = (compute(x) for x in blocks)
            for mine, theirs, own in _pairs(spans, parallel.rank, source, causal):
                found = attend(
                    rows[:, :, mine], keys[:, :, theirs], values[:, :, theirs], scale, own
                )
                merge_(o[:, :, mine], lse[:, :, mine], *(x.to(wide) for x in found))
            if step + 1 < parallel.size:
                blocks = _turn(parallel, blocks, source)
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.options = (parallel, spans, causal, scale)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        parallel, spans, causal, scale = ctx.options
        do, rows, out = (compute(x) for x in (grads[0], q, o))
        dq = torch.zeros_like(q, dtype=lse.dtype)
        blocks = [k, v, *(x.new_zeros(x.shape, dtype=lse.dtype) for x in (k, v))]
        for step in range(parallel.size):
            source = (parallel.rank - step) % parallel.size
            keys, values = (compute(x) for x in blocks[:2])
            for mine, theirs, own in _pairs(spans, parallel.rank, source, causal):
                found = attend_backward(
                    do[:, :, mine], rows[:, :, mine], keys[:, :, theirs], values[:, :, theirs],
                    out[:, :, mine], lse[:, :, mine], scale, own,
                )  # fmt: skip
                dq[:, :, mine] += found[0]
                blocks[2][:, :, theirs] += found[1]
                blocks[3][:, :, theirs] += found[2]
            last = step + 1 == parallel.size  # the gradients' last hop is home
            blocks = [*([] if last else blocks[:2]), *blocks[2:]]
            blocks = _turn(parallel, blocks, source)
        dk, dv = blocks
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _pairs(
    spans: list[list[Span]], rank: int, source: int, causal: bool
) -> list[tuple[slice, slice, bool]]:
    """Rows of queries here and of keys from a rank that meet, and whether on the diagonal."""
    found = []
    for mine in spans[rank]:
        for theirs in spans[source]:
            same = mine.begin == theirs.begin
            if mine.sequence == theirs.sequence and (
                same or not causal or theirs.begin < mine.begin
            ):
                found.append((mine.rows, theirs.rows, causal and same))
    return found


def _turn(parallel: SequenceParallel, blocks: list[Tensor], source: int) -> list[Tensor]:
    """Blocks of a rank's tokens to the next rank, for those from the one before."""
    if parallel.size == 1:
        return blocks
    lengths = parallel.lengths or ()
    coming = lengths[(source - 1) % parallel.size]
    out = [x.new_empty(*x.shape[:2], coming, x.shape[3]) for x in blocks]
    to, by = parallel.rank + 1, parallel.rank - 1
    P.exchange(parallel, [(x.contiguous(), to) for x in blocks], [(x, by) for x in out])
    return out


@checked
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    order: str = "contiguous",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention inside `sequence_parallel`: o `[B, l, HQ, V]` of this rank's tokens, and
    with `return_lse` the log-sum-exp `[B, l, HQ]`, through which no gradient flows. `cu_seqlens`
    bounds the sequences of the whole row.

    Raises `ValueError` outside `sequence_parallel`, and for a zigzag order of unequal lengths.
    """
    op = "ring_attention"
    parallel = P.current()
    if parallel is None:
        raise ValueError(
            f"{op}: called outside sequence_parallel; on one process use torch's "
            "scaled_dot_product_attention"
        )
    sizes = check_shapes(op, q=(q, "B T HV K"), k=(k, "B T H K"), v=(v, "B T H V"))
    check_groups(op, sizes, "q")
    check_same(op, q=q, k=k, v=v)
    check_sequences(op, sizes["B"], cu_seqlens, None)
    if order not in ORDERS:
        raise ValueError(f"{op}: order is {order!r}; expected one of {', '.join(ORDERS)}")
    shard = parallel.of(op, sizes["T"])
    lengths = parallel.lengths or ()
    if order == "zigzag" and (len(set(lengths)) > 1 or lengths[0] % 2):
        raise ValueError(
            f"{op}: ranks hold {list(lengths)} tokens; zigzag needs an equal, even number on each: "
            "pad the sequence, or use order='contiguous', which takes any lengths"
        )
    spans = spans_of(lengths, shard.bounds(op, cu_seqlens), order)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = _Ring.apply(*heads_first, parallel, spans, causal, scale)
    o = o.transpose(1, 2)
    return (o, lse.transpose(1, 2)) if return_lse else o


def zigzag(x: Tensor, ranks: int, dim: int = 1) -> Tensor:
    """Tokens of a whole row in the order in which equal shards are zigzag ones.

    Example:
        >>> zigzag(torch.arange(8)[None], 2)[0].tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return torch.cat([_chunks(x, ranks, dim)[i] for i in _zigzag(ranks)], dim)


def unzigzag(x: Tensor, ranks: int, dim: int = 1) -> Tensor:
    """The inverse of `zigzag`."""
    chunks = _chunks(x, ranks, dim)
    order = _zigzag(ranks)
    return torch.cat([chunks[order.index(i)] for i in range(2 * ranks)], dim)


def _chunks(x: Tensor, ranks: int, dim: int) -> list[Tensor]:
    if x.shape[dim] % (2 * ranks):
        raise ValueError(
            f"zigzag: {x.shape[dim]} tokens on {ranks} ranks; a multiple of {2 * ranks} was "
            "expected: pad the sequence"
        )
    return list(x.chunk(2 * ranks, dim))


def _zigzag(ranks: int) -> list[int]:
    return [number for parts in zigzag_parts(ranks) for number in parts]
