# SPDX-License-Identifier: MIT
"""Block-sparse attention as modules, on `fla.ops.block_sparse_attention`: one softmax over all kept
blocks, in the place of the package's sum of softmaxes of single blocks.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch._arguments import (
    check_dropout,
    check_input,
    check_placement,
    choose,
    no_effect,
    no_pool,
    over_ranks,
    refuse,
    rows_apart,
)
from dilated_attention_pytorch.dilated_attention import MultiheadDilatedAttention
from dilated_attention_pytorch.patterns import (
    PatternConfig,
    SparsePatternConfig,
    SparsePatternGenerator,
)
from fla.core.parallel import current
from fla.ops.block_sparse_attention import BlockPattern, block_sparse_attention, hierarchical


class BlockSparseRingDilatedAttention(nn.Module):
    """Attention to the blocks a pattern keeps, on `[batch, tokens, heads, channels]`, under one
    softmax. The branches (lengths, rates) are those of the pattern "dilated_sparse". Where several
    processes run, each passes its own tokens; keys and values of all are gathered.

    Differs from the package of this name: rows of weights sum to 1 (there to the number of blocks),
    causal is causal, any length runs, `sparsity_ratio` counts, and `density(tokens)` measures.
    `attention_mask` `[batch, tokens]` is True where a token is real.

    Example:
        >>> config = SparsePatternConfig("local_window", block_size=16, local_window_size=32)
        >>> attention = BlockSparseRingDilatedAttention([64], [1], config)
        >>> q, k, v = torch.randn(3, 2, 100, 4, 8).unbind()
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 100, 4, 8])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        sparse_config: SparsePatternConfig | None = None,
        dropout: float = 0.0,
        ring_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        enable_memory_pool: bool = False,
        enable_profiling: bool = False,
    ):
        super().__init__()
        self.owner = type(self).__name__
        no_pool(
            self.owner, enable_memory_pool=(enable_memory_pool, False),
            enable_profiling=(enable_profiling, False),
        )  # fmt: skip
        given = sparse_config or SparsePatternConfig()
        named = {f.name: getattr(given, f.name) for f in fields(SparsePatternConfig)}
        self.sparse_config = PatternConfig(
            **named, segment_lengths=list(segment_lengths), dilation_rates=list(dilation_rates)
        )
        self.dropout = check_dropout(self.owner, dropout)
        self.ring_size, self.device, self.dtype = ring_size, device, dtype

    def pattern(self, tokens: int, is_causal: bool = False) -> BlockPattern:
        return SparsePatternGenerator(self.sparse_config).create_pattern(tokens, is_causal)

    def density(self, tokens: int, is_causal: bool = False) -> float:
        """Share of the pairs of tokens that are kept."""
        return self.pattern(tokens, is_causal).density()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        parallel = current()
        tokens = q.shape[1] if parallel is None else parallel.of(self.owner, q.shape[1]).total
        o = block_sparse_attention(q, k, v, self.pattern(tokens, is_causal))
        assert isinstance(o, Tensor)
        return o

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        return_attention_weights: bool = False,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """o, or with `return_attention_weights` also the weights `[batch, heads, tokens, tokens]`,
        computed densely for it.
        """
        check_input(self.owner, q, k, v)
        check_placement(self.owner, q, self.device, self.dtype)
        dropout = self.dropout if self.training else 0.0
        with over_ranks(self.owner, self.ring_size, dropout) as several:
            if several:
                refuse(
                    self.owner, "it is for one process", attention_mask=attention_mask is not None,
                    return_attention_weights=return_attention_weights,
                )  # fmt: skip
            o = rows_apart(
                self.owner, lambda q, k, v: self._attend(q, k, v, is_causal), q, k, v,
                attention_mask,
            )  # fmt: skip
        o = F.dropout(o, dropout, self.training)
        if not return_attention_weights:
            return o
        refuse(self.owner, "drop padding first", attention_mask=attention_mask is not None)
        return o, _weights(q, k, self.pattern(q.shape[1], is_causal))


def _weights(q: Tensor, k: Tensor, pattern: BlockPattern) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~pattern.dense().to(q.device), -torch.inf).softmax(-1)


