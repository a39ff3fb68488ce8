# SPDX-License-Identifier: MIT
"""Multi-scale retention: Sun et al. (2023), arXiv:2307.08621."""

from torch import Tensor

from fla.layers.gla import GatedProjections
from fla.layers.mixer import Context, State
from fla.modules import RotaryEmbedding
from fla.ops.retention import chunk_retention, fused_recurrent_retention


class MultiScaleRetention(GatedProjections):
    """Retention between projections, on `[B, T, hidden_size]`.

        q, k = rotary(W x)        v = W_v x
        o = W_o (rms_norm(retention(q, k, v)) * swish(W_g x))

    Example:
        >>> import torch
        >>> MultiScaleRetention(hidden_size=64, num_heads=2)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
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
            use_output_gate,
            gate_fn,
            elementwise_affine,
            norm_eps,
            fuse_norm,
            layer_idx,
        )
        self.rotary = RotaryEmbedding(self.head_k_dim)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, conv = self.heads(x, context)
        q, k = self.rotary(q, k, positions=context.layout.positions(x.device))
        rule = fused_recurrent_retention if self.token_by_token(x) else chunk_retention
        o, state = rule(q, k, v, **context.sequences)
        return self.finish(o, x), context.after(state, conv)
