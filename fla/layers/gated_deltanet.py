# SPDX-License-Identifier: MIT
"""Gated DeltaNet: Yang, Kautz, Hatamizadeh (2024), arXiv:2412.06464."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, gate_steps, register, whole
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.modules.fused_norm_gate import ACTIVATIONS
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


class GatedDeltaNet(RecurrentMixer):
    """The gated delta rule between projections, on `[B, T, hidden_size]`.

        q, k, v = silu(conv(W x))
        beta = sigmoid(W_b x)        g = -exp(A_log) softplus(W_a x + dt_bias)
        o = W_o (rms_norm(gated_delta_rule(q/|q|, k/|k|, v, g, beta)) * act(W_g x))

    q and k have num_heads heads of head_dim, v has num_v_heads of head_dim * expand_v.
    act is silu, or sigmoid by `output_gate_activation` ("swish" and "silu" are the same).
    `allow_neg_eigval` doubles beta. `o_norm_eps` is the output norm's where it is not `norm_eps`.

    Example:
        >>> layer = GatedDeltaNet(hidden_size=64, head_dim=16, num_heads=2)
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
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
        o_norm_eps: float | None = None,
    ):
        super().__init__()
        self.mode, self.layer_idx = check_mode("GatedDeltaNet", mode), layer_idx
        self.num_heads, self.num_v_heads = num_heads, num_v_heads or num_heads
        if self.num_v_heads % num_heads:
            raise ValueError(
                f"GatedDeltaNet: num_v_heads is {num_v_heads}; it must be a multiple of "
                f"num_heads={num_heads}"
            )
        if output_gate_activation not in ACTIVATIONS:
            raise ValueError(
                f"{type(self).__name__}: output_gate_activation is {output_gate_activation!r}; "
                f"expected one of {', '.join(ACTIVATIONS)}"
            )
        self.head_k_dim = head_dim
        self.head_v_dim = whole("GatedDeltaNet", "head_dim * expand_v", head_dim * expand_v)
        self.use_gate, self.use_short_conv = use_gate, use_short_conv
        self.allow_neg_eigval = allow_neg_eigval
        key_dim, value_dim = num_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        register(self)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, conv_size, bias=conv_bias)
            self.k_conv1d = ShortConvolution(key_dim, conv_size, bias=conv_bias)
            self.v_conv1d = ShortConvolution(value_dim, conv_size, bias=conv_bias)
        eps = norm_eps if o_norm_eps is None else o_norm_eps
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
            self.o_norm = FusedRMSNormGated(
                self.head_v_dim, eps=eps, activation=output_gate_activation
            )
        else:
            self.o_norm = RMSNorm(self.head_v_dim, eps=eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        """Decay rates A in (0, 16], time steps log-uniform in [0.001, 0.1]."""
        A = torch.empty(self.num_v_heads).uniform_(1e-3, 16)
        return {"A_log": A.log(), "dt_bias": gate_steps(self.num_v_heads)}

    def heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, tuple]:
        """q, k, v after convolution and activation, and new conv states."""
        qkv, conv = self.project(x, context)
        if not self.use_short_conv:
            qkv = [F.silu(y) for y in qkv]
        q, k = (y.unflatten(-1, (self.num_heads, self.head_k_dim)) for y in qkv[:2])
        return q, k, qkv[2].unflatten(-1, (self.num_v_heads, self.head_v_dim)), conv

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and output projection."""
        o = self.o_norm(o, self.g_proj(x).view_as(o)) if self.use_gate else self.o_norm(o)
        return self.o_proj(o.flatten(-2))

    def beta(self, logits: Tensor) -> Tensor:
        """`sigmoid(logits)`, doubled by `allow_neg_eigval`."""
        return logits.sigmoid() * (2 if self.allow_neg_eigval else 1)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, conv = self.heads(x, context)
        token = self.token_by_token(x)
        rule = fused_recurrent_gated_delta_rule if token else chunk_gated_delta_rule
        o, recurrent = rule(
            q,
            k,
            v,
            g=self.a_proj(x),
            beta=self.b_proj(x),
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            **context.sequences,
        )
        return self.finish(o, x), context.after(recurrent, conv)
