# SPDX-License-Identifier: MIT
"""BitNet b1.58, arXiv:2402.17764: a transformer whose attention projects with ternary weights."""

from typing import Any, ClassVar

from fla.layers import BitAttention
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register
from fla.models.transformer import TransformerConfig


class BitNetConfig(TransformerConfig):
    """`TransformerConfig` with `fla.layers.BitAttention`, which has no biases and norms."""

    model_type = "bitnet"
    attention: ClassVar = BitAttention

    def attention_spec(self, layer_idx: int) -> dict[str, Any]:
        spec = super().attention_spec(layer_idx)
        del spec["qk_norm_eps"]
        absent = dict(qkv_bias=False, qk_norm=False, head_dim=None, output_gate=False)
        for name, default in (absent | {"partial_rotary_factor": 1.0}).items():
            if spec.pop(name) != default:
                raise ValueError(f"BitNetConfig: {name} is not part of BitAttention; drop it")
        return spec | {"norm_eps": self.norm_eps}


class BitNetModel(DecoderModel):
    config_class = BitNetConfig


class BitNetForCausalLM(DecoderForCausalLM):
    config_class = BitNetConfig
    model_class = BitNetModel


register(BitNetConfig, BitNetModel, BitNetForCausalLM)
