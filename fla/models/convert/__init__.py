# SPDX-License-Identifier: MIT
"""Checkpoints of transformers' own architectures as ours, and back, with equal logits.

Llama, Mistral, Qwen2, Qwen3 and OLMo-2 as `transformer`; Qwen3-Next, Qwen3.5 (its text model, dense
or with experts) and OLMo-Hybrid as hybrid `gated_deltanet`; Kimi-Linear as hybrid `kda`; Mamba,
Mamba-2 and RWKV-4.
"""

from typing import Any

from fla.models.convert import kimi, llama, qwen, recurrent
from fla.models.convert.kimi import linear_attention_of_kimi, linear_attention_to_kimi
from fla.models.convert.layout import StateDict
from fla.models.convert.qwen import linear_attention_of_qwen, linear_attention_to_qwen

__all__ = [
    "LAYOUTS",
    "convert_config",
    "convert_model",
    "convert_state_dict",
    "linear_attention_of_kimi",
    "linear_attention_of_qwen",
    "linear_attention_to_kimi",
    "linear_attention_to_qwen",
]
SWISH = ("silu", "swish")
LAYOUTS = llama.LAYOUTS | qwen.LAYOUTS | kimi.LAYOUTS | recurrent.LAYOUTS


def convert_config(config: Any) -> Any:
    """Our config for one of transformers'; `ValueError` where there is none.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
        >>> convert_config(config).num_kv_heads
        2
    """
    import fla.models

    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise ValueError(
            f"convert: model_type {config.model_type!r} is not known; expected one of "
            f"{', '.join(LAYOUTS)}"
        )
    activation = getattr(config, "hidden_act", None) or "silu"
    if activation not in SWISH:
        raise ValueError(
            f"convert: hidden_act is {activation!r}; ours has {' or '.join(SWISH)}, so the logits "
            "would differ"
        )
    values = {name: getattr(config, name) for name in layout.same}
    values |= {ours: getattr(config, theirs) for theirs, ours in layout.fields.items()}
    config_class = getattr(fla.models, f"{fla.models.MODELS[layout.model_type]}Config")
    return config_class(**values | layout.check(config))


def convert_state_dict(state: StateDict, config: Any, back: bool = False) -> StateDict:
    """Parameters of a model with transformers' `config` under our names; with `back` the other way
    round, from ours to theirs.
    """
    layout = LAYOUTS[config.model_type]
    out = {}
    for name, value in layout.state(state, config, back).items():
        parts = name.split(".")
        for theirs, ours in layout.names:
            old, new = (ours, theirs) if back else (theirs, ours)
            parts = [new if p == old else p for p in parts]
        out[".".join(parts)] = value
    return out


def convert_model(model: Any) -> Any:
    """Our model with the weights of one of transformers'; the same logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> type(convert_model(LlamaForCausalLM(config))).__name__
        'TransformerForCausalLM'
    """
    from transformers import AutoModelForCausalLM

    if getattr(getattr(model, "rwkv", None), "layers_are_rescaled", False):
        raise ValueError(
            "convert: this RWKV has divided weights by powers of 2 for inference; load it anew and "
            "convert it before its first forward pass, or set its rescale_every to 0"
        )
    ours = AutoModelForCausalLM.from_config(convert_config(model.config)).to(model.dtype)
    ours.load_state_dict(convert_state_dict(model.state_dict(), model.config))
    return ours.train(model.training)
