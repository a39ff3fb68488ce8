# SPDX-License-Identifier: MIT
"""Encoder and decoder blocks with dilated attention and sub-LN (MAGNETO, arXiv:2210.06423)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch._arguments import check_dropout, choose
from dilated_attention_pytorch.dilated_attention import MultiheadDilatedAttention
from fla.modules import LayerNorm


class _Layer(nn.Module):
    """The feed-forward half: `x + dropout(linear2(norm(act(linear1(norm(x))))))`."""

    def __init__(
        self, d_model: int, dim_feedforward: int, dropout: float,
        activation: Callable[[Tensor], Tensor], layer_norm_eps: float, gamma_init: float,
        made: dict[str, Any],
    ):  # fmt: skip
        super().__init__()
        self.activation = activation
        self.dropout = nn.Dropout(check_dropout(type(self).__name__, dropout))
        self.norm_feedforward = LayerNorm(d_model, eps=layer_norm_eps).to(**made)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **made)
        self.norm_inner = LayerNorm(dim_feedforward, eps=layer_norm_eps).to(**made)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **made)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_normal_(layer.weight, gain=gamma_init)
            nn.init.zeros_(layer.bias)

    def _feedforward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.linear1(self.norm_feedforward(x)))
        return x + self.dropout(self.linear2(self.norm_inner(inner)))


class DilatedTransformerEncoderLayer(_Layer):
    """`x + attention(norm(x))`, then the feed-forward half, on `[batch, tokens, d_model]`; a
    decoder-only block with `is_causal=True`. Dropout falls on what is added.

    Example:
        >>> layer = DilatedTransformerEncoderLayer(32, 4, [16, 32], [1, 2], 64)
        >>> layer(torch.randn(2, 50, 32), is_causal=True).shape
        torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rope_theta: float | None = None,
    ):
        made: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(
            d_model, dim_feedforward, dropout, activation, layer_norm_eps, gamma_init, made
        )
        self.norm_attention = LayerNorm(d_model, eps=layer_norm_eps).to(**made)
        self.self_attn = MultiheadDilatedAttention(
            d_model, nhead, dilation_rates, segment_lengths, layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init, rope_theta=rope_theta, **made,
        )  # fmt: skip

    def forward(
        self, src: Tensor, is_causal: bool = False, src_key_padding_mask: Tensor | None = None
    ) -> Tensor:
        attended = self.self_attn(
            self.norm_attention(src), is_causal=is_causal, key_padding_mask=src_key_padding_mask
        )
        return self._feedforward(src + self.dropout(attended))


class DilatedTransformerDecoderLayer(_Layer):
    """Self-attention, attention to a memory, feed-forward, on `[batch, tokens, d_model]`.

    `cross_attention="dilated"` pairs tokens of target and memory by the branches, so both need one
    length; `"dense"` sees the whole memory, of any length. Sub-LN stands in both
    attentions (the package of this name had it in the second alone).

    Example:
        >>> layer = DilatedTransformerDecoderLayer(32, 4, [16, 32], [1, 2], cross_attention="dense")
        >>> layer(torch.randn(2, 50, 32), torch.randn(2, 20, 32), tgt_is_causal=True).shape
        torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        cross_attention: str = "dilated",
        rope_theta: float | None = None,
    ):
        made: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(
            d_model, dim_feedforward, dropout, activation, layer_norm_eps, gamma_init, made
        )
        owner = type(self).__name__
        kind = choose(owner, "cross_attention", cross_attention, ("dilated", "dense"))
        options: dict[str, Any] = dict(
            layer_norm_eps=layer_norm_eps, gamma_init=gamma_init, rope_theta=rope_theta, **made
        )
        self.norm_self = LayerNorm(d_model, eps=layer_norm_eps).to(**made)
        self.self_attn = MultiheadDilatedAttention(
            d_model, nhead, dilation_rates, segment_lengths, **options
        )
        self.norm_cross = LayerNorm(d_model, eps=layer_norm_eps).to(**made)
        if kind == "dense":  # positions of two different texts are not compared
            options |= dict(attention=DenseAttention(), rope_theta=None)
        self.multihead_attn = MultiheadDilatedAttention(
            d_model, nhead, dilation_rates, segment_lengths, **options
        )

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        x = tgt + self.dropout(self.self_attn(self.norm_self(tgt), is_causal=tgt_is_causal))
        attended = self.multihead_attn(self.norm_cross(x), memory, is_causal=memory_is_causal)
        return self._feedforward(x + self.dropout(attended))


class DenseAttention(nn.Module):
    """torch's attention on `[batch, tokens, heads, channels]`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        if is_causal and query.shape[1] != key.shape[1]:
            raise ValueError(
                f"DenseAttention: is_causal=True with {query.shape[1]} queries and "
                f"{key.shape[1]} keys; positions must pair up"
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)
