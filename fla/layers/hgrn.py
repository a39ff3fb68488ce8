# SPDX-License-Identifier: MIT
"""HGRN: Qin et al. (2023), arXiv:2311.04823; HGRN2: Qin et al. (2024), arXiv:2404.07904."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, heads_and_ratio, whole
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn


def forget(f: Tensor, lower_bound: Tensor | None, layer_idx: int | None) -> Tensor:
    """`log(l + (1 - l) sigmoid(f))` for the lower bound l `[D]` that a model gives the layer;
    `log sigmoid(f)` without.
    """
    g = F.logsigmoid(promote_to_fp32(f))
    if lower_bound is None or layer_idx == 0:  # the first layer's bound is 0
        return g
    bound = promote_to_fp32(lower_bound)
    return torch.logaddexp(bound.log(), torch.log1p(-bound) + g)


class HGRNAttention(RecurrentMixer):
    """A gated recurrence channel by channel, on `[B, T, hidden_size]`.

        g = forget(W_f x)        i = swish(W_i x) (1 - exp(g))
        o = W_o (rms_norm(hgrn(i, g)) * swish(W_g x))

    Example:
        >>> HGRNAttention(hidden_size=64)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    takes = ("lower_bound",)

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_ratio: float = 1,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ):
        super().__init__()
        self.mode, self.layer_idx = check_mode("HGRNAttention", mode), layer_idx
        self.use_short_conv = use_short_conv
        width = whole("HGRNAttention", "hidden_size * expand_ratio", hidden_size * expand_ratio)
        self.i_proj = nn.Linear(hidden_size, width, bias=False)
        self.f_proj = nn.Linear(hidden_size, width, bias=False)
        self.g_proj = nn.Linear(hidden_size, width, bias=False)
        if use_short_conv:
            self.f_conv1d = ShortConvolution(width, conv_size, conv_bias, activation=None)
            self.i_conv1d = ShortConvolution(width, conv_size, conv_bias, activation=None)
        self.g_norm = FusedRMSNormGated(width, elementwise_affine, norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (i, f), conv = self.project(x, context, "if")
        g = forget(f, context.handed.get("lower_bound"), self.layer_idx)
        rule = fused_recurrent_hgrn if self.token_by_token(x) else chunk_hgrn
        o, state = rule((F.silu(i) * (1 - g.exp())).to(x.dtype), g, **context.sequences)
        return self.o_proj(self.g_norm(o, self.g_proj(x))), context.after(state, conv)


class HGRN2Attention(RecurrentMixer):
    """GLA whose key is what it forgets, on `[B, T, hidden_size]`.

        q = swish(W_q x)        g = forget(W_f x)        k = 1 - exp(g)        v = W_i x
        o = W_o rms_norm(gla(q, k, v, g))

    A head has `expand_ratio` key channels, and there are hidden_size / expand_ratio heads whatever
    `num_heads` says; it counts where `expand_ratio` is None. The norm's eps is `o_norm_eps`:
    published code leaves it at 1e-5 and takes `norm_eps` without using it.

    Example:
        >>> HGRN2Attention(hidden_size=64, expand_ratio=32)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    takes = ("lower_bound",)

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        num_heads: int | None = None,
        expand_ratio: int | None = 128,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        o_norm_eps: float = 1e-5,
    ):
        super().__init__()
        name = "HGRN2Attention"
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        num_heads = num_heads if expand_ratio is None else None  # as published code
        num_heads, expand_ratio = heads_and_ratio(name, hidden_size, num_heads, expand_ratio)
        self.num_heads, self.use_short_conv = num_heads, use_short_conv
        width = num_heads * expand_ratio
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.f_proj = nn.Linear(hidden_size, width, bias=False)
        self.i_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(width, conv_size, conv_bias, activation=None)
            self.f_conv1d = ShortConvolution(width, conv_size, conv_bias, activation=None)
            self.i_conv1d = ShortConvolution(hidden_size, conv_size, conv_bias, activation=None)
        self.g_norm = RMSNorm(hidden_size, elementwise_affine, eps=o_norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (q, f, i), conv = self.project(x, context, "qfi")
        g = forget(f, context.handed.get("lower_bound"), self.layer_idx)
        rows = (F.silu(q), (1 - g.exp()).to(q.dtype), i, g)
        q, k, v, g = (y.unflatten(-1, (self.num_heads, -1)) for y in rows)
        rule = fused_recurrent_gla if self.token_by_token(x) else chunk_gla
        o, state = rule(q, k, v, g, **context.sequences)
        return self.o_proj(self.g_norm(o.flatten(-2))), context.after(state, conv)
