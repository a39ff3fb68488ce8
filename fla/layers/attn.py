# SPDX-License-Identifier: MIT
"""Softmax attention on torch's `scaled_dot_product_attention`: grouped heads, rotary positions, q/k
norm, window.

o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s        over s <= t, and t - s < window_size where
given
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.layout import SequenceLayout
from fla.core.parallel import Shard, tie
from fla.layers.mixer import Mixer
from fla.modules import RMSNorm, RotaryEmbedding
from fla.ops.engine.sharding import halo
from fla.ops.ring_attention import ring_attention


@dataclass(frozen=True)
class Where:
    """Positions of tokens in their sequences.

    Fields:
        queries: `[B, T]`.
        keys: `[B or 1, S]`, below 0 where there is none.
        real: `[B, T]`, the queries that are not padding; None for all.
    """

    queries: Tensor
    keys: Tensor
    real: Tensor | None


class SoftmaxMixer(Mixer):
    """Causal softmax attention over whole sequences, packed ones, and a cache; `window_size` bounds
    how far it looks. `scale` multiplies the logits, 1/sqrt(d) where None.
    """

    window_size: int | None
    scale: float | None = None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        """SDPA on `[B, T, H, D]`."""
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, enable_gqa=q.shape[1] != k.shape[1], scale=self.scale, **options
        )
        return o.transpose(1, 2)

    def _sequences(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        """Every sequence from its start."""
        if layout.shard is not None:
            if self.window_size is not None:
                return self._window_over_ranks(q, k, v, layout.shard, layout.positions(q.device))
            o = ring_attention(q, k, v, scale=self.scale, cu_seqlens=layout.cu_seqlens)
            assert isinstance(o, Tensor)
            return o
        if not layout.packed:
            return self._whole(q, k, v)
        parts = zip(*(y.split(layout.lengths(), 1) for y in (q, k, v)), strict=True)
        return torch.cat([self._whole(*part) for part in parts], 1)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Tokens of whole sequences; with a window in blocks of its size, so cost stays linear in
        the length.
        """
        T, window = q.shape[1], self.window_size
        if window is not None and torch.compiler.is_exporting():
            # a graph for any length has no number of blocks
            return self._attend(q, k, v, attn_mask=self._visible(T, T, q.device))
        if window is None or window >= T:
            return self._attend(q, k, v, is_causal=True)
        blocks = []
        for begin in range(0, T, window):
            end, first = min(begin + window, T), max(0, begin - window + 1)
            mask = self._visible(end - begin, end - first, q.device)
            blocks.append(
                self._attend(q[:, begin:end], k[:, first:end], v[:, first:end], attn_mask=mask)
            )
        return torch.cat(blocks, 1)

    def _window_over_ranks(
        self, q: Tensor, k: Tensor, v: Tensor, shard: Shard, positions: Tensor
    ) -> Tensor:
        """This rank's tokens, which see the last ones of the ranks before it."""
        window, T = self.window_size or 0, q.shape[1]
        k, v = (torch.cat([halo(shard, x, window - 1), x], 1) for x in (k, v))
        blocks = [q.new_empty(len(q), 0, q.shape[2], v.shape[3])]
        for begin in range(0, T, window):
            end = min(begin + window, T)
            query = torch.arange(begin, end, device=q.device)[:, None]
            key = torch.arange(begin, end + window - 1, device=q.device) - (window - 1)
            own = key >= query - positions[0, begin:end, None]  # a key in the query's sequence
            keys = slice(begin, end + window - 1)
            mask = self._sees(query, key) & own
            blocks.append(self._attend(q[:, begin:end], k[:, keys], v[:, keys], attn_mask=mask))
        return tie(torch.cat(blocks, 1), k, v)

    def _sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at some positions may look at keys at others of their sequence."""
        visible = key <= query
        return visible if self.window_size is None else visible & (query - key < self.window_size)

    def _visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """`[queries, keys]` of the last queries on the last keys."""
        positions = torch.arange(keys, device=device)
        return self._sees(positions[keys - queries :, None], positions)

    def _remember(
        self, k: Tensor, v: Tensor, layout: SequenceLayout, cache
    ) -> tuple[Tensor, Tensor, Where | None]:
        """Keys and values `[B, S, H, D]` that the new tokens may look at, and where both stand in
        their sequences; None where the tokens are whole sequences.
        """
        if layout.packed and not layout.padded:
            raise ValueError(
                f"{type(self).__name__}: packed sequences cannot fill a cache of keys and values; "
                "pass a padded batch instead"
            )
        real = layout.real()
        keys, values = (layout.unpack(y).transpose(1, 2) for y in (k, v))
        T = keys.shape[2]
        keys, values = cache.update_keys(keys, values, self.layer_idx, real, self.window_size)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        S = keys.shape[1]
        even = real is None and isinstance(layout.starts, int)
        if even and T == S:
            return keys, values, None
        # the cache keeps a row's real keys at its end, so their positions count back from there
        positions = layout.unpack(layout.positions(k.device).unsqueeze(-1)).squeeze(-1)
        now = T if real is None else real.sum(1)
        seen = torch.as_tensor(layout.starts + now, device=k.device).view(-1, 1)
        return keys, values, Where(positions, seen - S + torch.arange(S, device=k.device), real)

    def _mask(self, where: Where, q: Tensor, k: Tensor) -> Tensor:
        """`[B, 1 or heads, T, S]`, True where a query looks at a key."""
        queries, keys = where.queries[:, :, None], where.keys[:, None]
        visible = self._sees(queries, keys) & (keys >= 0)
        if where.real is not None:
            # a padded query, whose result is dropped, must not face an empty softmax
            visible = visible | ~where.real[:, :, None]
        return visible.unsqueeze(1)

    def _look(self, q: Tensor, k: Tensor, v: Tensor, where: Where | None) -> Tensor:
        """Attention of tokens to what `_remember` returned."""
        if where is None:
            return self._whole(q, k, v)
        return self._attend(q, k, v, attn_mask=self._mask(where, q, k))


class Attention(SoftmaxMixer):
    """Causal softmax attention on `[B, T, hidden_size]`; Vaswani et al. (2017), arXiv:1706.03762,
    with rotary positions.

    Positions turn the first `partial_rotary_factor` of a head's channels; `rope_theta=None` leaves
    them out. `qk_norm` norms q and k per head, "all_heads" over all heads at once. `output_gate`
    multiplies o by a sigmoid gate that W_q holds beside each head's query. `rope_scaling` is that
    of `RotaryEmbedding`.
    `max_position_embeddings` is kept for configs; no length is refused.

    Example:
        >>> Attention(hidden_size=64, num_heads=4, num_kv_heads=2)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool | str = False,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        max_position_embeddings: int | None = None,
        layer_idx: int | None = None,
        qk_norm_eps: float = 1e-5,
        head_dim: int | None = None,
        partial_rotary_factor: float = 1.0,
        output_gate: bool = False,
        rope_scaling: dict[str, Any] | None = None,
    ):
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if (head_dim is None and hidden_size % num_heads) or num_heads % num_kv_heads:
            raise ValueError(
                f"Attention: hidden_size={hidden_size} must be a multiple of "
                f"num_heads={num_heads}, and that of "
                f"num_kv_heads={num_kv_heads}"
            )
        if qk_norm not in (False, True, "all_heads"):
            raise ValueError(
                f"Attention: qk_norm is {qk_norm!r}; expected False, True or 'all_heads'"
            )
        if window_size is not None and window_size < 1:
            raise ValueError(
                f"Attention: window_size is {window_size}; expected at least 1 or None"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.window_size, self.layer_idx = (
            head_dim or hidden_size // num_heads,
            window_size,
            layer_idx,
        )
        self.max_position_embeddings = max_position_embeddings
        kv_dim, width = num_kv_heads * self.head_dim, num_heads * self.head_dim
        self.output_gate = output_gate
        self.q_proj = nn.Linear(hidden_size, width * (1 + output_gate), bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        if qk_norm:
            widths = (width, kv_dim) if qk_norm == "all_heads" else (self.head_dim,) * 2
            self.q_norm, self.k_norm = (RMSNorm(n, eps=qk_norm_eps) for n in widths)
        self.qk_norm = qk_norm
        turned = int(self.head_dim * partial_rotary_factor)
        self.inner_norm: nn.Module | None = None  # norms what o_proj reads
        self.rotary = None
        if rope_theta is not None:
            self.rotary = RotaryEmbedding(turned, base=rope_theta, scaling=rope_scaling)

    def fused(self) -> dict[str, list[int]]:
        """Beside each head's query lies its gate."""
        return {"q_proj": [self.head_dim] * 2 * self.num_heads} if self.output_gate else {}

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q `[B, T, num_heads, head_dim]`, and k, v `[B, T, num_kv_heads, head_dim]`."""
        maps = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(proj(x).unflatten(-1, (-1, self.head_dim)) for proj in maps)

    def heads(
        self, x: Tensor, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v as they meet in the softmax, and the output gate's logits."""
        q, k, v = self.project(x)
        gate = None
        if self.output_gate:
            q, gate = q.unflatten(-2, (self.num_heads, 2)).unbind(-2)
        if self.qk_norm == "all_heads":
            q = self.q_norm(q.flatten(-2)).view_as(q)
            k = self.k_norm(k.flatten(-2)).view_as(k)
        elif self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, k, positions=layout.positions(x.device))
        return q, k, v, gate

    def mix(self, x: Tensor, layout: SequenceLayout, cache, handed) -> Tensor:
        q, k, v, gate = self.heads(x, layout)
        if cache is not None:
            o = layout.pack(self._look(layout.unpack(q), *self._remember(k, v, layout, cache)))
        else:
            o = self._sequences(q, k, v, layout)
        o = (o if gate is None else o * gate.sigmoid()).flatten(-2)
        return self.o_proj(o if self.inner_norm is None else self.inner_norm(o))
