# SPDX-License-Identifier: MIT
"""Dilated attention as modules, on `fla.ops.dilated_attention`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch._arguments import (
    check_dropout,
    check_input,
    check_placement,
    no_effect,
    no_pool,
    over_ranks,
    refuse,
    rows_apart,
)
from fla.modules import LayerNorm, RotaryEmbedding
from fla.ops.dilated_attention import branches, dilated_attention


class DilatedAttention(nn.Module):
    """LongNet's dilated attention on `[batch, tokens, heads, channels]`, arXiv:2307.02486.

    Differs from the package of this name: every head runs every branch, under one softmax, as the
    paper's Eq. 10 has it (there each head ran one branch, and the sum was divided by their number).
    Any length runs. `softmax_scale` counts. Dropout falls on the result, since no softmax weights
    are kept. `attention_mask` is `[batch, tokens]`, True where a token is real; others raise.

    Example:
        >>> attention = DilatedAttention([16, 32], [1, 2])
        >>> q, k, v = torch.randn(3, 2, 50, 4, 8).unbind()
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 50, 4, 8])
    """

    mode = "gather"  # what moves where several processes hold the tokens

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: None = None,
        enable_memory_pool: bool = False,
        enable_profiling: bool = False,
        lightweight_pool: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.owner = type(self).__name__
        refuse(self.owner, "torch's kernels run; leave it out", op=op)
        no_pool(
            self.owner, enable_memory_pool=(enable_memory_pool, False),
            enable_profiling=(enable_profiling, False), lightweight_pool=(lightweight_pool, True),
        )  # fmt: skip
        b = branches(self.owner, segment_lengths, dilation_rates, heads=1)
        self.segment_lengths, self.dilation_rates = b.segments, b.rates
        self.softmax_scale = softmax_scale
        self.dropout = check_dropout(self.owner, attention_dropout)
        self.device, self.dtype = device, dtype

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mode: str | None) -> Tensor:
        o = dilated_attention(
            q, k, v, segment_lengths=self.segment_lengths, dilation_rates=self.dilation_rates,
            causal=causal, scale=self.softmax_scale, mode=mode,
        )  # fmt: skip
        assert isinstance(o, Tensor)
        return o

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        check_input(self.owner, query, key, value)
        check_placement(self.owner, query, self.device, self.dtype)
        o = rows_apart(
            self.owner, lambda q, k, v: self._attend(q, k, v, is_causal, None),
            query, key, value, attention_mask,
        )  # fmt: skip
        return F.dropout(o, self.dropout, self.training)


class ImprovedDilatedAttention(DilatedAttention):
    """`DilatedAttention` under its other arguments.

    Differs from the package of this name, whose class of this name attended over the heads of one
    token. `use_tf32` changes no global flag: call `torch.set_float32_matmul_precision`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        use_tf32: bool = True,
        enable_memory_pool: bool = False,
        enable_profiling: bool = False,
        lightweight_pool: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            segment_lengths, dilation_rates, None, dropout, None, enable_memory_pool,
            enable_profiling, lightweight_pool, device, dtype,
        )  # fmt: skip
        why = "torch.set_float32_matmul_precision decides; leave it out"
        no_effect(self.owner, why, use_tf32=(use_tf32, True))


