# SPDX-License-Identifier: MIT
"""Block-sparse attention whose blocks are chosen by a learned score: the score of a chosen block
enters its logits, so it has a gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch._arguments import check_dropout, check_input, refuse, rows_apart
from dilated_attention_pytorch.dilated_attention import MultiheadDilatedAttention
from fla.ops.block_sparse_attention import BlockPattern, block_sparse_attention, topk_content


@dataclass
class AdaptiveConfig:
    """Fields:
    base_sparsity: share of the blocks left out; at least the own one is kept.
    temperature, learnable_temperature, min_temperature: scores are divided by it.
    hidden_dim, num_layers, share_across_heads: of the `ImportanceScorer`.
    block_size: tokens of a block.
    sparsity_reg_weight, hard_sparsity: only 0 and True are possible, since the number of blocks
        is given: there is no share left for a penalty to change.
    """

    base_sparsity: float = 0.9
    temperature: float = 1.0
    learnable_temperature: bool = True
    min_temperature: float = 0.1
    hidden_dim: int = 128
    num_layers: int = 2
    share_across_heads: bool = False
    sparsity_reg_weight: float = 0.0
    hard_sparsity: bool = True
    block_size: int = 64

    def __post_init__(self) -> None:
        if not 0.0 <= self.base_sparsity < 1.0:
            raise ValueError(
                f"AdaptiveConfig: base_sparsity is {self.base_sparsity}; expected the share of "
                "blocks left out, from 0 to below 1"
            )
        refuse(
            "AdaptiveConfig", "the share of blocks is given by base_sparsity",
            sparsity_reg_weight=self.sparsity_reg_weight or None,
            hard_sparsity=None if self.hard_sparsity else "False",
        )  # fmt: skip


class ImportanceScorer(nn.Module):
    """Queries and keys `[..., head_dim]` as vectors whose product scores a block: an MLP each,
    through which the choice learns.
    """

    def __init__(self, head_dim: int, hidden_dim: int = 128, num_layers: int = 2):
        super().__init__()
        widths = [head_dim] + [hidden_dim] * (num_layers - 1) + [head_dim]

        def mlp() -> nn.Sequential:
            layers: list[nn.Module] = []
            for a, b in pairwise(widths):
                layers += [nn.Linear(a, b), nn.GELU()]
            return nn.Sequential(*layers[:-1])

        self.query, self.key = mlp(), mlp()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(q), self.key(k)


class BlockSparseAdaptive(nn.Module):
    """Attention to the own block and to those with the best learned scores, on `[batch, tokens,
    heads, channels]`; the score of another block is added to its logits (as `logsigmoid`), through
    which scorer and temperature have a gradient.

    `segment_lengths` and `dilation_rates` are kept and bound nothing: what is seen is chosen.

    Differs from the package of this name, where they had none and one choice served the whole
    batch. If causal a block of queries chooses by its first token, and sees no later one.

    Example:
        >>> attention = BlockSparseAdaptive([64], [1], 4, 8, AdaptiveConfig(0.5, block_size=16))
        >>> q, k, v = torch.randn(3, 2, 100, 4, 8).unbind()
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 100, 4, 8])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        num_heads: int,
        head_dim: int,
        adaptive_config: AdaptiveConfig | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        c = self.config = adaptive_config or AdaptiveConfig()
        self.segment_lengths, self.dilation_rates = list(segment_lengths), list(dilation_rates)
        self.dropout = check_dropout("BlockSparseAdaptive", dropout)
        self.scorers = nn.ModuleList(
            ImportanceScorer(head_dim, c.hidden_dim, c.num_layers)
            for _ in range(1 if c.share_across_heads else num_heads)
        )
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(c.temperature)), requires_grad=c.learnable_temperature
        )

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp().clamp(min=self.config.min_temperature)

    def pattern(self, q: Tensor, k: Tensor, is_causal: bool = False) -> BlockPattern:
        """The blocks that q and k choose, with their gate."""
        c, size = self.config, self.config.block_size
        each = [(q, k)] if c.share_across_heads else zip(q.split(1, 2), k.split(1, 2), strict=True)
        scored = [scorer(*heads) for scorer, heads in zip(self.scorers, each, strict=True)]
        asks, answers = (torch.cat(x, 2) for x in zip(*scored, strict=True))
        blocks = -(-q.shape[1] // size)
        count = max(1, round((1.0 - c.base_sparsity) * blocks))
        return topk_content(
            asks / self.temperature, answers, count, block_size=size, causal=is_causal, gated=True
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        o = block_sparse_attention(q, k, v, self.pattern(q, k, is_causal))
        assert isinstance(o, Tensor)
        return o

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        return_pattern: bool = False,
        attention_mask: Tensor | None = None,
    ) -> Any:
        check_input("BlockSparseAdaptive", q, k, v)
        o = rows_apart(
            "BlockSparseAdaptive", lambda q, k, v: self._attend(q, k, v, is_causal), q, k, v,
            attention_mask,
        )  # fmt: skip
        o = F.dropout(o, self.dropout, self.training)
        return (o, self.pattern(q, k, is_causal)) if return_pattern else o


class AdaptiveSparsityTrainer:
    """Lowers the temperature of every `BlockSparseAdaptive` of a model, by the same factor at every
    `step()`, from `initial_temperature` to `final_temperature`.

    Example:
        >>> attention = BlockSparseAdaptive([64], [1], 2, 8)
        >>> schedule = AdaptiveSparsityTrainer(attention, 1.0, 0.25, annealing_steps=2)
        >>> schedule.step(), schedule.step()
        (0.5, 0.25)
    """

    def __init__(
        self,
        model: nn.Module,
        initial_temperature: float = 1.0,
        final_temperature: float = 0.1,
        annealing_steps: int = 10000,
    ):
        self.parts = [x for x in model.modules() if isinstance(x, BlockSparseAdaptive)]
        if not self.parts:
            raise ValueError("AdaptiveSparsityTrainer: model holds no BlockSparseAdaptive")
        self.ends = (initial_temperature, final_temperature)
        self.steps, self.done = annealing_steps, 0
        self._set(initial_temperature)

    def _set(self, temperature: float) -> float:
        for part in self.parts:
            with torch.no_grad():
                part.log_temperature.fill_(math.log(temperature))
        return temperature

    def step(self) -> float:
        """Take one step; returns the temperature that it sets."""
        self.done = min(self.done + 1, self.steps)
        first, last = self.ends
        return self._set(first * (last / first) ** (self.done / self.steps))


def create_adaptive_block_sparse(
    embed_dim: int,
    num_heads: int,
    adaptive_config: AdaptiveConfig | None = None,
    dropout: float = 0.0,
) -> MultiheadDilatedAttention:
    """Projections around `BlockSparseAdaptive`."""
    inner = BlockSparseAdaptive(
        [2048], [1], num_heads, embed_dim // num_heads, adaptive_config, dropout
    )
    return MultiheadDilatedAttention(
        embed_dim, num_heads, [1], [2048], layer_norm=False, attention=inner
    )
