# SPDX-License-Identifier: MIT
"""DeltaNet: Yang, Wang, Zhang, Shen, Kim (2024), arXiv:2406.06484."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, whole
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}


class DeltaNet(RecurrentMixer):
    """The delta rule between projections, on `[B, T, hidden_size]`.

        q, k = norm(act(conv(W x)))        v = silu(conv(W_v x))        beta = sigmoid(W_b x)
        o = W_o rms_norm(delta_rule(q, k, v, beta))             (times silu(W_g x) with use_gate)

    qk_activation is silu, relu, elu (plus 1) or identity; qk_norm is "l2" or "sum" (divide by the
    sum of absolute values, at least 1e-6).

    Example:
        >>> DeltaNet(hidden_size=64, num_heads=2)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        d_model: int | None = None,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.mode, self.layer_idx = check_mode("DeltaNet", mode), layer_idx
        if qk_activation not in ACTIVATIONS:
            raise ValueError(
                f"DeltaNet: qk_activation is {qk_activation!r}; expected one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if qk_norm not in ("l2", "sum"):
            raise ValueError(f"DeltaNet: qk_norm is {qk_norm!r}; expected 'l2' or 'sum'")
        hidden_size = hidden_size if d_model is None else d_model
        self.hidden_size = hidden_size
        key_dim = whole("DeltaNet", "hidden_size * expand_k", hidden_size * expand_k)
        value_dim = whole("DeltaNet", "hidden_size * expand_v", hidden_size * expand_v)
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(
                f"DeltaNet: key width {key_dim} and value width {value_dim} must be multiples of "
                f"num_heads={num_heads}"
            )
        self.num_heads, self.head_v_dim = num_heads, value_dim // num_heads
        self.use_beta, self.use_gate, self.use_short_conv = use_beta, use_gate, use_short_conv
        self.allow_neg_eigval, self.qk_activation, self.qk_norm = (
            allow_neg_eigval,
            qk_activation,
            qk_norm,
        )
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        if use_short_conv:
            inner = "silu" if qk_activation == "silu" else None
            self.q_conv1d = ShortConvolution(key_dim, conv_size, conv_bias, activation=inner)
            self.k_conv1d = ShortConvolution(key_dim, conv_size, conv_bias, activation=inner)
            self.v_conv1d = ShortConvolution(value_dim, conv_size, conv_bias, activation="silu")
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
            self.o_norm = FusedRMSNormGated(self.head_v_dim, eps=norm_eps)
        else:
            self.o_norm = RMSNorm(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        qkv = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        conv: tuple[Tensor, ...] = ()
        activated = self.use_short_conv and self.qk_activation == "silu"
        if self.use_short_conv:
            qkv, conv = self.convolve(qkv, context)
        else:
            qkv[2] = F.silu(qkv[2])
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in qkv)
        if not activated:
            q, k = (ACTIVATIONS[self.qk_activation](y) for y in (q, k))
        if self.qk_norm == "sum":
            q, k = (F.normalize(y, p=1.0, dim=-1, eps=1e-6) for y in (q, k))
        if self.use_beta:
            beta = self.b_proj(x).sigmoid()
        else:
            beta = x.new_ones(*x.shape[:-1], self.num_heads)
        if self.allow_neg_eigval:
            beta = 2 * beta
        rule = fused_recurrent_delta_rule if self.token_by_token(x) else chunk_delta_rule
        o, recurrent = rule(
            q,
            k,
            v,
            beta,
            use_qk_l2norm_in_kernel=self.qk_norm == "l2",
            **context.sequences,
        )
        o = self.o_norm(o, self.g_proj(x).view_as(o)) if self.use_gate else self.o_norm(o)
        return self.o_proj(o.flatten(-2)), context.after(recurrent, conv)
