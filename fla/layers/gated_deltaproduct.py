# SPDX-License-Identifier: MIT
"""Gated DeltaProduct: Siems et al. (2025), arXiv:2502.10297."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.layers.mixer import (
    Context,
    RecurrentMixer,
    State,
    check_mode,
    gate_steps,
    multiple,
    register,
    whole,
)
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.ops.engine.recurrence.gates import softplus_gate
from fla.ops.gated_delta_product import (
    chunk_gated_delta_product,
    fused_recurrent_gated_delta_product,
)


class GatedDeltaProduct(RecurrentMixer):
    """Gated DeltaProduct between projections, on `[B, T, hidden_size]`: `num_householder` keys,
    values and betas per token.

        q, k_j, v_j = silu(conv(W x))        beta_j = sigmoid(W_b x)
        g = -exp(A_log) softplus(W_a x + dt_bias)          (with use_forget_gate)
        o = W_o (rms_norm(product(q/|q|, k/|k|, v, g, beta)) * silu(W_g x))

    `allow_neg_eigval` doubles beta.

    Example:
        >>> layer = GatedDeltaProduct(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    A_log: Tensor
    dt_bias: Tensor

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        use_forget_gate: bool = True,
        allow_neg_eigval: bool = True,
        num_householder: int = 2,
    ):
        super().__init__()
        name = "GatedDeltaProduct"
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        self.num_heads, self.num_v_heads = num_heads, num_v_heads or num_heads
        multiple(name, "num_v_heads", self.num_v_heads, "num_heads", num_heads)
        self.head_v_dim = whole(name, "head_dim * expand_v", head_dim * expand_v)
        self.use_output_gate, self.use_short_conv = use_output_gate, use_short_conv
        self.use_forget_gate, self.allow_neg_eigval = use_forget_gate, allow_neg_eigval
        self.num_householder = n = num_householder
        key_dim, value_dim = num_heads * head_dim, self.num_v_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim * n, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim * n, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads * n, bias=False)
        if use_forget_gate:
            self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
            register(self)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, conv_size, bias=conv_bias)
            self.k_conv1d = ShortConvolution(key_dim * n, conv_size, bias=conv_bias)
            self.v_conv1d = ShortConvolution(value_dim * n, conv_size, bias=conv_bias)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
            self.o_norm = FusedRMSNormGated(self.head_v_dim, eps=norm_eps)
        else:
            self.o_norm = RMSNorm(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        """A_log and dt_bias start as in Gated DeltaNet, where there is a forget gate."""
        if not self.use_forget_gate:
            return {}
        A = torch.empty(self.num_v_heads).uniform_(1e-3, 16)
        return {"A_log": A.log(), "dt_bias": gate_steps(self.num_v_heads)}

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        qkv, conv = self.project(x, context)
        if not self.use_short_conv:
            qkv = [F.silu(y) for y in qkv]
        q = qkv[0].unflatten(-1, (self.num_heads, -1))
        beta = self.b_proj(x).sigmoid() * (2 if self.allow_neg_eigval else 1)
        n = self.num_householder
        steps = (y.unflatten(-1, (n, -1)).flatten(1, 2) for y in (qkv[1], qkv[2], beta))
        k, v, beta = steps
        g = None
        if self.use_forget_gate:
            g = softplus_gate(self.a_proj(x), self.A_log, self.dt_bias)
        token = self.token_by_token(x)
        rule = fused_recurrent_gated_delta_product if token else chunk_gated_delta_product
        o, state = rule(
            q,
            k.unflatten(-1, (self.num_heads, -1)),
            v.unflatten(-1, (self.num_v_heads, -1)),
            g,
            beta,
            n,
            use_qk_l2norm_in_kernel=True,
            **context.sequences,
        )
        gate = [self.g_proj(x).view_as(o)] if self.use_output_gate else []
        return self.o_proj(self.o_norm(o, *gate).flatten(-2)), context.after(state, conv)
