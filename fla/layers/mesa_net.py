# SPDX-License-Identifier: MIT
"""MesaNet: von Oswald et al. (2025), arXiv:2506.05233."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mixer import Context, RecurrentMixer, State, register
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.ops.mesa_net import chunk_mesa_net


class MesaNet(RecurrentMixer):
    """MesaNet between projections, on `[B, T, hidden_size]`.

        q, k = silu(conv(W x))        v = W_v x
        g = log sigmoid(W_a x + c)        beta = sigmoid(W_b x + d)
        lambda = lambda_lower_bound + softplus(lambda_params)
        o = W_o rms_norm(mesa(q/|q|, k/|k|, v, g, beta, lambda))   (with the gate times silu(W_g x))

    `max_cg_step_training` iterations solve for every token, `max_cg_step_decoding` in evaluation.

    Example:
        >>> layer = MesaNet(hidden_size=64, num_heads=2, head_dim=16)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    lambda_params: Tensor

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 16,
        head_dim: int = 128,
        mode: str = "chunk",
        use_output_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        lambda_lower_bound: float = 0.25,
        max_cg_step_training: int = 30,
        max_cg_step_decoding: int = 30,
    ):
        super().__init__()
        if mode != "chunk":
            raise ValueError(f"MesaNet: mode is {mode!r}; expected 'chunk'")
        self.mode, self.layer_idx = mode, layer_idx
        self.num_heads, self.head_dim = num_heads, head_dim
        self.use_output_gate, self.use_short_conv = use_output_gate, use_short_conv
        self.lambda_lower_bound = lambda_lower_bound
        self.max_cg_step_training = max_cg_step_training
        self.max_cg_step_decoding = max_cg_step_decoding
        width = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_heads)
        self.b_proj = nn.Linear(hidden_size, num_heads)
        register(self)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(width, conv_size, bias=conv_bias)
            self.k_conv1d = ShortConvolution(width, conv_size, bias=conv_bias)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, width, bias=False)
            self.o_norm = FusedRMSNormGated(head_dim, eps=norm_eps)
        else:
            self.o_norm = RMSNorm(head_dim, eps=norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        """lambda starts at 1, or at twice its lower bound where that is more."""
        above = max(1 - self.lambda_lower_bound, self.lambda_lower_bound)
        size = self.num_heads * self.head_dim
        return {"lambda_params": torch.full((size,), math.log(math.expm1(above)))}

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (q, k), conv = self.project(x, context, "qk")
        if not self.use_short_conv:
            q, k = F.silu(q), F.silu(k)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, self.v_proj(x)))
        lamb = self.lambda_lower_bound + F.softplus(promote_to_fp32(self.lambda_params))
        A, S = (None, None) if context.recurrent is None else context.recurrent
        o, *states = chunk_mesa_net(
            q,
            k,
            v,
            F.logsigmoid(promote_to_fp32(self.a_proj(x))),
            self.b_proj(x).sigmoid(),
            lamb.view(self.num_heads, -1),
            A,
            S,
            context.keep,
            self.max_cg_step_training if self.training else self.max_cg_step_decoding,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=context.cu_seqlens,
        )
        gate = [self.g_proj(x).view_as(o)] if self.use_output_gate else []
        return self.o_proj(self.o_norm(o, *gate).flatten(-2)), context.after(tuple(states), conv)
