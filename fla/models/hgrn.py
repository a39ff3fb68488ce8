# SPDX-License-Identifier: MIT
"""HGRN, arXiv:2311.04823."""

from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers import HGRNAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class HGRNConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.HGRNAttention`; `use_lower_bound` learns
    how little each layer forgets at least.
    """

    model_type = "hgrn"
    mixer: ClassVar = HGRNAttention

    attn_mode: str = "chunk"
    expand_ratio: int = 1
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True
    elementwise_affine: bool = True


class HGRNModel(DecoderModel):
    config_class = HGRNConfig

    def __init__(self, config: HGRNConfig):
        super().__init__(config)
        if config.use_lower_bound:
            shape = (config.num_hidden_layers, config.hidden_size * config.expand_ratio)
            self.lower_bounds = nn.Parameter(torch.zeros(shape))

    def handed(self) -> dict[str, list[Tensor]]:
        """Lower bounds `[D]` layer by layer, which grow from 0 with the depth."""
        if not self.config.use_lower_bound:
            return {}
        steps = promote_to_fp32(self.lower_bounds).softmax(0)
        bounds = steps.cumsum(0) - steps[0]
        return {"lower_bound": list(bounds.to(self.lower_bounds.dtype).unbind())}


class HGRNForCausalLM(DecoderForCausalLM):
    config_class = HGRNConfig
    model_class = HGRNModel


register(HGRNConfig, HGRNModel, HGRNForCausalLM)
