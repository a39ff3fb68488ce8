# SPDX-License-Identifier: MIT
"""RWKV-4 time mixing and channel mixing: Peng et al. (2023), arXiv:2305.13048."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, register
from fla.modules.activations import activation
from fla.modules.token_shift import token_shift
from fla.ops.rwkv4 import chunk_rwkv4, fused_recurrent_rwkv4


class RWKV4Attention(RecurrentMixer):
    """RWKV-4 time mixing, on `[B, T, hidden_size]`. With the token before, d_t = x_{t-1} - x_t:

        r, k, v = W_r (x + d x_r), W_k (x + d x_k), W_v (x + d x_v)
        o = W_o (sigmoid(r) * rwkv4(k, v, w, u))

    Example:
        >>> RWKV4Attention(hidden_size=64)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    w: Tensor
    u: Tensor

    def __init__(
        self,
        hidden_size: int = 1024,
        attention_size: int | None = None,
        mode: str = "chunk",
        layer_idx: int | None = None,
    ):
        super().__init__()
        self.mode, self.layer_idx = check_mode("RWKV4Attention", mode), layer_idx
        self.attention_size = attention_size or hidden_size
        self.x_r, self.x_k, self.x_v = (nn.Parameter(torch.zeros(hidden_size)) for _ in range(3))
        register(self)
        self.r_proj, self.k_proj, self.v_proj = (
            nn.Linear(hidden_size, self.attention_size, bias=False) for _ in range(3)
        )
        self.o_proj = nn.Linear(self.attention_size, hidden_size, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        """Decays from slow to fast over the channels, as in the paper; the current token counts a
        third more than its past.
        """
        # not linspace, which transformers patches while it builds a model on the meta device
        steps = torch.arange(self.attention_size) / max(1, self.attention_size - 1)
        return {"w": -5 + 8 * steps**0.7, "u": torch.full_like(steps, 0.3).log()}

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        before = None if context.state is None else context.state.conv[0]
        delta, last = token_shift(x, context.cu_seqlens, before, output_cache=True)
        r, k, v = (
            proj(torch.addcmul(x, delta, mix))
            for proj, mix in (
                (self.r_proj, self.x_r),
                (self.k_proj, self.x_k),
                (self.v_proj, self.x_v),
            )
        )
        rule = fused_recurrent_rwkv4 if self.token_by_token(x) else chunk_rwkv4
        o, state = rule(
            self.w,
            self.u,
            k,
            v,
            state=context.recurrent,
            output_final_state=context.keep,
            cu_seqlens=context.cu_seqlens,
        )
        return self.o_proj(r.sigmoid() * o), context.after(state, (last,))


class RWKV4FeedForward(nn.Module):
    """RWKV-4 channel mixing: `sigmoid(W_r (x + d x_r)) * W_v act(W_k (x + d x_k))`."""

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: float | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "sqrelu",
    ):
        super().__init__()
        width = intermediate_size or int(
            hidden_size * (4 if hidden_ratio is None else hidden_ratio)
        )
        self.x_k, self.x_r = (nn.Parameter(torch.zeros(hidden_size)) for _ in range(2))
        self.key = nn.Linear(hidden_size, width, bias=False)
        self.value = nn.Linear(width, hidden_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.act = activation(type(self).__name__, hidden_act)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(y, the last token of every sequence)."""
        delta, last = token_shift(x, cu_seqlens, before, output_cache=True)
        value = self.value(self.act(self.key(torch.addcmul(x, delta, self.x_k))))
        gate = F.sigmoid(self.receptance(torch.addcmul(x, delta, self.x_r)))
        return gate * value, last