class DistributedImprovedDilatedAttention(ImprovedDilatedAttention):
    """`DilatedAttention` whose tokens lie on all processes with `sequence_parallel=True`: each
    passes and gets its own, and the keys and values that its queries meet are gathered.

    Differs from the package of this name, which exchanged nothing before it attended.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        use_tf32: bool = True,
        sequence_parallel: bool = False,
        model_parallel: bool = False,
        use_flash_attention: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(
            segment_lengths, dilation_rates, dropout, use_tf32, device=device, dtype=dtype
        )
        refuse(
            self.owner, "shard the model with torch's FSDP2, or its heads by sequence_parallel",
            model_parallel=model_parallel,
        )  # fmt: skip
        why = "torch's flash kernels run wherever they can; leave it out"
        no_effect(self.owner, why, use_flash_attention=(use_flash_attention, True))
        self.sequence_parallel = sequence_parallel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if not self.sequence_parallel:
            return super().forward(query, key, value, is_causal, attention_mask)
        with over_ranks(self.owner, None, self.dropout if self.training else 0.0) as several:
            if not several:
                return super().forward(query, key, value, is_causal, attention_mask)
            check_input(self.owner, query, key, value)
            refuse(self.owner, "drop padding first", attention_mask=attention_mask is not None)
            return self._attend(query, key, value, is_causal, self.mode)


class MultiheadDilatedAttention(nn.Module):
    """Projections around `DilatedAttention`, on `[batch, tokens, embed_dim]`:
    `out_proj(norm(attention(q_proj(query), k_proj(key), v_proj(value))))`.

    Returns a tensor, or `(tensor, None)` with `need_weights` (there are no weights to give).
    `layer_norm` stands before `out_proj` (sub-LN, arXiv:2210.06423), and `gamma_init` is the gain
    of `v_proj` and `out_proj`, as there. `key_padding_mask` `[batch, tokens]` is True where a token
    is padding. Arguments stand in the order of the package: rates before lengths.

    Further arguments: `attention`, any module here that takes `[batch, tokens, heads, channels]`,
    in the place of `DilatedAttention`; `rope_theta`, which turns queries and keys by position.

    Example:
        >>> attention = MultiheadDilatedAttention(32, 4, [1, 2], [16, 32])
        >>> attention(torch.randn(2, 50, 32), is_causal=True).shape
        torch.Size([2, 50, 32])
    """

    inner: Any = DilatedAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        op: None = None,
        *,
        attention: nn.Module | None = None,
        rope_theta: float | None = None,
    ):
        super().__init__()
        self.owner = type(self).__name__
        refuse(self.owner, "torch's kernels run; leave it out", op=op)
        if embed_dim % num_heads:
            raise ValueError(
                f"{self.owner}: embed_dim={embed_dim} is not a multiple of num_heads={num_heads}"
            )
        made: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_heads, self.gamma_init = num_heads, gamma_init
        self.attention = attention or self.inner(
            list(segment_lengths), list(dilation_rates), **self._dropout(dropout)
        )
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.norm = LayerNorm(embed_dim, eps=layer_norm_eps).to(**made) if layer_norm else None
        head_dim = embed_dim // num_heads
        self.rotary = None if rope_theta is None else RotaryEmbedding(head_dim, rope_theta)
        self.reset_parameters()

    def _dropout(self, share: float) -> dict[str, float]:
        return {"attention_dropout": share}

    def reset_parameters(self) -> None:
        for name, gain in (
            ("q", 1.0),
            ("k", 1.0),
            ("v", self.gamma_init),
            ("out", self.gamma_init),
        ):
            layer: Any = self.get_submodule(f"{name}_proj")
            nn.init.xavier_normal_(layer.weight, gain=gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def _mixed(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, is_causal: bool,
        key_padding_mask: Tensor | None, attn_mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if attn_mask is not None:
            raise ValueError(
                f"{self.owner}: attn_mask cannot be honoured, the pattern is the mask; use "
                "is_causal, and key_padding_mask for padding"
            )
        key = query if key is None else key
        value = key if value is None else value
        projected = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in projected)
        if self.rotary is not None:
            q, k = self.rotary(q, k)
        padding = {} if key_padding_mask is None else {"attention_mask": ~key_padding_mask.bool()}
        o = self.attention(q, k, v, is_causal, **padding).flatten(2)
        return self.out_proj(o if self.norm is None else self.norm(o))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> Tensor | tuple[Tensor, None]:
        refuse(self.owner, "no weights are kept", average_attn_weights=not average_attn_weights)
        o = self._mixed(query, key, value, is_causal, key_padding_mask, attn_mask)
        return (o, None) if need_weights else o


class ImprovedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """`MultiheadDilatedAttention` that always returns `(tensor, None)`; `use_tf32` as in
    `ImprovedDilatedAttention`.
    """

    inner: Any = ImprovedDilatedAttention

    def __init__(self, *args: Any, use_tf32: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        why = "torch.set_float32_matmul_precision decides; leave it out"
        no_effect(self.owner, why, use_tf32=(use_tf32, True))

    def _dropout(self, share: float) -> dict[str, float]:
        return {"dropout": share}

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        o = super().forward(query, *args, **kwargs)
        return o if isinstance(o, tuple) else (o, None)


class DistributedImprovedMultiheadDilatedAttention(ImprovedMultiheadDilatedAttention):
    """Projections around `DistributedImprovedDilatedAttention`; every process passes its own
    tokens with `sequence_parallel=True`. Parameters' gradients are shares: sum them with
    `fla.distributed.reduce_gradients`.
    """

    inner = DistributedImprovedDilatedAttention

    def __init__(self, *args: Any, sequence_parallel: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if sequence_parallel and self.rotary is not None:
            raise ValueError(
                f"{self.owner}: rope_theta would turn by a rank's own positions; turn before, or "
                "use fla.layers.DilatedAttention, which knows the whole row's"
            )
        assert isinstance(self.attention, DistributedImprovedDilatedAttention)
        self.attention.sequence_parallel = sequence_parallel
