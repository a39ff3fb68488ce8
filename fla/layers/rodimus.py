# SPDX-License-Identifier: MIT
"""Rodimus and its sliding-window attention with one shared key: He et al. (2024),
arXiv:2410.06577.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.attn import Attention
from fla.layers.mixer import Context, RecurrentMixer, State, check_mode
from fla.modules import RMSNorm, ShortConvolution
from fla.modules.l2norm import l2norm
from fla.ops.gla import chunk_gla, fused_recurrent_gla


class RodimusAttention(RecurrentMixer):
    """A gated linear recurrence of one head, on `[B, T, hidden_size]`.

        u = W_up x        s = silu(conv(u))        tau = sigmoid(W_tau s)        a = softplus(W_g s)
        g = -a tau        k = a^tau * W_k s / |W_k s|        q = W_q s        v = sigmoid(I u) u
        o = gla(q, k, v, g) + residual_weight * s
        y = W_down rms_norm(o * silu(W_gate x))

    The state has `expand_ratio` rows; I has rank `input_gate_low_rank` ("auto" is 16 or
    hidden_size / 64, whichever is more). `residual_in_fp32` adds the residual in fp32.

    Example:
        >>> RodimusAttention(hidden_size=64, expand_ratio=8)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    gates = (*RecurrentMixer.gates, "g_gate_proj", "tau_gate_proj", "i_gate_proj")

    def __init__(
        self,
        block_type: str = "rodimus",
        mode: str = "chunk",
        hidden_size: int = 1024,
        input_gate_low_rank: int | str = "auto",
        expand_ratio: int = 64,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
        k_norm_eps: float | None = None,
        residual_in_fp32: bool = True,
        layer_idx: int | None = None,
    ):
        super().__init__()
        name = "RodimusAttention"
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        if block_type not in ("rodimus", "rodimus_plus"):
            raise ValueError(
                f"{name}: block_type is {block_type!r}; expected 'rodimus' or 'rodimus_plus'"
            )
        width, rank = 2 * hidden_size, input_gate_low_rank
        if isinstance(rank, str) and rank != "auto":
            raise ValueError(
                f"{name}: input_gate_low_rank is {rank!r}; expected a whole number or 'auto'"
            )
        rank = max(16, hidden_size // 64) if rank == "auto" else int(rank)
        self.use_short_conv, self.residual_in_fp32 = use_short_conv, residual_in_fp32
        self.k_norm_eps = 1e-12 if k_norm_eps is None else k_norm_eps
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.activation_norm = RMSNorm(width, eps=norm_eps)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)
        self.residual_weight = nn.Parameter(torch.ones(width))
        self.k_proj = nn.Linear(width, expand_ratio, bias=False)
        self.q_proj = nn.Linear(width, expand_ratio, bias=False)
        self.g_gate_proj = nn.Linear(width, expand_ratio)
        self.tau_gate_proj = nn.Linear(width, expand_ratio)
        self.i_gate_proj = nn.Sequential(
            nn.Linear(width, rank, bias=False), nn.Linear(rank, width), nn.Sigmoid()
        )
        if use_short_conv:
            self.short_conv = ShortConvolution(width, conv_size, bias=conv_bias)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        u = self.up_proj(x)
        conv: tuple[Tensor, ...] = ()
        shifted: Any = F.silu(u)
        if self.use_short_conv:
            shifted, last = context.convolve(self.short_conv, u)
            conv = (last,)
        rate = F.softplus(promote_to_fp32(self.g_gate_proj(shifted)))
        tau = promote_to_fp32(self.tau_gate_proj(shifted)).sigmoid()
        k = l2norm(promote_to_fp32(self.k_proj(shifted)), self.k_norm_eps) * rate.pow(tau)
        rows = (self.q_proj(shifted), k.to(x.dtype), self.i_gate_proj(u) * u, -rate * tau)
        q, k, v, g = (y.unsqueeze(2) for y in rows)
        rule = fused_recurrent_gla if self.token_by_token(x) else chunk_gla
        o, state = rule(q, k, v, g, **context.sequences)
        residual = self.residual_weight * shifted
        residual = promote_to_fp32(residual) if self.residual_in_fp32 else residual
        o = (o.squeeze(2) + residual).to(x.dtype) * F.silu(self.gate_proj(x))
        return self.down_proj(self.activation_norm(o)), context.after(state, conv)


class SlidingWindowSharedKeyAttention(Attention):
    """Softmax attention of many query heads over one shared key head, each with its own values,
    in a window.

    Example:
        >>> layer = SlidingWindowSharedKeyAttention(hidden_size=64, num_heads=4, window_size=4)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = 2048,
        rope_theta: float | None = 10000.0,
        max_position_embeddings: int | None = None,
        layer_idx: int | None = None,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            None,
            qkv_bias,
            qk_norm,
            window_size,
            rope_theta,
            max_position_embeddings,
            layer_idx,
        )
        self.k_proj = nn.Linear(hidden_size, self.head_dim, bias=qkv_bias)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().project(x)
        return q, k.expand(-1, -1, self.num_heads, -1), v
