# SPDX-License-Identifier: MIT
"""Softmax attention with ternary projections: Ma et al. (2024), arXiv:2402.17764."""

from fla.layers.attn import Attention
from fla.modules.fused_bitlinear import FusedBitLinear


class BitAttention(Attention):
    """`Attention` whose projections are `FusedBitLinear`: an RMSNorm, 8-bit activations and
    weights of -1, 0 and 1 times a scale. The norms' eps is `bit_norm_eps`: published code leaves it
    at 1e-6 and takes `norm_eps` without using it.

    Example:
        >>> import torch
        >>> BitAttention(hidden_size=64, num_heads=4)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        max_position_embeddings: int | None = None,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        bit_norm_eps: float = 1e-6,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            window_size=window_size,
            rope_theta=rope_theta,
            max_position_embeddings=max_position_embeddings,
            layer_idx=layer_idx,
        )
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(self, name)
            bit = FusedBitLinear(linear.in_features, linear.out_features)
            bit.norm.eps = bit_norm_eps
            self.add_module(name, bit)
