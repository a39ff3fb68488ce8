# SPDX-License-Identifier: MIT
"""Blocks of architectures that do not follow `decoder.Block`: one mixer alone, other names for the
same parts, and RWKV's channel mixing.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from fla.core.layout import SequenceLayout
from fla.core.precision import promote_to_fp32
from fla.layers.rwkv4 import RWKV4FeedForward
from fla.layers.rwkv6 import RWKV6FeedForward
from fla.layers.rwkv7 import RWKV7FeedForward
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderBlock, DecoderForCausalLM, DecoderModel, build_mixer
from fla.models.utils import Cache
from fla.modules import GatedMLP, LayerNorm, RMSNorm, SubNormMLP


class MixerBlock(DecoderBlock):
    """`h + mixer(norm(h))`: Mamba's block. `residual_in_fp32` adds in fp32."""

    mixer_name = "mixer"

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = build_mixer(config, layer_idx)
        self.residual_in_fp32 = getattr(config, "residual_in_fp32", False)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        *handed: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor | None, ...]:
        read = self.norm(hidden).to(self.norm.weight.dtype)
        mixed, given = self.mixed(read, layout, handed, past_key_values)
        return (promote_to_fp32(hidden) if self.residual_in_fp32 else hidden) + mixed, *given


class MixerMLPBlock(DecoderBlock):
    """`decoder.Block` under the names mixer_norm, mixer, mlp_norm, mlp."""

    mixer_name = "mixer"

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = build_mixer(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(
            config.hidden_size, config.hidden_ratio, config.mlp_width, config.hidden_act
        )

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        *handed: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor | None, ...]:
        mixed, given = self.mixed(self.mixer_norm(hidden), layout, handed, past_key_values)
        hidden, residual = self.mlp_norm(mixed, residual=hidden, prenorm=True)
        return residual + self.mlp(hidden), *given


class SubNormBlock(DecoderBlock):
    """`h + attn(attn_norm(h))`, then `h + mlp(mlp_norm(h))` with LayerNorms, one of them in the
    middle of the MLP (sub-LN, MAGNETO, arXiv:2210.06423); the attention brings its own.
    """

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = build_mixer(config, layer_idx)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        width = config.intermediate_size or 4 * config.hidden_size
        self.mlp = SubNormMLP(config.hidden_size, width, config.hidden_act, config.norm_eps)
        # gains of Xavier's initialisation: maps that write grow with the depth
        gain = math.sqrt(math.log(2 * config.num_hidden_layers))
        for name in ("attn.q_proj", "attn.k_proj"):
            self.get_submodule(name).gain = 1.0  # type: ignore[assignment]
        for name in ("attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2"):
            self.get_submodule(name).gain = gain  # type: ignore[assignment]

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        *handed: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor | None, ...]:
        mixed, given = self.mixed(self.attn_norm(hidden), layout, handed, past_key_values)
        hidden, residual = self.mlp_norm(mixed, residual=hidden, prenorm=True)
        return residual + self.mlp(hidden), *given


class RWKVBlock(DecoderBlock):
    """`h + attn(attn_norm(h))`, then `h + ffn(ffn_norm(h))` with LayerNorms; the first layer norms
    the embeddings. The channel mixing's last token lies in the cache beside the mixer's state.
    """

    feed_forward: ClassVar[Any]

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        norm: dict[str, Any] = dict(bias=config.norm_bias, eps=config.norm_eps)
        if config.norm_first and layer_idx == 0:
            self.pre_norm = LayerNorm(config.hidden_size, **norm)
        self.attn_norm = LayerNorm(config.hidden_size, **norm)
        self.attn = build_mixer(config, layer_idx)
        self.ffn_norm = LayerNorm(config.hidden_size, **norm)
        self.ffn = self.feed_forward(
            config.hidden_size, config.hidden_ratio, config.intermediate_size, config.hidden_act
        )

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        *handed: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor | None, ...]:
        cache, i = past_key_values, self.layer_idx
        hidden = self.pre_norm(hidden) if hasattr(self, "pre_norm") else hidden
        mixed, given = self.mixed(self.attn_norm(hidden), layout, handed, cache)
        hidden, residual = self.ffn_norm(mixed, residual=hidden, prenorm=True)
        before = None if cache is None else cache.read_extra(i, "ffn")
        y, last = self.ffn(hidden, layout.cu_seqlens, before)
        if cache is not None:
            cache.write_extra(i, "ffn", last)
        return residual + y, *given


class RWKV4Block(RWKVBlock):
    feed_forward = RWKV4FeedForward


class RWKV6Block(RWKVBlock):
    feed_forward = RWKV6FeedForward


class RWKV7Block(RWKVBlock):
    feed_forward = RWKV7FeedForward


class BackboneModel(DecoderModel):
    """A decoder under the names of Mamba's checkpoints."""

    base_model_prefix = "backbone"
    norm_name = "norm_f"


class BackboneForCausalLM(DecoderForCausalLM):
    """A causal language model whose decoder is called `backbone`, as Mamba's checkpoints have
    it.
    """

    base_model_prefix = "backbone"
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012


def layer_norm_last(config: DecoderConfig) -> nn.Module:
    """The last norm where it is a LayerNorm."""
    bias = getattr(config, "norm_bias", True)
    return LayerNorm(config.hidden_size, bias=bias, eps=config.norm_eps)
