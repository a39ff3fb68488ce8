# SPDX-License-Identifier: MIT
"""Block-sparse attention: a fixed pattern of blocks, or the blocks a token chooses (MoBA)."""

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fla.core.layout import SequenceLayout
from fla.core.parallel import refuse_sharded, tie, using
from fla.layers.attn import Attention, Where
from fla.ops import block_sparse_attention as page
from fla.ops.block_sparse_attention import BlockPattern, block_sparse_attention
from fla.ops.engine.attention.sharded import all_gather, among_all

PATTERNS: dict[str, Callable[..., BlockPattern]] = {
    f.__name__: f
    for f in (
        page.local_window,
        page.strided,
        page.dilated,
        page.global_local,
        page.hierarchical,
        page.random_blocks,
        page.big_bird,
        page.topk_content,
    )
}
OF_THE_LAYER = {"n", "q", "k", "block_size", "causal", "query_block", "gated"}


class BlockSparseAttention(Attention):
    """`fla.ops.block_sparse_attention` on `[B, T, hidden_size]`, with rotary positions.

    `pattern` names a function of that page and `pattern_options` are its arguments, in tokens or
    blocks as it says. "topk_content" chooses by content: every token of a causal layer for itself,
    as MoBA, by the mean of the queries of a key's group. `causal=False` has no cache.

    Example:
        >>> layer = BlockSparseAttention(64, 4, pattern_options=dict(window=32), block_size=16)
        >>> layer(torch.randn(2, 50, 64))[0].shape
        torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        pattern: str = "local_window",
        pattern_options: dict[str, Any] | None = None,
        block_size: int = 128,
        causal: bool = True,
        qkv_bias: bool = False,
        qk_norm: bool | str = False,
        rope_theta: float | None = 10000.0,
        head_dim: int | None = None,
        layer_idx: int | None = None,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            qkv_bias,
            qk_norm,
            rope_theta=rope_theta,
            head_dim=head_dim,
            layer_idx=layer_idx,
        )
        self.options = dict(pattern_options or {})
        self.pattern, self.block_size, self.causal = pattern, block_size, causal
        self._check()

    def _check(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(
                f"BlockSparseAttention: pattern is {self.pattern!r}; expected one of "
                f"{', '.join(PATTERNS)}"
            )
        arguments = inspect.signature(PATTERNS[self.pattern]).parameters.values()
        known = {a.name: a.default for a in arguments if a.name not in OF_THE_LAYER}
        needed = {name for name, default in known.items() if default is inspect.Parameter.empty}
        if not needed <= set(self.options) <= set(known):
            raise ValueError(
                f"BlockSparseAttention: pattern_options of {self.pattern} are {self.options}; "
                f"expected {', '.join(known)}"
                + (f", at least {', '.join(needed)}" if needed else "")
            )

    @property
    def by_content(self) -> bool:
        return self.pattern == "topk_content"

    def pattern_of(self, length: int) -> BlockPattern:
        """The fixed pattern for a sequence of `length` tokens."""
        options = dict(block_size=self.block_size, causal=self.causal)
        return PATTERNS[self.pattern](length, **self.options, **options)

    def _asks(self, q: Tensor) -> Tensor:
        """The queries that choose for a head of k, `[B, T, H, D]`."""
        return q.unflatten(2, (self.num_kv_heads, -1)).mean(3)

    def _sequences(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        shard = layout.shard
        if shard is None:
            return super()._sequences(q, k, v, layout)
        if self.by_content and not self.causal:
            refuse_sharded("BlockSparseAttention", "its blocks are chosen by means over all ranks")
        q, k, v = among_all(q, shard), all_gather(k, shard), all_gather(v, shard)
        parts = [q.new_empty(len(q), 0, *q.shape[2:])]
        with using(None):
            for a, b in pairwise(shard.bounds("BlockSparseAttention", layout.cu_seqlens)):
                own = (max(shard.begin, a) - a, min(shard.end, b) - a)
                if own[0] < own[1]:
                    o = self._whole(q[:, a:b], k[:, a:b], v[:, a:b], own)
                    parts.append(o[:, own[0] : own[1]])
        return tie(torch.cat(parts, 1), k, v)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, own: tuple[int, int] | None = None) -> Tensor:
        """`own` are the queries whose results are wanted; all if absent."""
        if self.by_content:
            pattern = page.topk_content(
                self._asks(q),
                k,
                **self.options,
                block_size=self.block_size,
                query_block=1 if self.causal else None,
                causal=self.causal,
            )
        else:
            pattern = self.pattern_of(q.shape[1])
        o = block_sparse_attention(q, k, v, pattern if own is None else pattern.only(*own))
        assert isinstance(o, Tensor)
        return o

    def _look(self, q: Tensor, k: Tensor, v: Tensor, where: Where | None) -> Tensor:
        if not self.causal:
            raise ValueError(
                "BlockSparseAttention: causal=False looks at tokens that a cache does not hold "
                "yet; pass use_cache=False"
            )
        return super()._look(q, k, v, where)

    def _blocks(self, positions: Tensor) -> Tensor:
        return positions.clamp(min=0) // self.block_size

    def _sees(self, query: Tensor, key: Tensor) -> Tensor:
        visible = key <= query
        if self.by_content:  # `_mask` asks what is chosen
            return visible
        kept = self.pattern_of(key.shape[-1]).kept[0, 0].to(key.device)
        return visible & kept[self._blocks(query).clamp(max=len(kept) - 1), self._blocks(key)]

    def _mask(self, where: Where, q: Tensor, k: Tensor) -> Tensor:
        mask = super()._mask(where, q, k)
        if not self.by_content:
            return mask
        block = self._blocks(where.keys).expand(len(k), -1)
        there = (where.keys >= 0).expand(len(k), -1)
        count = int(block.max()) + 1
        sums = k.new_zeros(len(k), count, *k.shape[2:])
        at = block[:, :, None, None].expand_as(k)
        sums = sums.scatter_add(1, at, k.masked_fill(~there[:, :, None, None], 0.0))
        sizes = torch.zeros(len(k), count, device=k.device).scatter_add(1, block, there.float())
        means = (sums / sizes.clamp(min=1)[:, :, None, None]).transpose(1, 2)
        scores = self._asks(q).transpose(1, 2) @ means.to(q.dtype).mT / math.sqrt(self.head_dim)
        own = self._blocks(where.queries).clamp(max=count - 1).unsqueeze(1)
        kept = page.choose(scores, own, self.options["count"], True)
        seen = kept.gather(-1, block[:, None, None].expand(*kept.shape[:3], -1))
        groups = self.num_heads // self.num_kv_heads
        mask = mask & seen.repeat_interleave(groups, 1)
        if where.real is None:
            return mask
        return mask | ~where.real[:, None, :, None]
