# SPDX-License-Identifier: MIT
"""A transformer some of whose attention layers are linear: what `fla linearize` makes."""

from typing import Any, ClassVar

from fla.layers.linearized import LinearizedAttention, LinearOptions
from fla.models.configuration_utils import get_attention_spec, parse_attention_config
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register
from fla.models.transformer import TransformerConfig


class HybridConfig(TransformerConfig):
    """`TransformerConfig` whose `layer_types` may hold "linear_attention"; `linear` is a dictionary
    of `fla.layers.linearized.LinearOptions`.
    """

    model_type = "hybrid"
    mixer: ClassVar[Any] = LinearizedAttention

    linear: dict | None = None

    def __post_init__(self, **kwargs):
        LinearOptions.of(self.linear or {})
        super().__post_init__(**kwargs)


class HybridModel(DecoderModel):
    config_class = HybridConfig


class HybridForCausalLM(DecoderForCausalLM):
    config_class = HybridConfig
    model_class = HybridModel


# The names under which the published package's file of this name held two helpers.
normalize_hybrid_attention_config = parse_attention_config
get_hybrid_attention_spec = get_attention_spec

register(HybridConfig, HybridModel, HybridForCausalLM)