class BlockSparseOptimized(BlockSparseRingDilatedAttention):
    """`BlockSparseRingDilatedAttention`: blocks of one pattern already run together."""

    def __init__(
        self, *args: Any, enable_batched_ops: bool = True, cache_size: int = 100, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        no_effect(
            self.owner, "blocks always run together, and patterns are cheap to make",
            enable_batched_ops=(enable_batched_ops, True), cache_size=(cache_size, 100),
        )  # fmt: skip


class BlockSparseTorchSparse(BlockSparseRingDilatedAttention):
    """`BlockSparseRingDilatedAttention`; torch's sparse tensors have no attention, so none is used
    (`fla.ops.block_sparse_attention(..., backend="flex")` runs torch's FlexAttention).
    """

    def __init__(
        self, *args: Any, use_sparse_backend: bool = True, sparse_threshold: float = 0.8,
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        no_effect(
            self.owner, "only kept blocks are computed, at any density",
            use_sparse_backend=(use_sparse_backend, True),
            sparse_threshold=(sparse_threshold, 0.8),
        )  # fmt: skip


@dataclass
class HierarchicalConfig:
    """Levels, each `{"stride", "window_size", "block_size"}` in tokens: of the blocks, every one
    whose number is a multiple of stride / block_size, up to window_size tokens away (-1: all).
    """

    level_configs: list[dict[str, int]] = field(
        default_factory=lambda: [
            {"stride": 64, "window_size": 256, "block_size": 64},
            {"stride": 256, "window_size": 1024, "block_size": 64},
            {"stride": 1024, "window_size": -1, "block_size": 64},
        ]
    )

    def __post_init__(self) -> None:
        sizes = {level["block_size"] for level in self.level_configs}
        if len(sizes) != 1 or any(x["stride"] % x["block_size"] for x in self.level_configs):
            raise ValueError(
                f"HierarchicalConfig: levels {self.level_configs}; expected one block_size for "
                "all, which divides every stride"
            )


def get_hierarchical_presets() -> dict[str, HierarchicalConfig]:
    """Four choices of levels: standard, fine_grained, long_range, ultra_sparse.

    Example:
        >>> sorted(get_hierarchical_presets())
        ['fine_grained', 'long_range', 'standard', 'ultra_sparse']
    """
    levels = {
        "standard": [(64, 256, 64), (256, 1024, 64), (1024, -1, 64)],
        "fine_grained": [(32, 256, 32), (64, 512, 32), (256, 2048, 32), (1024, -1, 32)],
        "long_range": [(128, 512, 128), (512, 4096, 128), (1024, -1, 128)],
        "ultra_sparse": [(64, 128, 64), (1024, 4096, 64), (4096, -1, 64)],
    }
    names = ("stride", "window_size", "block_size")
    return {
        name: HierarchicalConfig([dict(zip(names, level, strict=True)) for level in rows])
        for name, rows in levels.items()
    }


class BlockSparseHierarchical(BlockSparseRingDilatedAttention):
    """Keeps near blocks densely and far ones thinly, by the levels of a `HierarchicalConfig`, which
    take the place of the branches.

    Differs from the package of this name: every row sees all levels, whichever row it is.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        hierarchical_config: HierarchicalConfig | None = None,
        **kwargs: Any,
    ):
        super().__init__(segment_lengths, dilation_rates, **kwargs)
        self.levels = (hierarchical_config or HierarchicalConfig()).level_configs

    def pattern(self, tokens: int, is_causal: bool = False) -> BlockPattern:
        size = self.levels[0]["block_size"]
        blocks = -(-tokens // size)
        levels = [
            (x["stride"] // size, blocks if x["window_size"] < 0 else x["window_size"] // size)
            for x in self.levels
        ]
        return hierarchical(tokens, levels, block_size=size, causal=is_causal)


class DistributedSparsePattern(str, enum.Enum):
    """The patterns over several processes; the package never defined its two others."""

    HIERARCHICAL = "hierarchical"
    NODE_LOCAL = "node_local"


@dataclass
class DistributedSparseConfig:
    """Fields: `pattern_type` of `DistributedSparsePattern`; `sparsity_ratio` and `block_size` as in
    `SparsePatternConfig`.
    """

    pattern_type: str = "hierarchical"
    sparsity_ratio: float | None = None
    block_size: int = 128

    def __post_init__(self) -> None:
        kind = getattr(self.pattern_type, "value", self.pattern_type)
        known = [x.value for x in DistributedSparsePattern]
        self.pattern_type = choose("DistributedSparseConfig", "pattern_type", kind, known)


class BlockSparseRingDistributedDilatedAttention(BlockSparseRingDilatedAttention):
    """`BlockSparseRingDilatedAttention` over all processes; "node_local" is a window."""

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        distributed_config: DistributedSparseConfig | None = None,
        **kwargs: Any,
    ):
        c = distributed_config or DistributedSparseConfig()
        kind = {"node_local": "local_window"}.get(c.pattern_type, c.pattern_type)
        config = SparsePatternConfig(kind, c.sparsity_ratio, c.block_size)
        super().__init__(segment_lengths, dilation_rates, config, **kwargs)


class BlockSparseRingMultiheadDilatedAttention(MultiheadDilatedAttention):
    """Projections around `BlockSparseRingDilatedAttention`, on `[batch, tokens, embed_dim]`;
    returns as `MultiheadDilatedAttention` does. No norm before `out_proj`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        sparse_config: SparsePatternConfig | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        refuse(
            type(self).__name__, "transpose to [batch, tokens, channels]",
            batch_first=None if batch_first else "False",
        )  # fmt: skip
        inner = BlockSparseRingDilatedAttention(
            segment_lengths, dilation_rates, sparse_config, dropout
        )
        super().__init__(
            embed_dim, num_heads, dilation_rates, segment_lengths, bias=bias, layer_norm=False,
            device=device, dtype=dtype, attention=inner,
        )  # fmt: skip


def create_hierarchical_attention(
    embed_dim: int,
    num_heads: int,
    hierarchical_config: HierarchicalConfig | None = None,
    dropout: float = 0.0,
) -> MultiheadDilatedAttention:
    """Projections around `BlockSparseHierarchical`."""
    inner = BlockSparseHierarchical([2048], [1], hierarchical_config, dropout=dropout)
    return MultiheadDilatedAttention(
        embed_dim, num_heads, [1], [2048], layer_norm=False, attention=inner
    )
