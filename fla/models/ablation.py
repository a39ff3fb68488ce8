# SPDX-License-Identifier: MIT
"""Gated DeltaNet with parts of its rule left out, to see what each is worth."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fla.layers.gated_deltanet import GatedDeltaNet
from fla.layers.mixer import Context, State
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register
from fla.ops.delta_rule import chunk_delta_rule
from fla.ops.engine.recurrence.gates import l2norm, softplus_gate
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.simple_gla import chunk_simple_gla

PARTS = ("decay", "delta", "l2norm")


class AblatedGatedDeltaNet(GatedDeltaNet):
    """`GatedDeltaNet` without some of its parts:

        decay     S <- S + beta k (v - S^T k)^T                the delta rule
        delta     S <- exp(g) S + beta k v^T                   nothing is erased
        l2norm    q and k divided by sqrt(head_dim) instead    lengths are free

    Output gate, convolution and eigenvalues are options of `GatedDeltaNet`.

    Example:
        >>> layer = AblatedGatedDeltaNet(64, head_dim=16, num_heads=2, without=["delta"])
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        without: list[str] | tuple[str, ...] = (),
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__(
            hidden_size, expand_v, head_dim, num_heads, num_v_heads, "chunk", use_gate,
            use_short_conv, allow_neg_eigval, conv_size, layer_idx=layer_idx, norm_eps=norm_eps,
        )  # fmt: skip
        unknown = set(without) - set(PARTS)
        if unknown:
            raise ValueError(
                f"AblatedGatedDeltaNet: without holds {', '.join(sorted(unknown))}; expected some "
                f"of {', '.join(PARTS)}"
            )
        self.without = set(without)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, conv = self.heads(x, context)
        normal = "l2norm" not in self.without
        if not normal:
            q, k = (y * self.head_k_dim**-0.5 for y in (q, k))
        beta = self.beta(self.b_proj(x))
        g = softplus_gate(self.a_proj(x), self.A_log, self.dt_bias)
        rest: dict[str, Any] = dict(context.sequences, use_qk_l2norm_in_kernel=normal)
        if "delta" in self.without:
            if normal:
                q, k = l2norm(q), l2norm(k)
            del rest["use_qk_l2norm_in_kernel"]
            decay = None if "decay" in self.without else g
            values = beta[..., None].to(v.dtype) * v
            o, recurrent = chunk_simple_gla(q, k, values, g=decay, **rest)
        elif "decay" in self.without:
            o, recurrent = chunk_delta_rule(q, k, v, beta=beta, **rest)
        else:
            o, recurrent = chunk_gated_delta_rule(q, k, v, g=g, beta=beta, **rest)
        return self.finish(o, x), context.after(recurrent, conv)


class AblatedGatedDeltaNetConfig(DecoderConfig):
    """`GatedDeltaNetConfig` with `without`, the parts that are left out."""

    model_type = "gated_deltanet_ablated"
    mixer: ClassVar = AblatedGatedDeltaNet

    expand_v: int | float = 2.0
    use_gate: bool = True
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    without: list[str] | None = None

    def __post_init__(self, **kwargs):
        self.without = list(self.without or [])
        super().__post_init__(**kwargs)


class AblatedGatedDeltaNetModel(DecoderModel):
    config_class = AblatedGatedDeltaNetConfig


class AblatedGatedDeltaNetForCausalLM(DecoderForCausalLM):
    config_class = AblatedGatedDeltaNetConfig
    model_class = AblatedGatedDeltaNetModel


register(AblatedGatedDeltaNetConfig, AblatedGatedDeltaNetModel, AblatedGatedDeltaNetForCausalLM)
