# SPDX-License-Identifier: MIT
"""Samba, arXiv:2406.07522: Mamba and sliding-window attention in turn, each with an MLP."""

from dataclasses import field
from typing import Any, ClassVar

from fla.layers import Mamba
from fla.models.blocks import BackboneForCausalLM, BackboneModel, MixerMLPBlock
from fla.models.config import DecoderConfig
from fla.models.decoder import register


def default_attention() -> dict[str, Any]:
    """Every other one of 18 layers, whatever the number of layers, as in published code."""
    layers = list(range(1, 18, 2))
    return {"layers": layers, "num_heads": 18, "num_kv_heads": 18, "window_size": 2048}


class SambaConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.Mamba` (its dt_* are time_step_* here).
    By default layers 1, 3, ... 17, as far as there are that many, are attention with a window of
    2048; `attn=None` means no attention.
    """

    model_type = "samba"
    unused: ClassVar[tuple[str, ...]] = ("rescale_prenorm_residual", "residual_in_fp32")
    mixer: ClassVar = Mamba

    hidden_size: int = 2304
    state_size: int = 16
    num_hidden_layers: int = 18
    attn: dict | list | None = field(default_factory=default_attention)
    norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    expand: int = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_rank: int | str = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_init_scheme: str = "random"
    time_step_floor: float = 1e-4

    mlp_width: ClassVar[None] = None

    dt_rank = property(lambda self: self.time_step_rank)
    dt_scale = property(lambda self: self.time_step_scale)
    dt_min = property(lambda self: self.time_step_min)
    dt_max = property(lambda self: self.time_step_max)
    dt_init = property(lambda self: self.time_step_init_scheme)
    dt_init_floor = property(lambda self: self.time_step_floor)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = self.expand * self.hidden_size
        default, given = default_attention(), self.attn
        if isinstance(given, dict) and {name: given.get(name) for name in default} == default:
            self._fit_default_attention(given)
        super().__post_init__(**kwargs)

    def _fit_default_attention(self, attn: dict[str, Any]) -> None:
        """Trim the default to the layers there are, or to other `layer_types` if they are given."""
        layers = [i for i in attn["layers"] if i < self.num_hidden_layers]
        if self.layer_types is not None:
            kinds = self.layer_types[: self.num_hidden_layers]
            own = [
                "sliding_attention" if i in layers else "linear_attention"
                for i in range(len(kinds))
            ]
            if kinds == own:  # a saved default, of as many layers as there were then
                self.layer_types = None
            else:
                layers = [i for i, kind in enumerate(kinds) if kind != "linear_attention"]
        self.attn = {**attn, "layers": layers} if layers else None


class SambaModel(BackboneModel):
    config_class = SambaConfig
    block = MixerMLPBlock


class SambaForCausalLM(BackboneForCausalLM):
    config_class = SambaConfig
    model_class = SambaModel


register(SambaConfig, SambaModel, SambaForCausalLM)
