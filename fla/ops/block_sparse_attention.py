# SPDX-License-Identifier: MIT
r"""# Block-sparse attention

Blocks of keys are kept or left out for a block of queries, under one softmax; Child et al. (2019),
arXiv:1904.10509; Zaheer et al. (2020), *Big Bird*, arXiv:2007.14062; chosen by content, Lu et al.
(2025), *MoBA*, arXiv:2502.13189.

    o_t = sum_s softmax_s(scale q_t . k_s + G[i(t), j(s)]) v_s     over s whose block j is kept for
                                                                   t's block i   (and s <= t)

| symbol | argument | shape |
|---|---|---|
| q | `q` | `[B, T, HQ, K]`, HQ a multiple of H |
| k, v | `k`, `v` | `[B, T, H, K]`, `[B, T, H, V]` |
| what is kept | `pattern` | `BlockPattern`, of the functions below; `|` is their union |
| G | its `gate` | log weights with a gradient, of patterns chosen by content; 0 if absent |

A pattern's density is measured, not asked for. A token for which nothing is kept gets o = 0. Where
blocks of queries are smaller than those of keys (`query_block`), each chooses for itself; MoBA is
`query_block=1`.

Numerics: as `dilated_attention`; exact.

On the one equation: outside; its cost is T times the kept keys a token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.core import operator
from fla.core.checks import check_groups, check_same, check_shapes
from fla.core.operator import Schema, needs_gradient
from fla.core.parallel import SequenceParallel, tie, using
from fla.core.precision import compute_dtype
from fla.core.stage import Form, Stage, first_tensor
from fla.ops.engine.attention import pieces
from fla.ops.engine.attention.pieces import Piece
from fla.ops.engine.attention.sharded import all_gather, among_all

RUN = 64  # blocks of queries that meet one block of keys in a problem, a power of four


@dataclass(frozen=True)
class BlockPattern:
    """Which blocks of keys a block of queries sees.

    Fields:
        kept: bool `[B or 1, H or 1, query blocks, key blocks]`.
        length: tokens; the last blocks may be shorter.
        block_size, query_block: tokens of a block of keys, and of queries, which divides it.
        causal: whether a query also sees no later token.
        gate: added to the scores of a pair of blocks, `[B, H, query blocks, key blocks]`.
    """

    kept: Tensor
    length: int
    block_size: int
    query_block: int
    causal: bool = False
    gate: Tensor | None = None

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.query_block < 1 or self.block_size % self.query_block:
            raise ValueError(
                f"BlockPattern: query_block={self.query_block} must divide "
                f"block_size={self.block_size}, and both be at least 1"
            )
        blocks = (-(-self.length // self.query_block), -(-self.length // self.block_size))
        if self.kept.dim() != 4 or self.kept.dtype != torch.bool or self.kept.shape[2:] != blocks:
            raise ValueError(
                f"BlockPattern: kept is {self.kept.dtype} {list(self.kept.shape)}; expected bool "
                f"[B or 1, H or 1, {blocks[0]}, {blocks[1]}] for {self.length} tokens in blocks of "
                f"{self.query_block} queries and {self.block_size} keys"
            )

    def __or__(self, other: "BlockPattern") -> "BlockPattern":
        """The union: a block is kept where either pattern keeps it."""
        for name in ("length", "block_size", "query_block", "causal"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise ValueError(f"BlockPattern: union of {name}={mine} and {name}={its}")
        if self.gate is not None and other.gate is not None:
            raise ValueError("BlockPattern: union of two patterns that both have a gate")
        gate = other.gate if self.gate is None else self.gate
        return replace(self, kept=self.kept | other.kept.to(self.kept.device), gate=gate)

    def only(self, first: int, last: int) -> "BlockPattern":
        """The pattern of the query blocks that hold tokens first to last; others keep none."""
        begin = torch.arange(self.kept.shape[2], device=self.kept.device) * self.query_block
        rows = (begin < last) & (begin + self.query_block > first)
        return replace(self, kept=self.kept & rows[:, None])

    def dense(self) -> Tensor:
        """Which tokens see which, `[B or 1, H or 1, T, T]`."""
        seen = self.kept.repeat_interleave(self.query_block, 2)[:, :, : self.length]
        seen = seen.repeat_interleave(self.block_size, 3)[..., : self.length]
        return seen.tril() if self.causal else seen

    def density(self) -> float:
        """Share of the pairs of tokens (of those not in the future, if causal) that are kept."""
        T, size, step = self.length, self.block_size, self.query_block
        first = torch.arange(self.kept.shape[2], device=self.kept.device)[:, None] * step
        start = torch.arange(self.kept.shape[3], device=self.kept.device) * size
        if not self.causal:
            pairs = (T - first).clamp(max=step) * (T - start).clamp(max=size)
        else:  # by query r of a block: min(size, first + r - start + 1) keys
            r = torch.arange(step, device=self.kept.device).view(-1, 1, 1)
            seen = (first + r - start + 1).clamp(0, size)
            pairs = (seen * (first + r < T)).sum(0)
        every = T * (T + 1) / 2 if self.causal else T * T
        return (self.kept * pairs).sum((2, 3)).double().mean().item() / max(1, every)

    def to_block_mask(self) -> Any:
        """The same pattern as a `BlockMask` of torch's FlexAttention."""
        from torch.nn.attention.flex_attention import BlockMask

        kept, size, step, causal, T = (
            self.kept, self.block_size, self.query_block, self.causal, self.length
        )  # fmt: skip

        def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            # rows of the last blocks that are not tokens
            there = kept[b % kept.shape[0], h % kept.shape[1], t.clamp(max=T - 1) // step,
                         s.clamp(max=T - 1) // size] & (s < T)  # fmt: skip
            return there & (s <= t) if causal else there

        counts = kept.sum(-1, dtype=torch.int32)
        order = kept.to(torch.int8).argsort(stable=True, dim=-1, descending=True).to(torch.int32)
        return BlockMask.from_kv_blocks(
            counts, order, BLOCK_SIZE=(step, size), mask_mod=seen, seq_lengths=(T, T)
        )


def naive_block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *, scale: float | None = None
) -> Tensor:
    """One softmax under the dense mask."""
    HQ, H = q.shape[2], k.shape[2]
    seen = pattern.dense()
    seen = seen.expand(seen.shape[0], H, -1, -1).repeat_interleave(HQ // H, 1)
    k, v = (x.repeat_interleave(HQ // H, 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (
        k.shape[-1] ** -0.5 if scale is None else scale
    )
    if pattern.gate is not None:
        gate = pattern.gate.repeat_interleave(HQ // H, 1)
        gate = gate.repeat_interleave(pattern.query_block, 2)[:, :, : pattern.length]
        scores = scores + gate.repeat_interleave(pattern.block_size, 3)[..., : pattern.length]
    nothing = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~(seen | nothing), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights.masked_fill(nothing, 0.0), v)


def _blocks(n: int, block_size: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Numbers of the blocks of queries `[n, 1]` and of keys `[n]`."""
    i = torch.arange(-(-n // block_size), device=device)
    return i[:, None], i


def _pattern(kept: Tensor, n: int, block_size: int, causal: bool) -> BlockPattern:
    kept = kept.tril() if causal else kept
    return BlockPattern(kept[None, None], n, block_size, block_size, causal)


def local_window(
    n: int, window: int, *, block_size: int = 128, causal: bool = False
) -> BlockPattern:
    """Blocks that hold a key less than `window` tokens from a query.

    Example:
        >>> local_window(1024, 128, causal=True).kept[0, 0, 3].int().tolist()
        [0, 0, 1, 1, 0, 0, 0, 0]
    """
    i, j = _blocks(n, block_size)
    return _pattern((i - j).abs() <= (window + block_size - 2) // block_size, n, block_size, causal)


def strided(
    n: int, stride: int, local: int = 1, *, block_size: int = 128, causal: bool = False
) -> BlockPattern:
    """Every `stride`-th block, and those less than `local` blocks away (Sparse Transformers)."""
    i, j = _blocks(n, block_size)
    kept = (j % stride == stride - 1) | ((i - j).abs() < local)
    return _pattern(kept, n, block_size, causal)


def dilated(
    n: int, rates: Sequence[int], *, block_size: int = 128, causal: bool = False
) -> BlockPattern:
    """The block itself, and those at the distances `rates` on both sides."""
    i, j = _blocks(n, block_size)
    kept = i == j
    for rate in rates:
        kept = kept | ((i - j).abs() == rate)
    return _pattern(kept, n, block_size, causal)


def global_local(
    n: int, global_tokens: int, window: int, *, block_size: int = 128, causal: bool = False
) -> BlockPattern:
    """The first `global_tokens`, which all see and which see all, and a local window."""
    i, j = _blocks(n, block_size)
    first = -(-global_tokens // block_size)
    everywhere = _pattern((j < first) | (i < first), n, block_size, causal)
    return everywhere | local_window(n, window, block_size=block_size, causal=causal)


def hierarchical(
    n: int, levels: Sequence[tuple[int, int]], *, block_size: int = 128, causal: bool = False
) -> BlockPattern:
    """Keep, for each level (stride, reach), every `stride`-th block up to `reach` blocks away: near
    blocks densely and far ones thinly, as in `[(1, 2), (4, 16), (16, 256)]`. A block always keeps
    itself.
    """
    i, j = _blocks(n, block_size)
    kept = i == j
    for stride, reach in levels:
        kept = kept | ((j % stride == stride - 1) & ((i - j).abs() <= reach))
    return _pattern(kept, n, block_size, causal)


def random_blocks(
    n: int, count: int, *, seed: int = 0, block_size: int = 128, causal: bool = False
) -> BlockPattern:
    """Keep, for every block, `count` others drawn at random from those it may see. A causal pattern
    draws the same ones whatever the length of the sequence.
    """
    i, j = _blocks(n, block_size)
    draw = _mixed(_mixed(_mixed(torch.tensor(seed)) + i) + j)
    draw = draw.masked_fill((i == j) | ((j > i) & causal), -1)
    best = draw.topk(min(count, len(j)), -1)
    kept = torch.zeros(draw.shape, dtype=torch.bool).scatter(1, best.indices, best.values >= 0)
    return _pattern(kept, n, block_size, causal)


def _mixed(x: Tensor) -> Tensor:
    """Numbers below 2^31 that look random, one for each integer: xorshift and multiply, twice."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 73244475 + 12345) & 0x7FFFFFFF
    return x ^ (x >> 16)


def big_bird(
    n: int, global_tokens: int, window: int, count: int, *, seed: int = 0, block_size: int = 128,
    causal: bool = False,
) -> BlockPattern:  # fmt: skip
    """Global tokens, a local window and `count` random blocks."""
    options: dict[str, Any] = dict(block_size=block_size, causal=causal)
    random = random_blocks(n, count, seed=seed, **options)
    return global_local(n, global_tokens, window, **options) | random


def topk_content(
    q: Tensor,
    k: Tensor,
    count: int,
    *,
    block_size: int = 128,
    query_block: int | None = None,
    causal: bool = False,
    gated: bool = False,
) -> BlockPattern:
    """The block itself and the `count - 1` others with the largest `mean(k) . q`, for q, k
    `[B, T, H, D]` of the heads of k: MoBA's choice for `query_block=1`. A block of several queries
    chooses by their mean, or if causal by its first, whose future holds the others.

    Choosing has no gradient. `gated` adds `logsigmoid(mean(k) . q / sqrt(D))` to the scores of
    another block that was chosen, through which q and k learn to choose.
    """
    step = query_block or block_size
    asks = q[:, ::step].transpose(1, 2) if causal else _means(q, step)
    scores = asks @ _means(k, block_size).mT / math.sqrt(q.shape[3])
    own = torch.arange(asks.shape[2], device=q.device) * step // block_size
    kept = choose(scores, own, count, causal)
    gate = None
    if gated:
        mine = torch.arange(scores.shape[3], device=q.device) == own[:, None]
        gate = F.logsigmoid(scores).masked_fill(mine, 0.0)
    return BlockPattern(kept, q.shape[1], block_size, step, causal, gate)


def choose(scores: Tensor, own: Tensor, count: int, causal: bool) -> Tensor:
    """Which blocks of keys are kept, of scores `[B, H, queries, blocks]` for queries whose own
    blocks, `[queries]` or `[B, 1, queries]`, are kept in any case: the best `count` with it.
    """
    j, own = torch.arange(scores.shape[3], device=scores.device), own.unsqueeze(-1)
    rank = scores.detach().masked_fill(j == own, torch.inf)
    if causal:
        rank = rank.masked_fill(j > own, -torch.inf)
    best = rank.topk(min(count, len(j)), -1)
    kept = torch.zeros(rank.shape, dtype=torch.bool, device=scores.device)
    return kept.scatter(-1, best.indices, best.values > -torch.inf)


def _means(x: Tensor, size: int) -> Tensor:
    """The means of blocks of tokens, `[B, H, blocks, D]`."""
    x = x.transpose(1, 2)
    blocks = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).sum(3)
    counts = torch.full((blocks.shape[2], 1), size, device=x.device)
    if x.shape[2] % size:
        counts[-1] = x.shape[2] % size
    return blocks / counts


@dataclass(frozen=True)
class _Plan:
    """The dense problems of a pattern `[B, H, query blocks, key blocks]`, on blocks of `step` rows.
    Apart from whole blocks of keys come the diagonal, of which a causal query sees a part, and the
    last block where it is shorter.
    """

    kept: Tensor
    length: int
    block_size: int
    step: int
    causal: bool
    groups: int
    gated: bool

    def __call__(self) -> Iterator[Piece]:
        whole = self.kept.clone()
        if self.causal:
            keys = torch.arange(whole.shape[3], device=whole.device)
            whole &= keys < self.own[:, None]
        elif self.length % self.block_size:
            whole[..., -1] = False
        yield from self.by_keys(whole) if self.gated or self.sub > 1 else self.by_queries(whole)
        if self.causal:
            yield from self.diagonal()
        elif self.length % self.block_size:
            yield from self.last()

    @property
    def sub(self) -> int:
        """The number of query blocks in one key block."""
        return self.block_size // self.step

    @property
    def own(self) -> Tensor:
        """The block of keys that a block of queries lies in."""
        return torch.arange(self.kept.shape[2], device=self.kept.device) // self.sub

    def piece(self, head: Tensor, i: Tensor, j: Tensor, parts: int, **options: Any) -> Piece:
        """The problems of heads b H + h `[P]`, query blocks `[P, n]` and key blocks `[P, m]`; of
        each key block the first `parts` of its `sub` parts count. The gate is the one of the only
        key block.
        """
        queries, count = self.kept.shape[2:]
        padded, head = count * self.sub, head[:, None, None]
        heads = head * self.groups + torch.arange(self.groups, device=j.device)[:, None]
        fine = j[..., None] * self.sub + torch.arange(parts, device=j.device)
        gate = None
        if self.gated:
            gate = (head * queries + i[:, None]) * count + j[:, :1, None]
            gate = gate.expand(-1, self.groups, -1)
        q, k = heads * padded + i[:, None], head * padded + fine.flatten(1)[:, None]
        return Piece(q, k, gate=gate, repeated=True, **options)

    def chosen(self, where: Tensor) -> tuple[Tensor, Tensor]:
        """Heads `[P]` and blocks of queries `[P, 1]` of what is true in `[B, H, query blocks]`."""
        head, i = where.flatten(0, 1).nonzero().unbind(1)
        return head, i[:, None]

    def by_queries(self, kept: Tensor) -> Iterator[Piece]:
        """One dense problem per query block, batched over the query blocks that keep the same
        number of key blocks.
        """
        counts = kept.sum(-1)
        for count in counts.unique().tolist():
            if count:
                where = counts == count
                keys = kept[where].nonzero()[:, 1].view(-1, count)
                yield self.piece(*self.chosen(where), keys, self.sub)

    def by_keys(self, kept: Tensor) -> Iterator[Piece]:
        """Problems of one block of keys and several of queries that all chose it: in turn by the
        first block that each chose, the second, and so on, in runs of powers of four.
        """
        rank, keys = kept.cumsum(-1), kept.shape[3]
        for turn in range(1, int(rank.amax()) + 1 if rank.numel() else 1):
            head, i, j = (kept & (rank == turn)).flatten(0, 1).nonzero().unbind(1)
            pair, order = (head * keys + j).sort(stable=True)
            i, size = i[order], RUN
            while size:
                _, runs = pair.unique_consecutive(return_counts=True)
                place = torch.arange(len(pair), device=pair.device)
                place = place - (runs.cumsum(0) - runs).repeat_interleave(runs)
                taken = place < (runs // size * size).repeat_interleave(runs)
                if taken.any():
                    same = pair[taken][::size]
                    j = same[:, None] % keys
                    yield self.piece(same // keys, i[taken].view(-1, size), j, self.sub)
                pair, i, size = pair[~taken], i[~taken], size // 4

    def diagonal(self) -> Iterator[Piece]:
        """The queries' own rows, and the parts of their block before them."""
        queries = torch.arange(self.kept.shape[2], device=self.kept.device)
        kept = self.kept[:, :, queries, self.own]
        for before in range(self.sub):
            head, i = self.chosen(kept & (queries % self.sub == before))
            if len(head) and before:
                yield self.piece(head, i, self.own[i], before)
            if len(head):
                mine = self.piece(head, i, self.own[i], 1, causal=True)
                yield replace(mine, k=mine.k + before)

    def last(self) -> Iterator[Piece]:
        head, i = self.chosen(self.kept[..., -1])
        if len(head):
            j = torch.full_like(i, self.kept.shape[3] - 1)
            yield self.piece(head, i, j, self.sub, keys=self.length % self.block_size)


def _fold(x: Tensor, block_size: int, step: int) -> Tensor:
    """`[B, T, H, D]` as blocks of `step` rows `[B H blocks, step, D]`, zeros behind the last."""
    x = F.pad(pieces.compute(x).transpose(1, 2), (0, 0, 0, -x.shape[1] % block_size))
    return x.reshape(-1, step, x.shape[-1])


def _unfold(x: Tensor, like: Tensor) -> Tensor:
    """Blocks `[B H blocks, step, ...]` as `[B, T, H, ...]`."""
    B, T, H = like.shape[:3]
    padded = x.shape[0] * x.shape[1] // max(1, B * H)
    return x.reshape(B, H, padded, *x.shape[2:])[:, :, :T].transpose(1, 2).contiguous()


def _rows(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, gate: Tensor | None, sizes: Sequence[int],
    causal: bool,
) -> tuple[pieces.Blocks, _Plan]:  # fmt: skip
    block_size, step = sizes
    B, T, H = k.shape[:3]
    kept, groups = kept.expand(B, H, -1, -1), q.shape[2] // max(1, H)
    plan = _Plan(kept, T, block_size, step, causal, groups, gate is not None)
    q, k, v = (_fold(x, block_size, step) for x in (q, k, v))
    flat = None if gate is None else pieces.compute(gate).flatten()
    return pieces.Blocks(q, k, v, flat), plan


def _forward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, gate: Tensor | None, sizes: Sequence[int],
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, and the log-sum-exp `[B, T, HQ]`."""
    rows, plan = _rows(q, k, v, kept, gate, sizes, causal)
    o, lse = pieces.forward(rows, plan, scale)
    return _unfold(o, q).to(q.dtype), _unfold(lse, q)


def _empty(q, k, v, *rest):
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[-1]), lse


def _backward(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor,
    gate: Tensor | None, sizes: Sequence[int], causal: bool, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, none of what is kept, and of the gate (empty where there is none)."""
    rows, plan = _rows(q, k, v, kept, gate, sizes, causal)
    inner = (_fold(do, *sizes), rows, _fold(o, *sizes), _fold(lse[..., None], *sizes).squeeze(-1))
    found = pieces.backward(*inner, plan, scale)
    dgate = q.new_empty(0) if gate is None else found.pop().view(gate.shape)
    dq, dk, dv = (_unfold(g, x) for g, x in zip(found, (q, k, v), strict=True))
    return dq, dk, dv, torch.empty_like(kept), dgate


operator.define(
    "block_sparse_attention",
    Schema(
        "Tensor q, Tensor k, Tensor v, Tensor kept, Tensor? gate",
        "int[] sizes, bool causal, float scale",
        differentiable=1,
        saved=(0, 1),
        state=False,
    ),
    forward=_forward,
    fake=_empty,
    backward=_backward,
)


@checked
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to the blocks that a pattern keeps; o `[B, T, HQ, V]`, and with `return_lse` the
    log-sum-exp `[B, T, HQ]`, through which no gradient flows.

    `backend="flex"` runs torch's FlexAttention, which has no backward on CPUs. Inside
    `sequence_parallel` q, k, v are a rank's own tokens and the pattern is of the whole row; keys
    and values of all ranks are gathered.

    Raises `ValueError` where pattern and tensors do not fit.

    Example:
        >>> q, k, v = torch.randn(3, 1, 300, 2, 16).unbind()
        >>> pattern = local_window(300, 64, block_size=32, causal=True)
        >>> block_sparse_attention(q, k, v, pattern).shape, round(pattern.density(), 2)
        (torch.Size([1, 300, 2, 16]), 0.46)
    """
    op = "block_sparse_attention"
    sizes = check_shapes(op, q=(q, "B T HV K"), k=(k, "B T H K"), v=(v, "B T H V"))
    check_groups(op, sizes, "q")
    check_same(op, q=q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o, lse = KEPT_BLOCKS(op, backend, q, k, v, pattern, scale)
    return (o, lse) if return_lse else o


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float
) -> tuple[Tensor, Tensor]:
    _check_pattern(pattern, q, k, q.shape[1])
    return operator.call(
        "block_sparse_attention", q, k, v, pattern.kept.to(q.device), pattern.gate,
        [pattern.block_size, pattern.query_block], pattern.causal, scale,
    )  # fmt: skip


def _over_ranks(
    op: str, parallel: SequenceParallel, attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor,
    k: Tensor, v: Tensor, pattern: BlockPattern, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shard = parallel.of(op, q.shape[1])
    _check_pattern(pattern, q, k, shard.total)
    q, k, v = among_all(q, shard), all_gather(k, shard), all_gather(v, shard)
    with using(None):
        found = attend(q, k, v, pattern.only(shard.begin, shard.end), scale)
    o, lse = (tie(x[:, shard.begin : shard.end], k, v) for x in found)
    return o, lse


def _check_pattern(pattern: BlockPattern, q: Tensor, k: Tensor, T: int) -> None:
    op = "block_sparse_attention"
    if not isinstance(pattern, BlockPattern):
        raise ValueError(
            f"{op}: pattern is a {type(pattern).__name__}; pass a BlockPattern, such as "
            "local_window(T, 256)"
        )
    (B, H), (batch, heads) = pattern.kept.shape[:2], (k.shape[0], k.shape[2])
    if pattern.length != T or B not in (1, batch) or H not in (1, heads):
        raise ValueError(
            f"{op}: pattern is for {pattern.length} tokens, B={B} and H={H}, but q and k have "
            f"T={T}, B={batch} and H={heads} heads of k; make it for those (B and H may be 1)"
        )
    expected = (batch, heads, *pattern.kept.shape[2:])
    if pattern.gate is not None and pattern.gate.shape != expected:
        raise ValueError(
            f"{op}: the pattern's gate is {list(pattern.gate.shape)}; expected {list(expected)}"
        )


def _flex(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    if q.device.type == "cpu" and needs_gradient(q, k, v):
        raise ValueError(
            "block_sparse_attention: FlexAttention has no backward on CPUs; use "
            "backend='torch', or torch.no_grad()"
        )
    _check_pattern(pattern, q, k, q.shape[1])
    gate, step, size = pattern.gate, pattern.query_block, pattern.block_size
    groups = q.shape[2] // k.shape[2]

    def weigh(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score if gate is None else score + gate[b, h // groups, t // step, s // size]

    kept = pattern.kept.to(q.device)
    if kept.shape[1] > 1:
        kept = kept.repeat_interleave(groups, 1)
    mask = replace(pattern, kept=kept, gate=None).to_block_mask()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, aux = flex_attention(
        q, k, v, score_mod=weigh, block_mask=mask, scale=scale, enable_gqa=groups > 1,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert aux.lse is not None  # `return_aux` asks for it
    o, found = o.transpose(1, 2), aux.lse.transpose(1, 2)
    nothing = found == -torch.inf
    o = o.masked_fill(nothing.unsqueeze(-1), 0.0)
    return o, found


KEPT_BLOCKS = Stage(
    "block_sparse_attention",
    {
        "torch": Form(
            _attend,
            "dense pieces in torch's flash kernels (elsewhere in blocks), merged; backward by hand",
        ),
        "flex": Form(_flex, "torch's FlexAttention with a block mask"),
    },
    first_tensor,
    _over_ranks,
)
