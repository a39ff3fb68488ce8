# SPDX-License-Identifier: MIT
"""Log-linear Mamba-2, arXiv:2506.04761."""

from typing import ClassVar

from fla.layers import LogLinearMamba2
from fla.models.blocks import BackboneForCausalLM, BackboneModel, MixerMLPBlock
from fla.models.decoder import register
from fla.models.mamba2 import Mamba2Config


class LogLinearMamba2Config(Mamba2Config):
    """`Mamba2Config` with an MLP of `hidden_ratio` in every block."""

    model_type = "log_linear_mamba2"
    mixer: ClassVar = LogLinearMamba2

    residual_in_fp32: bool = False
    chunk_size: int = 64

    @property
    def mlp_width(self) -> int | None:
        return self.intermediate_size


class LogLinearMamba2Model(BackboneModel):
    config_class = LogLinearMamba2Config
    block = MixerMLPBlock


class LogLinearMamba2ForCausalLM(BackboneForCausalLM):
    config_class = LogLinearMamba2Config
    model_class = LogLinearMamba2Model


register(LogLinearMamba2Config, LogLinearMamba2Model, LogLinearMamba2ForCausalLM)
