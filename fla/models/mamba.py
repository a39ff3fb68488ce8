# SPDX-License-Identifier: MIT
"""Mamba, arXiv:2312.00752."""

from typing import Any, ClassVar

from fla.layers import Mamba
from fla.models.blocks import BackboneForCausalLM, BackboneModel, MixerBlock
from fla.models.config import DecoderConfig
from fla.models.decoder import register


class MambaConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.Mamba`; `intermediate_size` defaults to
    `expand * hidden_size`. There is no MLP.
    """

    model_type = "mamba"
    unused: ClassVar[tuple[str, ...]] = (
        "rescale_prenorm_residual",
        "use_associative_scan",
        "use_mambapy",
    )
    activations: ClassVar = ("silu", "swish")
    mixer: ClassVar = Mamba
    # transformers' names, so that its checkpoints load here as they are
    attribute_map: ClassVar[dict[str, str]] = {
        "layer_norm_epsilon": "norm_eps",
        "time_step_min": "dt_min",
        "time_step_max": "dt_max",
        "time_step_floor": "dt_init_floor",
        "time_step_rank": "dt_rank",
        "time_step_scale": "dt_scale",
        "time_step_init_scheme": "dt_init_scheme",
    }

    state_size: int = 16
    num_hidden_layers: int = 48
    norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    expand: int = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    residual_in_fp32: bool = False
    dt_rank: int | str = "auto"
    dt_scale: float = 1.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_scheme: str = "random"
    dt_init_floor: float = 1e-4

    @property
    def dt_init(self) -> str:
        return self.dt_init_scheme

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = self.expand * self.hidden_size


class MambaModel(BackboneModel):
    config_class = MambaConfig
    block = MixerBlock


class MambaForCausalLM(BackboneForCausalLM):
    config_class = MambaConfig
    model_class = MambaModel


register(MambaConfig, MambaModel, MambaForCausalLM)
