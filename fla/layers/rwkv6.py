# SPDX-License-Identifier: MIT
"""RWKV-6 time mixing and channel mixing: Peng et al. (2024), arXiv:2404.05892."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, multiple, whole
from fla.modules import GroupNorm
from fla.modules.activations import ACT2FN, activation
from fla.modules.linear import weight_of
from fla.modules.token_shift import token_shift
from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6

LORA_ACTIVATIONS = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    None: nn.Identity,
}


class LoRA(nn.Module):
    """`B act(A x) + c` through `low_rank_dim` channels."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        low_rank_dim: int,
        bias: bool = True,
        activation: str | None = "tanh",
    ):
        super().__init__()
        if activation not in LORA_ACTIVATIONS:
            raise ValueError(
                f"LoRA: activation is {activation!r}; expected tanh, sigmoid, relu or None"
            )
        self.lora = nn.Sequential(
            nn.Linear(input_dim, low_rank_dim, bias=False),
            LORA_ACTIVATIONS[activation](),
            nn.Linear(low_rank_dim, output_dim, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


def _linear(input_dim: int, output_dim: int, low_rank_dim: int | None) -> nn.Module:
    if low_rank_dim is None:
        return nn.Linear(input_dim, output_dim, bias=False)
    return LoRA(input_dim, output_dim, low_rank_dim)


class LerpLinear(nn.Module):
    """`W (x + delta mu)` with a learnt mix mu per channel; `low_rank_dim` makes W a LoRA."""

    def __init__(self, input_dim: int, output_dim: int, low_rank_dim: int | None = None):
        super().__init__()
        self.linear = _linear(input_dim, output_dim, low_rank_dim)
        self.mu = nn.Parameter(torch.zeros(input_dim))

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.linear(torch.addcmul(x, delta, self.mu))


class DDLerpLinear(nn.Module):
    """`W (x + delta mu)` with a mix mu per token."""

    def __init__(self, input_dim: int, output_dim: int, low_rank_dim: int | None = None):
        super().__init__()
        self.linear = _linear(input_dim, output_dim, low_rank_dim)

    def forward(self, x: Tensor, mu: Tensor, delta: Tensor) -> Tensor:
        return self.linear(torch.addcmul(x, delta, mu))


class RWKV6Attention(RecurrentMixer):
    """RWKV-6 time mixing, on `[B, T, hidden_size]`. With the token before, d_t = x_{t-1} - x_t:

        m = x_bias + tanh(X (x + d mu)) X'         five mixes, one each for r, w, k, v, g
        r, k, v, g = W (x + d m)        w = -exp(lora_w(x + d m))
        o = W_o (group_norm(rwkv6(r, k, v, w, bonus)) * gate_fn(g))

    `fuse_norm` is kept for published configs.

    Example:
        >>> RWKV6Attention(hidden_size=64, num_heads=2)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    x_bias: Tensor
    bonus: Tensor

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        gate_fn: str = "swish",
        proj_low_rank_dim: int = 32,
        gate_low_rank_dim: int = 64,
        fuse_norm: bool = True,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ):
        super().__init__()
        name = "RWKV6Attention"
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        if gate_fn not in ACT2FN:
            raise ValueError(f"{name}: gate_fn is {gate_fn!r}; expected one of {', '.join(ACT2FN)}")
        key_dim = whole(name, "hidden_size * expand_k", hidden_size * expand_k)
        value_dim = whole(name, "hidden_size * expand_v", hidden_size * expand_v)
        self.num_heads, self.gate_fn = num_heads, gate_fn
        head_k = multiple(name, "the key width", key_dim, "num_heads", num_heads)
        multiple(name, "the value width", value_dim, "num_heads", num_heads)
        self.x_proj = nn.Sequential(
            LerpLinear(hidden_size, proj_low_rank_dim * 5),
            nn.Tanh(),
            nn.Linear(proj_low_rank_dim * 5, hidden_size, bias=False),
        )
        self.x_bias = nn.Parameter(torch.zeros(5, hidden_size))
        self.r_proj = DDLerpLinear(hidden_size, key_dim)
        self.w_proj = DDLerpLinear(hidden_size, key_dim, low_rank_dim=gate_low_rank_dim)
        self.k_proj = DDLerpLinear(hidden_size, key_dim)
        self.v_proj = DDLerpLinear(hidden_size, value_dim)
        self.g_proj = DDLerpLinear(hidden_size, value_dim)
        self.bonus = nn.Parameter(torch.zeros(num_heads, head_k))
        self.g_norm = GroupNorm(num_heads, value_dim, elementwise_affine, True, norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        before = None if context.state is None else context.state.conv[0]
        delta, last = token_shift(x, context.cu_seqlens, before, output_cache=True)
        mixes = self._mixes(self.x_proj[0](x, delta).unflatten(-1, (5, -1)).tanh())
        r, w, k, v, g = (
            proj(x, mu, delta)
            for proj, mu in zip(
                (self.r_proj, self.w_proj, self.k_proj, self.v_proj, self.g_proj),
                mixes.unbind(-2),
                strict=True,
            )
        )
        r, k, w, v = (
            y.unflatten(-1, (self.num_heads, -1)) for y in (r, k, -promote_to_fp32(w).exp(), v)
        )
        rule = fused_recurrent_rwkv6 if self.token_by_token(x) else chunk_rwkv6
        o, state = rule(r, k, v, w, self.bonus, scale=1.0, **context.sequences)
        o = self.g_norm(o.flatten(-2)) * ACT2FN[self.gate_fn](g)
        return self.o_proj(o), context.after(state, (last,))

    def _mixes(self, low: Tensor) -> Tensor:
        """How much of the token before r, w, k, v and g read, `[B, T, 5, D]`, from low
        `[B, T, 5, rank]`: each reads its own columns of one map.
        """
        up = weight_of(self.x_proj[2], 5 * low.shape[-1], low).unflatten(1, (5, -1))
        return torch.einsum("btnr,hnr->btnh", low, up) + self.x_bias


class RWKV6FeedForward(nn.Module):
    """RWKV-6 channel mixing: `sigmoid(W_r m_r) * W_v act(W_k m_k)` on token-shifted mixes m."""

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: float | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "sqrelu",
        layer_idx: int | None = None,
    ):
        super().__init__()
        self.layer_idx = layer_idx  # kept as published; the block keeps the shift's state
        if intermediate_size is None:
            ratio = 3.5 if hidden_ratio is None else hidden_ratio
            intermediate_size = 32 * -(-int(hidden_size * ratio) // 32)
        self.key = LerpLinear(hidden_size, intermediate_size)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.receptance = LerpLinear(hidden_size, hidden_size)
        self.act = activation(type(self).__name__, hidden_act)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(y, the last token of every sequence)."""
        delta, last = token_shift(x, cu_seqlens, before, output_cache=True)
        value = self.value(self.act(self.key(x, delta)))
        return F.sigmoid(self.receptance(x, delta)) * value, last
