# SPDX-License-Identifier: MIT
"""Based and ReBased: linear attention with polynomial feature maps, arXiv:2402.18668 and
arXiv:2402.10644.
"""

from typing import Any

import torch.nn as nn
from torch import Tensor

from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, multiple, repeat_heads
from fla.modules.feature_map import RebasedFeatureMap
from fla.ops.based import chunk_based, fused_recurrent_based
from fla.ops.rebased import chunk_rebased, fused_recurrent_rebased


class _Polynomial(RecurrentMixer):
    """Projections to `feature_dim` per query and key head and to head_dim per value head."""

    def __init__(
        self,
        hidden_size: int,
        feature_dim: int,
        num_key_value_heads: int,
        num_heads: int,
        causal: bool,
        mode: str,
        layer_idx: int | None,
    ):
        super().__init__()
        name = type(self).__name__
        if not causal:
            raise ValueError(f"{name}: causal=False is not supported; leave it True")
        # the parallel and fused forms give the numbers of the chunk form
        known = ("parallel", "fused_chunk")
        self.mode = check_mode(name, "chunk" if mode in known else mode)
        self.layer_idx, self.use_short_conv = layer_idx, False
        self.num_heads, self.num_kv_heads = num_heads, num_key_value_heads
        multiple(name, "num_heads", num_heads, "num_key_value_heads", num_key_value_heads)
        head_dim = multiple(name, "hidden_size", hidden_size, "num_heads", num_heads)
        self.feature_dim, self.head_dim = feature_dim, head_dim
        self.q_proj = nn.Linear(hidden_size, feature_dim * num_heads, bias=False)
        self.k_proj = nn.Linear(hidden_size, feature_dim * num_key_value_heads, bias=False)
        self.v_proj = nn.Linear(hidden_size, head_dim * num_key_value_heads, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def heads(self, x: Tensor, context: Context) -> Any:
        """q, k `[B, T, H, feature_dim]`, v `[B, T, H, head_dim]`."""
        (q, k, v), _ = self.project(x, context)
        q, k = (y.unflatten(-1, (-1, self.feature_dim)) for y in (q, k))
        v = v.unflatten(-1, (-1, self.head_dim))
        return [q, *repeat_heads(self.num_heads, self.num_kv_heads, k, v)]


class BasedLinearAttention(_Polynomial):
    """Taylor linear attention between projections, on `[B, T, hidden_size]`:
    `o = W_o based(W_q x, W_k x, W_v x)`.

    `eps` is the operator's, 1e-12.

    Example:
        >>> import torch
        >>> layer = BasedLinearAttention(48, feature_dim=4, num_heads=3, num_key_value_heads=3)
        >>> layer(torch.randn(2, 10, 48))[0].shape
        torch.Size([2, 10, 48])
    """

    def __init__(
        self,
        hidden_size: int,
        feature_dim: int = 16,
        num_key_value_heads: int = 12,
        num_heads: int = 12,
        feature_name: str = "taylor_exp",
        eps: float = 1e-12,
        causal: bool = True,
        mode: str = "parallel",
        layer_idx: int | None = None,
    ):
        super().__init__(
            hidden_size, feature_dim, num_key_value_heads, num_heads, causal, mode, layer_idx
        )
        if feature_name != "taylor_exp":
            raise ValueError(
                f"BasedLinearAttention: feature_name is {feature_name!r}; expected 'taylor_exp'"
            )
        if eps != 1e-12:
            raise ValueError(
                f"BasedLinearAttention: eps is {eps}, which the operator fixes; drop it"
            )

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        rule = fused_recurrent_based if self.token_by_token(x) else chunk_based
        o, state = rule(*self.heads(x, context), **context.sequences)
        return self.o_proj(o.flatten(-2)), context.after(state)


class ReBasedLinearAttention(_Polynomial):
    """Squared linear attention between projections, on `[B, T, hidden_size]`:
    `o = W_o rebased(phi(W_q x), phi(W_k x), W_v x)` with `phi(x) = gamma norm(x) + beta`. `l_max`
    limits nothing, here as in published code.

    Example:
        >>> import torch
        >>> layer = ReBasedLinearAttention(48, feature_dim=4, num_heads=3, num_key_value_heads=3)
        >>> layer(torch.randn(2, 10, 48))[0].shape
        torch.Size([2, 10, 48])
    """

    def __init__(
        self,
        hidden_size: int,
        l_max: int = 2048,
        feature_dim: int = 16,
        num_key_value_heads: int = 16,
        num_heads: int = 16,
        use_gamma: bool = True,
        use_beta: bool = True,
        normalize: bool = True,
        causal: bool = True,
        eps: float = 1e-5,
        mode: str = "parallel",
        layer_idx: int | None = None,
    ):
        super().__init__(
            hidden_size, feature_dim, num_key_value_heads, num_heads, causal, mode, layer_idx
        )
        self.eps = eps
        self.feature_map = RebasedFeatureMap(feature_dim, use_gamma, use_beta, normalize)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v = self.heads(x, context)
        q, k = (self.feature_map(y, flatten=False) for y in (q, k))
        rule = fused_recurrent_rebased if self.token_by_token(x) else chunk_rebased
        o, state = rule(q, k, v, eps=self.eps, **context.sequences)
        return self.o_proj(o.flatten(-2)), context.after(state)
