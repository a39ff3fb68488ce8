# SPDX-License-Identifier: MIT
"""Dilated attention (LongNet), Ding et al. (2023), arXiv:2307.02486."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fla.core.layout import SequenceLayout
from fla.layers.attn import Attention, Where
from fla.modules import LayerNorm
from fla.ops.dilated_attention import branches, dilated_attention, dilated_attention_step

SEGMENTS = (2048, 4096, 8192, 16384, 32768)  # the paper's language models
RATES = (1, 2, 4, 6, 12)


class DilatedAttention(Attention):
    """`fla.ops.dilated_attention` on `[B, T, hidden_size]`, with rotary positions: the true ones of
    every token, turned before a branch picks its tokens.

    `causal=False` looks both ways (an encoder's), and has no cache. `inner_norm` is a LayerNorm of
    what the output projection reads (sub-LN, arXiv:2210.06423).

    Example:
        >>> layer = DilatedAttention(64, 4, segment_lengths=[16, 32], dilation_rates=[1, 2])
        >>> layer(torch.randn(2, 50, 64))[0].shape
        torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        segment_lengths: Sequence[int] = SEGMENTS,
        dilation_rates: Sequence[int] = RATES,
        head_offsets: Sequence[int] | None = None,
        causal: bool = True,
        inner_norm: bool = False,
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
        self.causal = causal
        heads = self.num_kv_heads
        branches(
            "DilatedAttention", segment_lengths, dilation_rates, heads, num_heads // heads,
            head_offsets,
        )  # fmt: skip
        self.branches: dict[str, Any] = dict(
            segment_lengths=list(segment_lengths),
            dilation_rates=list(dilation_rates),
            head_offsets=None if head_offsets is None else list(head_offsets),
        )
        if inner_norm:
            self.inner_norm = LayerNorm(num_heads * self.head_dim)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        o = dilated_attention(q, k, v, **self.branches, causal=self.causal, cu_seqlens=cu_seqlens)
        assert isinstance(o, Tensor)
        return o

    def _sequences(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        return self._whole(q, k, v, layout.cu_seqlens)

    def _look(self, q: Tensor, k: Tensor, v: Tensor, where: Where | None) -> Tensor:
        if not self.causal:
            raise ValueError(
                "DilatedAttention: causal=False looks at tokens that a cache does not hold yet; "
                "pass use_cache=False"
            )
        if where is None:
            return self._whole(q, k, v)
        if q.shape[1] == 1:
            lengths = (where.queries[:, 0] + 1).clamp(min=1)
            return dilated_attention_step(q, k, v, **self.branches, lengths=lengths)
        o = torch.zeros_like(q)
        keys = (where.keys >= 0).expand(len(q), -1)
        for b, seen in enumerate(keys):
            own = slice(None) if where.real is None else where.real[b]
            o[b, own] = self._whole(q[b : b + 1, own], k[b : b + 1, seen], v[b : b + 1, seen])[0]
        return o
