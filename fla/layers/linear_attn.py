# SPDX-License-Identifier: MIT
"""Linear attention with feature maps: Katharopoulos et al. (2020), arXiv:2006.16236."""

from collections.abc import Callable

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.layers.mixer import (
    Context,
    RecurrentMixer,
    State,
    check_mode,
    multiple,
    repeat_heads,
    whole,
)
from fla.modules import RMSNorm
from fla.modules.feature_map import (
    DPFPFeatureMap,
    HadamardFeatureMap,
    HedgehogFeatureMap,
    T2RFeatureMap,
)
from fla.ops.linear_attn import chunk_linear_attn, fused_recurrent_linear_attn


class _ELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


MAPS: dict[str, Callable[[int], nn.Module]] = {
    "hedgehog": HedgehogFeatureMap,
    "t2r": T2RFeatureMap,
    "elementwise_product": HadamardFeatureMap,
    "dpfp": DPFPFeatureMap,
    "elu": lambda _: _ELU(),
    "relu": lambda _: nn.ReLU(),
    "identity": lambda _: nn.Identity(),
}


class LinearAttention(RecurrentMixer):
    """Linear attention between projections, on `[B, T, hidden_size]`.

        q, k = phi(W x)        v = W_v x        o = W_o rms_norm(linear_attn(q, k, v))

    phi is hedgehog, t2r, elementwise_product, dpfp, elu (plus 1), relu or identity, one map for
    both where `tie_feature_map_qk`. `norm_q`, `norm_k` divide by the sum of entries,
    `do_feature_map_norm` o by its normaliser. `output_norm` is rmsnorm or identity.

    Example:
        >>> import torch
        >>> LinearAttention(hidden_size=64, num_heads=2)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str = "elementwise_product",
        tie_feature_map_qk: bool = False,
        output_norm: str = "rmsnorm",
        norm_q: bool = False,
        norm_k: bool = False,
        do_feature_map_norm: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ):
        super().__init__()
        name = "LinearAttention"
        self.mode = check_mode(name, "chunk" if mode == "fused_chunk" else mode)
        self.layer_idx, self.use_short_conv = layer_idx, False
        if feature_map not in MAPS:
            raise ValueError(
                f"{name}: feature_map is {feature_map!r}; expected one of {', '.join(MAPS)}"
            )
        if output_norm not in ("rmsnorm", "identity"):
            raise ValueError(
                f"{name}: output_norm is {output_norm!r}; expected rmsnorm or identity"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        groups = multiple(name, "num_heads", num_heads, "num_kv_heads", self.num_kv_heads)
        key_dim = whole(name, "hidden_size * expand_k", hidden_size * expand_k)
        value_dim = whole(name, "hidden_size * expand_v", hidden_size * expand_v)
        self.head_k_dim = multiple(name, "the key width", key_dim, "num_heads", num_heads)
        self.head_v_dim = multiple(name, "the value width", value_dim, "num_heads", num_heads)
        self.norm_q, self.norm_k, self.normalize = norm_q, norm_k, do_feature_map_norm
        self.feature_map_q = MAPS[feature_map](self.head_k_dim)
        self.feature_map_k = (
            self.feature_map_q if tie_feature_map_qk else MAPS[feature_map](self.head_k_dim)
        )
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim // groups, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim // groups, bias=False)
        self.norm: nn.Module = nn.Identity()
        if output_norm == "rmsnorm":
            self.norm = RMSNorm(self.head_v_dim, elementwise_affine, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (q, k, v), _ = self.project(x, context)
        q = self.feature_map_q(q.unflatten(-1, (-1, self.head_k_dim)))
        k = self.feature_map_k(k.unflatten(-1, (-1, self.head_k_dim)))
        q = q / (q.sum(-1, keepdim=True) + 1e-4) if self.norm_q else q
        k = k / (k.sum(-1, keepdim=True) + 1e-4) if self.norm_k else k
        v = v.unflatten(-1, (-1, self.head_v_dim))
        k, v = repeat_heads(self.num_heads, self.num_kv_heads, k, v)
        rule = fused_recurrent_linear_attn if self.token_by_token(x) else chunk_linear_attn
        o, state = rule(q, k, v, normalize=self.normalize, **context.sequences)
        return self.o_proj(self.norm(o).flatten(-2)), context.after(state)
