# SPDX-License-Identifier: MIT
"""LongNet, Ding et al. (2023), arXiv:2307.02486: dilated attention in blocks with sub-LN."""

from typing import Any, ClassVar

from torch import nn
from transformers import initialization as init

from fla.layers.dilated_attn import RATES, SEGMENTS, DilatedAttention
from fla.models.blocks import SubNormBlock, layer_norm_last
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register

PRESETS = {  # tables 3 and 4 of the paper
    "125m": dict(num_hidden_layers=12, hidden_size=768, num_heads=12),
    "350m": dict(num_hidden_layers=24, hidden_size=1024, num_heads=16),
    "760m": dict(num_hidden_layers=24, hidden_size=1536, num_heads=16),
    "2.7b": dict(num_hidden_layers=32, hidden_size=2560, num_heads=32),
}


class LongNetConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.DilatedAttention`; `causal=False` is an
    encoder (`LongNetModel` without a cache). Positions are rotary where the paper has xPos, whose
    factors overflow at the lengths this is for.

    Example:
        >>> LongNetConfig.preset("350m", vocab_size=256).hidden_size
        1024
    """

    model_type = "longnet"
    attention: ClassVar[Any] = DilatedAttention
    default_layer_type: ClassVar[str] = "full_attention"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    segment_lengths: list[int] | tuple[int, ...] = SEGMENTS
    dilation_rates: list[int] | tuple[int, ...] = RATES
    head_offsets: list[int] | None = None
    causal: bool = True
    inner_norm: bool = True
    qkv_bias: bool = True
    qk_norm: bool | str = False
    rope_theta: float | None = 10000.0
    head_dim: int | None = None
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "LongNetConfig":
        """One of the paper's sizes: "125m", "350m", "760m", "2.7b"."""
        if name not in PRESETS:
            raise ValueError(
                f"LongNetConfig.preset: {name!r} is not one of {', '.join(PRESETS)}; "
                "give its fields"
            )
        return cls(**{**PRESETS[name], **changes})

    def __post_init__(self, **kwargs):
        self.use_cache = self.use_cache and self.causal
        super().__post_init__(**kwargs)


class _Gains:
    """MAGNETO's initialisation: Xavier with the gains of `SubNormBlock`."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        gain = getattr(module, "gain", None)
        if isinstance(module, nn.Linear) and gain is not None:
            init.xavier_normal_(module.weight, gain=gain)


class LongNetModel(_Gains, DecoderModel):
    config_class = LongNetConfig
    block = SubNormBlock
    last_norm = staticmethod(layer_norm_last)


class LongNetForCausalLM(_Gains, DecoderForCausalLM):
    config_class = LongNetConfig
    model_class = LongNetModel

    def __init__(self, config: LongNetConfig):
        if not config.causal:
            raise ValueError(
                "LongNetForCausalLM: causal=False sees the tokens it is to predict; use "
                "LongNetModel for an encoder"
            )
        super().__init__(config)


register(LongNetConfig, LongNetModel, LongNetForCausalLM)
