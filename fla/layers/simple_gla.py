# SPDX-License-Identifier: MIT
"""Simple gated linear attention: Yang et al. (2023), arXiv:2312.06635, with one decay per head."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.gla import GatedProjections
from fla.layers.mixer import Context, State
from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla


class SimpleGatedLinearAttention(GatedProjections):
    """Simple GLA between projections, on `[B, T, hidden_size]`; as `GatedLinearAttention` with
    `g = log sigmoid(W_gk x + c) / gate_logit_normalizer`, one number per head.

    Example:
        >>> import torch
        >>> SimpleGatedLinearAttention(hidden_size=64)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 16,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ):
        super().__init__(
            mode,
            hidden_size,
            expand_k,
            expand_v,
            num_heads,
            num_kv_heads,
            feature_map,
            use_short_conv,
            conv_size,
            conv_bias,
            True,
            gate_fn,
            elementwise_affine,
            norm_eps,
            fuse_norm,
            layer_idx,
        )
        self.gk_proj = nn.Linear(hidden_size, num_heads)
        self.gate_logit_normalizer = gate_logit_normalizer

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, conv = self.heads(x, context)
        g = F.logsigmoid(promote_to_fp32(self.gk_proj(x))) / self.gate_logit_normalizer
        rule = fused_recurrent_simple_gla if self.token_by_token(x) else chunk_simple_gla
        o, state = rule(q, k, v, g, **context.sequences)
        return self.finish(o, x), context.after(state, conv)
