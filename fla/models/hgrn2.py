# SPDX-License-Identifier: MIT
"""HGRN2, arXiv:2404.07904."""

from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers import HGRN2Attention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class HGRN2Config(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.HGRN2Attention`; `use_lower_bound` learns
    how little each layer forgets at least. `expand_ratio` wins over `num_heads`, and the mixer's
    norm runs with `o_norm_eps`, as in published code.
    """

    model_type = "hgrn2"
    mixer: ClassVar = HGRN2Attention

    attn_mode: str = "chunk"
    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True
    elementwise_affine: bool = True
    o_norm_eps: float = 1e-5


class HGRN2Model(DecoderModel):
    config_class = HGRN2Config

    def __init__(self, config: HGRN2Config):
        super().__init__(config)
        if config.use_lower_bound:
            shape = (config.num_hidden_layers, config.hidden_size)
            self.lower_bounds = nn.Parameter(torch.zeros(shape))

    def handed(self) -> dict[str, list[Tensor]]:
        """Lower bounds `[D]` layer by layer, which grow from 0 with the depth."""
        if not self.config.use_lower_bound:
            return {}
        steps = promote_to_fp32(self.lower_bounds).softmax(0)
        bounds = steps.cumsum(0) - steps[0]
        return {"lower_bound": list(bounds.to(self.lower_bounds.dtype).unbind())}


class HGRN2ForCausalLM(DecoderForCausalLM):
    config_class = HGRN2Config
    model_class = HGRN2Model


register(HGRN2Config, HGRN2Model, HGRN2ForCausalLM)
