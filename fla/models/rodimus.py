# SPDX-License-Identifier: MIT
"""Rodimus and Rodimus+, arXiv:2410.06577."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fla.core.layout import SequenceLayout
from fla.core.precision import promote_to_fp32
from fla.layers import RodimusAttention, SlidingWindowSharedKeyAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import (
    DecoderBlock,
    DecoderForCausalLM,
    DecoderModel,
    build_mixer,
    register,
)
from fla.models.utils import Cache
from fla.modules import GatedMLP, RMSNorm


class RodimusConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.RodimusAttention`. `block_type` "rodimus"
    is that mixer alone in every block; "rodimus_plus" adds sliding-window attention with a shared
    key, described by `ska_attn` (num_heads, which it needs; qkv_bias, qk_norm, window_size of 1024,
    rope_theta), and an MLP. `residual_in_fp32` is the mixer's, `block_residual_in_fp32` keeps what
    the blocks add up in fp32.
    """

    model_type = "rodimus"
    mixer: ClassVar = RodimusAttention

    block_type: str = "rodimus_plus"
    attn_mode: str = "chunk"
    residual_in_fp32: bool = True
    block_residual_in_fp32: bool = False
    expand_ratio: int = 64
    input_gate_low_rank: int | str = "auto"
    use_short_conv: bool = True
    conv_size: int = 4
    hidden_ratio: int | float | None = 4 / 3
    norm_eps: float = 1e-5
    k_norm_eps: float | None = None
    ska_attn: dict | None = None
    bos_token_id: int | None = 126080
    eos_token_id: int | list[int] | None = 126081
    tie_word_embeddings: bool = True
    vocab_size: int = 126464

    def __post_init__(self, **kwargs: Any) -> None:
        known = {"num_heads", "qkv_bias", "qk_norm", "window_size", "rope_theta"}
        unknown = set(self.ska_attn or {}) - known
        if unknown:
            raise ValueError(
                f"RodimusConfig: ska_attn has unknown fields {sorted(unknown)}; expected "
                f"{', '.join(sorted(known))}"
            )
        super().__post_init__(**kwargs)


class RodimusBlock(DecoderBlock):
    """`r = h + mixer(norm(h))`; in Rodimus+ `y = r + ska_attn(norm(r))` and `r + mlp(norm(y))`: the
    MLP reads what the attention says, and the residual is the mixer's, as in published code.
    """

    mixer_name = "mixer"

    def __init__(self, config: RodimusConfig, layer_idx: int):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.mixer_norm = RMSNorm(size, eps=eps)
        self.mixer = build_mixer(config, layer_idx)
        self.residual_in_fp32 = config.block_residual_in_fp32
        self.plus = config.block_type == "rodimus_plus"
        if self.plus:
            self.ska_attn_norm = RMSNorm(size, eps=eps)
            # in the cache its keys come after the keys of all blocks' mixers
            index = config.num_hidden_layers + layer_idx
            spec = {"window_size": 1024} | (config.ska_attn or {})
            if "num_heads" not in spec:
                raise ValueError(
                    f"RodimusConfig: ska_attn is {config.ska_attn}; rodimus_plus needs "
                    "ska_attn={'num_heads': ...}, or pass block_type='rodimus'"
                )
            self.ska_attn = SlidingWindowSharedKeyAttention(size, **spec, layer_idx=index)
            self.mlp_norm = RMSNorm(size, eps=eps)
            self.mlp = GatedMLP(
                size, config.hidden_ratio, config.intermediate_size, config.hidden_act
            )

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        *handed: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor | None, ...]:
        cache = past_key_values
        dtype = self.mixer_norm.weight.dtype
        hidden = promote_to_fp32(hidden) if self.residual_in_fp32 else hidden
        mixed, given = self.mixed(self.mixer_norm(hidden).to(dtype), layout, handed, cache)
        hidden = hidden + mixed
        if not self.plus:
            return hidden, *given
        heard = self.ska_attn_norm(hidden).to(dtype)
        heard = hidden + self.ska_attn(heard, layout=layout, past_key_values=cache)[0]
        return hidden + self.mlp(self.mlp_norm(heard).to(dtype)), *given


class RodimusModel(DecoderModel):
    config_class = RodimusConfig
    block = RodimusBlock


class RodimusForCausalLM(DecoderForCausalLM):
    config_class = RodimusConfig
    model_class = RodimusModel


register(RodimusConfig, RodimusModel, RodimusForCausalLM)
