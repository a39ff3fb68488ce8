# SPDX-License-Identifier: MIT
"""LightNet: Qin et al. (2024), *You Only Scan Once*, arXiv:2405.21022."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, heads_and_ratio, low_rank
from fla.modules import FusedRMSNormGated, ShortConvolution
from fla.ops.engine.scan.running import log_cumulative_sum
from fla.ops.gla import chunk_gla, fused_recurrent_gla


class LightNetAttention(RecurrentMixer):
    """GLA whose keys are a running softmax over time, on `[B, T, hidden_size]`.

        z_t = log sum_{j <= t} exp(W_k x_j)        k = exp(W_k x - z)        g = z_{t-1} - z_t
        o = W_o (rms_norm(gla(swish(W_q x), k, W_v x, g)) * swish(W_g x))

    The state carries z, so a sequence may be continued anywhere. The norm's eps is `o_norm_eps`:
    published code leaves it at 1e-6 and takes `norm_eps` without using it.

    Example:
        >>> import torch
        >>> layer = LightNetAttention(hidden_size=64, expand_ratio=32)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        num_heads: int | None = None,
        expand_ratio: int | None = 128,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_low_rank_dim: int = 128,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        o_norm_eps: float = 1e-6,
    ):
        super().__init__()
        name = "LightNetAttention"
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        num_heads, expand_ratio = heads_and_ratio(name, hidden_size, num_heads, expand_ratio)
        self.num_heads, self.use_short_conv = num_heads, use_short_conv
        width = num_heads * expand_ratio
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.g_proj = low_rank(hidden_size, gate_low_rank_dim, hidden_size)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(width, conv_size, conv_bias, activation=None)
            self.k_conv1d = ShortConvolution(width, conv_size, conv_bias, activation=None)
            self.v_conv1d = ShortConvolution(hidden_size, conv_size, conv_bias, activation=None)
        self.g_norm = FusedRMSNormGated(hidden_size, elementwise_affine, o_norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (q, k, v), conv = self.project(x, context)
        S, z = (None, None) if context.recurrent is None else context.recurrent
        logits = k.double() if k.dtype.itemsize == 8 else k.float()
        z, before, last = log_cumulative_sum(logits, z, context.cu_seqlens)
        rows = (F.silu(q), (logits - z).exp().to(q.dtype), v, before - z)
        q, k, v, g = (y.unflatten(-1, (self.num_heads, -1)) for y in rows)
        rule = fused_recurrent_gla if self.token_by_token(x) else chunk_gla
        o, state = rule(q, k, v, g, **context.sequences | {"initial_state": S})
        o = self.g_norm(o.flatten(-2), self.g_proj(x))
        return self.o_proj(o), context.after((state, last), conv)
