# SPDX-License-Identifier: MIT
"""Gated DeltaNet 2: Hatamizadeh et al. (2026), arXiv:2605.22791. The gated delta rule with a decay
per channel and separate gates for erase and write.
"""

import torch.nn as nn
from torch import Tensor

from fla.layers.kda import ChannelGated
from fla.layers.mixer import Context, State, repeat_heads
from fla.ops.gdn2 import chunk_gdn2, fused_recurrent_gdn2


class GatedDeltaNet2(ChannelGated):
    """GDN-2 between projections, on `[B, T, hidden_size]`; as `KimiDeltaAttention` with

        b = sigmoid(W_b x)        w = sigmoid(W_w x)        o = gdn2(q/|q|, k/|k|, v, g, b, w)

    `allow_neg_eigval` doubles b. g and b are of key heads: the value heads of a group share them.

    Example:
        >>> import torch
        >>> layer = GatedDeltaNet2(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    gates_per_key_head = True

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1.0,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__(
            hidden_size,
            expand_v,
            head_dim,
            num_heads,
            num_v_heads,
            mode,
            use_short_conv,
            allow_neg_eigval,
            conv_size,
            conv_bias,
            layer_idx,
            norm_eps,
        )
        self.b_proj = nn.Linear(hidden_size, self.gate_dim, bias=False)
        self.w_proj = nn.Linear(hidden_size, self.value_dim, bias=False)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, g, conv = self.heads(x, context)
        b = self.b_proj(x).sigmoid().view_as(g)
        g, b = repeat_heads(self.num_v_heads, self.num_heads, g, b)
        groups = self.num_v_heads // self.num_heads
        dt_bias = self.dt_bias.view(self.num_heads, -1).repeat_interleave(groups, 0)
        rule = fused_recurrent_gdn2 if self.token_by_token(x) else chunk_gdn2
        o, state = rule(
            q,
            k,
            v,
            g,
            2 * b if self.allow_neg_eigval else b,
            self.w_proj(x).sigmoid().view_as(v),
            A_log=self.A_log.repeat_interleave(groups),
            dt_bias=dt_bias.flatten(),
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            **context.sequences,
        )
        return self.finish(o, x), context.after(state, conv)
