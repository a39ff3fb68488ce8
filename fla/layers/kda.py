# SPDX-License-Identifier: MIT
"""Kimi delta attention: Kimi Team (2025), arXiv:2510.26692."""

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
    low_rank,
    multiple,
    register,
    whole,
)
from fla.modules import FusedRMSNormGated, ShortConvolution
from fla.ops.kda import chunk_kda, fused_recurrent_kda


class ChannelGated(RecurrentMixer):
    """What KDA, its preconditioned form and GDN-2 share: short convolutions, a decay per channel
    `-exp(A_log) softplus(W_f x + dt_bias)` of low rank, and a sigmoid output gate of low rank.
    """

    A_log: Tensor
    dt_bias: Tensor
    gates_per_key_head = False  # whether the decay is of key heads, not of value heads

    def __init__(
        self,
        hidden_size: int,
        expand_v: float,
        head_dim: int,
        num_heads: int,
        num_v_heads: int | None,
        mode: str,
        use_short_conv: bool,
        allow_neg_eigval: bool,
        conv_size: int,
        conv_bias: bool,
        layer_idx: int | None,
        norm_eps: float,
    ):
        super().__init__()
        name = type(self).__name__
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        self.num_heads, self.num_v_heads = num_heads, num_v_heads or num_heads
        multiple(name, "num_v_heads", self.num_v_heads, "num_heads", num_heads)
        self.head_k_dim = head_dim
        self.head_v_dim = whole(name, "head_dim * expand_v", head_dim * expand_v)
        self.use_short_conv, self.allow_neg_eigval = use_short_conv, allow_neg_eigval
        self.key_dim, self.value_dim = num_heads * head_dim, self.num_v_heads * self.head_v_dim
        self.gate_heads = num_heads if self.gates_per_key_head else self.num_v_heads
        self.gate_dim = self.gate_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(self.value_dim, conv_size, conv_bias)
        self.f_proj = low_rank(hidden_size, self.head_v_dim, self.gate_dim)
        register(self)
        self.g_proj = low_rank(hidden_size, self.head_v_dim, self.value_dim, bias=True)
        self.o_norm = FusedRMSNormGated(self.head_v_dim, eps=norm_eps, activation="sigmoid")
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        """Decay rates A in [1, 16], time steps log-uniform in [0.001, 0.1]."""
        A = torch.empty(self.gate_heads).uniform_(1, 16)
        return {"A_log": A.log(), "dt_bias": gate_steps(self.gate_dim)}

    def heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple]:
        """q, k, v, the logits of the decay, and new conv states."""
        qkv, conv = self.project(x, context)
        if not self.use_short_conv:
            qkv = [F.silu(y) for y in qkv]
        q, k = (y.unflatten(-1, (self.num_heads, self.head_k_dim)) for y in qkv[:2])
        v = qkv[2].unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return q, k, v, self.f_proj(x).unflatten(-1, (self.gate_heads, self.head_k_dim)), conv

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and output projection."""
        return self.o_proj(self.o_norm(o, self.g_proj(x).view_as(o)).flatten(-2))


class KimiDeltaAttention(ChannelGated):
    """KDA between projections, on `[B, T, hidden_size]`.

        q, k, v = silu(conv(W x))        beta = sigmoid(W_b x)
        g = -exp(A_log) softplus(W_f x + dt_bias)
        o = W_o (rms_norm(kda(q/|q|, k/|k|, v, g, beta)) * sigmoid(W_g x))

    With `lower_bound` (which `safe_gate` asks for)
    `g = lower_bound sigmoid(exp(A_log) (W_f x + dt_bias))`. `allow_neg_eigval` doubles beta.

    Example:
        >>> layer = KimiDeltaAttention(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
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
        if safe_gate and lower_bound is None:
            raise ValueError("KimiDeltaAttention: safe_gate needs lower_bound; pass it")
        self.lower_bound = lower_bound
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, g, conv = self.heads(x, context)
        rule = fused_recurrent_kda if self.token_by_token(x) else chunk_kda
        o, state = rule(
            q,
            k,
            v,
            g,
            self.b_proj(x),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            lower_bound=self.lower_bound,
            **context.sequences,
        )
        return self.finish(o, x), context.after(state, conv)
