# SPDX-License-Identifier: MIT
"""RWKV-7 time mixing and channel mixing: Peng et al. (2025), arXiv:2503.14456."""

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, multiple
from fla.layers.rwkv6 import LoRA
from fla.modules import GroupNorm
from fla.modules.activations import activation
from fla.modules.l2norm import l2norm
from fla.modules.token_shift import token_shift
from fla.ops.rwkv7 import (
    chunk_rwkv7,
    fused_addcmul_rwkv7,
    fused_k_rwkv7,
    fused_recurrent_rwkv7,
    gate_output_correction,
)

SLOWEST = math.exp(-0.5)  # the decay of a token is at least exp(-exp(-1/2))


def _rank(hidden_size: int, factor: float, power: float) -> int:
    """The paper's rank of a LoRA: `factor * hidden_size^power`, to a multiple of 32."""
    return max(32, int(round(factor * hidden_size**power / 32) * 32))


class RWKV7Attention(RecurrentMixer):
    """RWKV-7 time mixing, on `[B, T, hidden_size]`. With m = x + (x_{t-1} - x_t) x_* for each use:

        r, k, v = W m        w = -exp(-1/2) sigmoid(lora_w m)        a = sigmoid(lora_a m)
        v <- v + (v_first - v) sigmoid(lora_v m)          in all layers but the first, whose v it is
        kk = k k_k / |k k_k|        k <- k (1 + (a - 1) k_a)
        o = group_norm(rwkv7(r, w, k, v, -kk, kk a)) + (sum r k r_k) v
        y = W_o (o * lora_g m)

    v_first is what the layer returns last, and what later layers take. `fuse_norm` and
    `num_hidden_layers` are kept for published code and configs.

    Example:
        >>> layer = RWKV7Attention(hidden_size=64, head_dim=32, layer_idx=0)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    gates = (*RecurrentMixer.gates, "w_lora", "a_lora", "v_lora")

    takes = gives = ("v_first",)

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        head_dim: int | None = 64,
        num_heads: int | None = None,
        decay_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        v_low_rank_dim: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        fuse_norm: bool = False,
        value_dim: int | list[int] | None = None,
        num_hidden_layers: int | None = None,
    ):
        super().__init__()
        name, D = "RWKV7Attention", hidden_size
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        if num_heads is None:
            if head_dim is None:
                raise ValueError(f"{name}: give head_dim or num_heads")
            num_heads = multiple(name, "hidden_size", D, "head_dim", head_dim)
        if isinstance(value_dim, list):
            if layer_idx is None:
                raise ValueError(f"{name}: value_dim holds one width per layer; give layer_idx")
            value_dim = value_dim[layer_idx]
        value_dim = D if value_dim is None else value_dim
        self.num_heads, self.head_dim = (
            num_heads,
            multiple(name, "hidden_size", D, "heads", num_heads),
        )
        multiple(name, "value_dim", value_dim, "heads", num_heads)
        for letter in "rwkvag":
            self.register_parameter(f"x_{letter}", nn.Parameter(torch.zeros(1, 1, D)))
        self.k_k, self.k_a = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.r_k = nn.Parameter(torch.zeros(num_heads, self.head_dim))
        self.r_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, value_dim, bias=False)
        self.o_proj = nn.Linear(value_dim, D, bias=False)
        decay, gate = decay_low_rank_dim or _rank(D, 1.8, 0.5), gate_low_rank_dim
        self.w_lora = LoRA(D, D, decay)
        if layer_idx:
            self.v_lora = LoRA(D, value_dim, v_low_rank_dim or _rank(D, 1.3, 0.5), activation=None)
        self.a_lora = LoRA(D, D, a_low_rank_dim or _rank(D, 1.8, 0.5), activation=None)
        rank = gate or _rank(D, 0.6, 0.8)
        self.g_lora = LoRA(D, value_dim, rank, bias=False, activation="sigmoid")
        self.g_norm = GroupNorm(
            num_heads, value_dim, elementwise_affine, True, self.head_dim * norm_eps
        )

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        before = None if context.state is None else context.state.conv[0]
        delta, last = token_shift(x, context.cu_seqlens, before, output_cache=True)
        mixes: Any = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        xr, xw, xk, xv, xa, xg = fused_addcmul_rwkv7(x, delta, *mixes)
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        w = -SLOWEST * promote_to_fp32(self.w_lora(xw)).sigmoid()
        if not self.layer_idx:
            context.handed["v_first"] = v
        else:
            v = torch.lerp(v, self._first(context), self.v_lora(xv).sigmoid())
        a, g = self.a_lora(xa).sigmoid(), self.g_lora(xg)
        kk = l2norm((k * self.k_k).unflatten(-1, (self.num_heads, -1)))
        k = fused_k_rwkv7(k, a, self.k_a)
        r, w, k, v, a = (y.unflatten(-1, (self.num_heads, -1)) for y in (r, w, k, v, a))
        rule = fused_recurrent_rwkv7 if self.token_by_token(x) else chunk_rwkv7
        o, state = rule(r, w, k, v, -kk, kk * a, scale=1.0, **context.sequences)
        o = gate_output_correction(self.g_norm(o.flatten(-2)), r, k, self.r_k, v, g)
        return self.o_proj(o), context.after(state, (last,))

    def _first(self, context: Context) -> Tensor:
        """The values of the first layer, or `ValueError`."""
        v = context.handed.get("v_first")
        if v is None:
            raise ValueError(
                f"RWKV7Attention: layer_idx={self.layer_idx} needs v_first, the values that the "
                "layer with layer_idx=0 returns last; in a hybrid, layer 0 has to be RWKV-7"
            )
        return v


class RWKV7FeedForward(nn.Module):
    """RWKV-7 channel mixing: `W_v act(W_k (x + (x_{t-1} - x_t) x_k))`."""

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: float | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "sqrelu",
        layer_idx: int | None = None,
        num_hidden_layers: int | None = None,
    ):
        super().__init__()
        # kept as published; the block keeps the shift's state and sets first values
        self.layer_idx, self.num_hidden_layers = layer_idx, num_hidden_layers
        if intermediate_size is None:
            ratio = 4 if hidden_ratio is None else hidden_ratio
            intermediate_size = 32 * -(-int(hidden_size * ratio) // 32)
        self.x_k = nn.Parameter(torch.zeros(hidden_size))
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act = activation(type(self).__name__, hidden_act)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(y, the last token of every sequence)."""
        delta, last = token_shift(x, cu_seqlens, before, output_cache=True)
        return self.value(self.act(self.key(torch.addcmul(x, delta, self.x_k)))), last
