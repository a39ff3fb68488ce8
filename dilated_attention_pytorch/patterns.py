# SPDX-License-Identifier: MIT
"""Patterns of blocks by name, as `fla.ops.block_sparse_attention.BlockPattern`."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch._arguments import choose
from fla.ops import block_sparse_attention as ours
from fla.ops.block_sparse_attention import BlockPattern


class PatternType(str, enum.Enum):
    """The patterns of `SparsePatternGenerator`; `BlockSparseAdaptive` learns a pattern."""

    LOCAL_WINDOW = "local_window"
    DILATED_SPARSE = "dilated_sparse"
    GLOBAL_LOCAL = "global_local"
    STRIDED = "strided"
    RANDOM = "random"
    HIERARCHICAL = "hierarchical"


@dataclass
class SparsePatternConfig:
    """Which blocks are kept.

    Fields:
        pattern_type: a name of `PatternType`.
        sparsity_ratio: the share of pairs of tokens kept at most: the pattern's reach grows until
            one step more would keep more (one step is kept in any case). Where absent, the sizes
            below decide, and `density` of the module says what came out.
        local_window_size: tokens on each side, for local_window and global_local; 512 if absent.
        global_tokens: tokens that all see and that see all, for global_local; at least one block.
        stride: blocks between those that strided and hierarchical keep.
        seed: of random.
    """

    pattern_type: str = "dilated_sparse"
    sparsity_ratio: float | None = None
    block_size: int = 128
    local_window_size: int | None = None
    global_tokens: int = 64
    stride: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        kind = getattr(self.pattern_type, "value", self.pattern_type)
        self.pattern_type = choose(owner, "pattern_type", kind, [x.value for x in PatternType])
        ratio = self.sparsity_ratio
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise ValueError(f"{owner}: sparsity_ratio is {ratio}; expected a share kept in (0, 1]")
        if ratio is not None and self.local_window_size is not None:
            raise ValueError(
                f"{owner}: sparsity_ratio={ratio} chooses the window that "
                f"local_window_size={self.local_window_size} gives; pass one of them"
            )


@dataclass
class PatternConfig(SparsePatternConfig):
    """`SparsePatternConfig` with the branches that dilated_sparse follows."""

    segment_lengths: list[int] = field(default_factory=lambda: [2048, 4096, 8192])
    dilation_rates: list[int] = field(default_factory=lambda: [1, 2, 4])


def _window(c: PatternConfig, n: int, reach: int | None, **options: Any) -> BlockPattern:
    return ours.local_window(n, _window_size(c, reach), **options)


def _global_local(c: PatternConfig, n: int, reach: int | None, **options: Any) -> BlockPattern:
    return ours.global_local(n, c.global_tokens, _window_size(c, reach), **options)


def _window_size(c: PatternConfig, reach: int | None) -> int:
    """The tokens of a local window: as many as `reach` blocks always hold, else the config's."""
    return (c.local_window_size or 512) if reach is None else (reach - 1) * c.block_size + 1


def _branches(c: PatternConfig, n: int, reach: int | None, **options: Any) -> BlockPattern:
    """Each branch (w, r) keeps the blocks whose distance is a multiple of r and below w tokens;
    with `reach` the longest w is that many blocks, and others keep their share of it.
    """
    size, longest = c.block_size, max(c.segment_lengths)
    share = 1.0 if reach is None else reach * size / longest
    blocks = torch.arange(-(-n // size))
    apart = (blocks[:, None] - blocks).abs()
    kept = apart == 0
    for w, r in zip(c.segment_lengths, c.dilation_rates, strict=True):
        kept = kept | ((apart % r == 0) & (apart * size < share * w))
    kept = kept.tril() if options["causal"] else kept
    return BlockPattern(kept[None, None], n, size, size, options["causal"])


def _strided(c: PatternConfig, n: int, reach: int | None, **options: Any) -> BlockPattern:
    stride = c.stride if reach is None else -(-n // c.block_size) // reach
    return ours.strided(n, max(1, stride), **options)


def _random(c: PatternConfig, n: int, reach: int | None, **options: Any) -> BlockPattern:
    own = ours.local_window(n, 1, **options)
    return ours.random_blocks(n, 3 if reach is None else reach, seed=c.seed, **options) | own


def _hierarchical(c: PatternConfig, n: int, reach: int | None, **options: Any) -> BlockPattern:
    levels = [(c.stride**i, (reach or 2) * c.stride**i) for i in range(3)]
    return ours.hierarchical(n, levels, **options)


KINDS: dict[str, Callable[..., BlockPattern]] = {
    "local_window": _window,
    "dilated_sparse": _branches,
    "global_local": _global_local,
    "strided": _strided,
    "random": _random,
    "hierarchical": _hierarchical,
}


class SparsePatternGenerator:
    """Patterns of a config.

    Example:
        >>> generator = SparsePatternGenerator(PatternConfig("local_window", 0.2, block_size=16))
        >>> generator.create_pattern(2048, causal=True).density() <= 0.2
        True
    """

    def __init__(self, config: PatternConfig):
        self.config = config

    def create_pattern(self, seq_len: int, causal: bool = False) -> BlockPattern:
        """The largest reach whose density stays below `sparsity_ratio`, or the config's own."""
        c = self.config
        make = partial(KINDS[c.pattern_type], c, seq_len, block_size=c.block_size, causal=causal)
        if c.sparsity_ratio is None:
            return make(None)
        low, high = 1, max(1, -(-seq_len // c.block_size))
        while low < high:
            middle = (low + high + 1) // 2
            fits = make(middle).density() <= c.sparsity_ratio
            low, high = (middle, high) if fits else (low, middle - 1)
        return make(low)


class PatternQualityAnalyzer:
    """How much of dense attention a pattern keeps."""

    def analyze(self, pattern: BlockPattern, q: Tensor, k: Tensor) -> dict[str, float]:
        """`density`, and the softmax weights of q, k `[B, T, H, D]` that lie on kept pairs: their
        mean over tokens (`mass`) and the worst token's (`least_mass`).
        """
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        if pattern.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        mass = (scores.softmax(-1) * pattern.dense().to(q.device)).sum(-1)
        return {
            "density": pattern.density(),
            "mass": mass.mean().item(),
            "least_mass": mass.min().item(),
        }


class PatternOptimizer:
    """Chooses among pattern types by what they keep of dense attention."""

    def __init__(self, config: PatternConfig):
        if config.sparsity_ratio is None:
            raise ValueError(
                "PatternOptimizer: config.sparsity_ratio is None; the share kept at most is what "
                "makes pattern types comparable, so pass one"
            )
        self.config = config

    def optimize(self, q: Tensor, k: Tensor, causal: bool = False) -> BlockPattern:
        """The pattern of the type that keeps the largest weights at no more than that density."""
        patterns = []
        for kind in KINDS:
            made = SparsePatternGenerator(replace(self.config, pattern_type=kind))
            patterns.append(made.create_pattern(q.shape[1], causal))
        analyzer, most = PatternQualityAnalyzer(), self.config.sparsity_ratio or 0.0
        least = min(patterns, key=BlockPattern.density)
        patterns = [pattern for pattern in patterns if pattern.density() <= most] or [least]
        return max(patterns, key=lambda pattern: analyzer.analyze(pattern, q, k)["mass"])
