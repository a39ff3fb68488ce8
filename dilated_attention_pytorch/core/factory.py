# SPDX-License-Identifier: MIT
"""Attention by name. A class, called, is shorter; these are for code that has the names."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import nn

from dilated_attention_pytorch._arguments import choose
from dilated_attention_pytorch.adaptive import AdaptiveConfig, create_adaptive_block_sparse
from dilated_attention_pytorch.block_sparse import (
    BlockSparseRingDilatedAttention,
    BlockSparseRingDistributedDilatedAttention,
)
from dilated_attention_pytorch.core.config import (
    DilatedAttentionConfig,
    MultiheadConfig,
    SparseAttentionConfig,
)
from dilated_attention_pytorch.dilated_attention import (
    DilatedAttention,
    DistributedImprovedDilatedAttention,
    ImprovedDilatedAttention,
    MultiheadDilatedAttention,
)
from dilated_attention_pytorch.patterns import SparsePatternConfig
from dilated_attention_pytorch.ring import RingDilatedAttention

ATTENTION: dict[str, type[nn.Module]] = {
    "auto": DilatedAttention,
    "standard": DilatedAttention,
    "improved": ImprovedDilatedAttention,
    "ring": RingDilatedAttention,
    "ring_distributed": RingDilatedAttention,
    "distributed": DistributedImprovedDilatedAttention,
    "improved_distributed": DistributedImprovedDilatedAttention,
    "block_sparse": BlockSparseRingDilatedAttention,
    "block_sparse_ring": BlockSparseRingDilatedAttention,
    "block_sparse_ring_distributed": BlockSparseRingDistributedDilatedAttention,
}
MULTIHEAD: dict[str, type[nn.Module]] = {}
PREFIX = "multihead_"


def register_attention(name: str, attention: type[nn.Module]) -> None:
    """Make `create_dilated_attention(name)` build this class."""
    ATTENTION[name] = attention


def register_multihead_attention(name: str, attention: type[nn.Module]) -> None:
    """Make `create_multihead_dilated_attention(name)` build this class."""
    MULTIHEAD[name.removeprefix(PREFIX)] = attention


def create_dilated_attention(
    attention_type: str = "auto",
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """The class of that name, with these branches ([2048, 4096, 8192], [1, 2, 4] if absent) and
    its further arguments; "auto" is `DilatedAttention`.

    Example:
        >>> type(create_dilated_attention("ring", [16, 32], [1, 2])).__name__
        'RingDilatedAttention'
    """
    owner = "create_dilated_attention"
    kind = choose(owner, "attention_type", attention_type, ATTENTION)
    d = DilatedAttentionConfig()
    return ATTENTION[kind](
        list(segment_lengths or d.segment_lengths), list(dilation_rates or d.dilation_rates),
        **options,
    )  # fmt: skip


def _set_fields(config: DilatedAttentionConfig | None) -> dict[str, Any]:
    """Arguments of an attention: the fields of its config that are not the defaults, but for the
    branches; one that the attention does not take is a `TypeError` there.
    """
    if config is None:
        return {}
    branches = ("segment_lengths", "dilation_rates")
    own = {f.name: (getattr(config, f.name), f.default) for f in fields(config)}
    given = {n: x for n, (x, default) in own.items() if n not in branches and x != default}
    if isinstance(config, SparseAttentionConfig):
        names = ("pattern_type", "sparsity_ratio", "block_size")
        given = {n: x for n, x in given.items() if n not in names}
        sizes = {n: getattr(config, n) for n in names}
        given["sparse_config"] = SparsePatternConfig(**sizes)
    return given


def create_multihead_dilated_attention(
    attention_type: str = "auto",
    embed_dim: int = 768,
    num_heads: int = 12,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    *,
    multihead_config: MultiheadConfig | None = None,
    attention_config: DilatedAttentionConfig | None = None,
    **options: Any,
) -> nn.Module:
    """`MultiheadDilatedAttention` around the attention of that name. A config gives the arguments
    of its part, which are then not given beside it; further ones go to the attention where they are
    none of `MultiheadConfig`'s.

    Example:
        >>> attention = create_multihead_dilated_attention("improved", 32, 4, [16, 32], [1, 2])
        >>> type(attention.attention).__name__
        'ImprovedDilatedAttention'
    """
    owner = "create_multihead_dilated_attention"
    name = attention_type.removeprefix(PREFIX)
    kind = choose(owner, "attention_type", name, set(ATTENTION) | set(MULTIHEAD))
    d = attention_config or DilatedAttentionConfig()
    lengths, rates = segment_lengths or d.segment_lengths, dilation_rates or d.dilation_rates
    names = {f.name for f in fields(MultiheadConfig)}
    if multihead_config is not None and (embed_dim, num_heads) != (768, 12):
        raise ValueError(
            f"{owner}: embed_dim={embed_dim}, num_heads={num_heads} beside multihead_config, which "
            "has its own; pass one of them"
        )
    around = asdict(multihead_config or MultiheadConfig(embed_dim, num_heads))
    around |= {n: x for n, x in options.items() if n in names}
    inside = _set_fields(attention_config) | {n: x for n, x in options.items() if n not in names}
    if kind in MULTIHEAD:
        return MULTIHEAD[kind](dilation_rates=rates, segment_lengths=lengths, **around, **inside)
    if kind in ("auto", "standard") and "dropout" in inside:
        inside["attention_dropout"] = inside.pop("dropout")
    inner = create_dilated_attention(kind, lengths, rates, **inside)
    return MultiheadDilatedAttention(
        dilation_rates=rates, segment_lengths=lengths, attention=inner, **around
    )


def create_block_sparse_attention(
    sparsity_ratio: float = 0.9,
    pattern_type: str = "dilated_sparse",
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    block_size: int = 128,
    **options: Any,
) -> nn.Module:
    """`BlockSparseRingDilatedAttention` that leaves out at least `sparsity_ratio` of the pairs
    (here the share left out, in `SparsePatternConfig` the share kept, as in the package).

    Example:
        >>> attention = create_block_sparse_attention(0.8, "local_window", [512], [1], block_size=8)
        >>> 0.15 < attention.density(1024) <= 0.2
        True
    """
    if not 0.0 <= sparsity_ratio < 1.0:
        raise ValueError(
            f"create_block_sparse_attention: sparsity_ratio is {sparsity_ratio}; expected the "
            "share left out, from 0 to below 1"
        )
    config = SparsePatternConfig(pattern_type, 1.0 - sparsity_ratio, block_size)
    return create_dilated_attention(
        "block_sparse", segment_lengths, dilation_rates, sparse_config=config, **options
    )


def create_adaptive_sparse_attention(
    embed_dim: int, num_heads: int, sparsity: float = 0.9, block_size: int = 64, **options: Any
) -> nn.Module:
    """Projections around `BlockSparseAdaptive`, which leaves out `sparsity` of the blocks. The
    package's `min_sparsity` and `max_sparsity` are one number here: the share is not learned.
    """
    config = AdaptiveConfig(base_sparsity=sparsity, block_size=block_size)
    return create_adaptive_block_sparse(embed_dim, num_heads, config, **options)
