# SPDX-License-Identifier: MIT
"""Dilated attention whose tokens lie on several processes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch._arguments import (
    check_input,
    check_placement,
    no_effect,
    no_pool,
    over_ranks,
)
from dilated_attention_pytorch.core.config import RingAttentionConfig
from dilated_attention_pytorch.dilated_attention import DilatedAttention


class RingDilatedAttention(DilatedAttention):
    """Exact dilated attention over the processes of `torch.distributed`: each passes its own
    tokens `[batch, tokens, heads, channels]`, in rank order, and gets theirs; keys and values that
    its queries meet come round from one rank after the other. On one process it is
    `DilatedAttention`. Shards may be of any length; gradients are exact.

    Differs from the package of this name, whose ranks each hold the whole sequence and compute all
    of it. `ring_size` must be the number of processes: no ring is simulated.

    Example:
        >>> attention = RingDilatedAttention([16, 32], [1, 2])
        >>> q, k, v = torch.randn(3, 2, 50, 4, 8).unbind()
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 50, 4, 8])
    """

    mode = "ring"

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        ring_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        enable_memory_pool: bool = False,
        enable_profiling: bool = False,
        lightweight_pool: bool = True,
        use_pattern_cache: bool = True,
        memory_pool_threshold_mb: float = 16.0,
    ):
        super().__init__(
            segment_lengths, dilation_rates, None, dropout, None, enable_memory_pool,
            enable_profiling, lightweight_pool, device, dtype,
        )  # fmt: skip
        no_pool(
            self.owner, use_pattern_cache=(use_pattern_cache, True),
            memory_pool_threshold_mb=(memory_pool_threshold_mb, 16.0),
        )  # fmt: skip
        self.ring_size = ring_size

    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False
    ) -> Tensor:
        check_input(self.owner, q, k, v)
        check_placement(self.owner, q, self.device, self.dtype)
        dropout = self.dropout if self.training else 0.0
        with over_ranks(self.owner, self.ring_size, dropout) as several:
            o = self._attend(q, k, v, is_causal, self.mode if several else None)
        return F.dropout(o, dropout, self.training)


class RingDilatedAttentionV2(RingDilatedAttention):
    """`RingDilatedAttention`."""


class RingDilatedAttentionV2Collective(RingDilatedAttention):
    """`RingDilatedAttention` whose keys and values come from all ranks at once."""

    mode = "gather"


class RingDilatedAttentionV2Flash(RingDilatedAttention):
    """`RingDilatedAttention`, which runs torch's flash kernels wherever they can."""

    def __init__(
        self, *args: Any, use_flash_attention: bool = True, flash_chunk_size: int = 2048,
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        no_effect(
            self.owner, "torch chooses the kernel and its tiles; leave it out",
            use_flash_attention=(use_flash_attention, True),
            flash_chunk_size=(flash_chunk_size, 2048),
        )  # fmt: skip


class RingDilatedAttentionProduction(RingDilatedAttention):
    """`RingDilatedAttention` of a `RingAttentionConfig`."""

    def __init__(self, config: RingAttentionConfig):
        super().__init__(
            config.segment_lengths, config.dilation_rates, config.dropout, config.ring_size,
            config.device, config.dtype,
        )  # fmt: skip
        self.softmax_scale = config.attention_scale


def create_production_ring_attention(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int], **fields: Any
) -> RingDilatedAttentionProduction:
    """`RingDilatedAttentionProduction`, with the fields of `RingAttentionConfig`."""
    config = RingAttentionConfig(list(segment_lengths), list(dilation_rates), **fields)
    return RingDilatedAttentionProduction(config)
