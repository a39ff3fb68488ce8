# SPDX-License-Identifier: MIT
"""Turns a softmax transformer into a hybrid with the same weights.

Keys and values of a group are repeated per head, weights and biases alike; what a linear layer adds
starts as `LinearizedAttention` starts it. With no linear layer the hybrid is the teacher.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fla.layers.attn import Attention
from fla.layers.linearized import LinearizedAttention, LinearOptions
from fla.models.convert import LAYOUTS, convert_model
from fla.models.hybrid import HybridConfig, HybridForCausalLM
from fla.models.transformer import TransformerConfig, TransformerForCausalLM

DAMPED = 0.01  # a gate without a bias starts as this much of the values
TEACHERS = ("transformer", *(n for n, x in LAYOUTS.items() if x.model_type == "transformer"))


def load_teacher(source: str | Path | PreTrainedModel) -> TransformerForCausalLM:
    """A model of a folder or hub name (or itself) as our Transformer, in evaluation mode, without
    gradients; `ValueError` for an architecture that is not in `TEACHERS`.
    """
    model: Any = source
    if not isinstance(source, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(str(source))
    kind = model.config.model_type
    if kind not in TEACHERS:
        raise ValueError(
            f"linearize: the teacher is a {kind!r}, whose attention is not known; expected one of "
            f"{', '.join(TEACHERS)}"
        )
    if not isinstance(model, TransformerForCausalLM):
        model = convert_model(model)
    if model.config.output_gate or model.config.attn is not None:
        raise ValueError(
            "linearize: the teacher's attention has an output gate or is not plain softmax "
            "attention; expected heads with or without groups, biases, q/k norm and a window"
        )
    return model.eval().requires_grad_(False)


def attention_of(model: Any, layer: int) -> Any:
    """The mixer of a layer."""
    return model.model.layers[layer].attn


def student_config(
    teacher: Any, linear_layers: list[int], linear: dict[str, Any] | None = None
) -> HybridConfig:
    """The teacher's config with some layers linear."""
    n = teacher.num_hidden_layers
    wrong = [i for i in linear_layers if not 0 <= i < n]
    if wrong:
        raise ValueError(f"linearize: linear layers {wrong} are outside 0..{n - 1}")
    values = {f.name: getattr(teacher, f.name) for f in fields(TransformerConfig) if f.init}
    kinds = [
        "linear_attention" if i in linear_layers else kind
        for i, kind in enumerate(teacher.layer_types)
    ]
    return HybridConfig(**values | dict(layer_types=kinds, linear=linear))


def repeat_heads(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """Rows `[kv_heads * head_dim, ...]` of a projection, or its bias, for every query head."""
    kv_heads = x.shape[0] // head_dim
    return (
        x.unflatten(0, (kv_heads, head_dim)).repeat_interleave(heads // kv_heads, 0).flatten(0, 1)
    )


@torch.no_grad()
def make_linear(
    teacher: TransformerForCausalLM, layer: int, linear: dict[str, Any] | None = None
) -> LinearizedAttention:
    """The linear attention of a layer with the teacher's weights in it, on its device, in fp32."""
    attention = attention_of(teacher, layer)
    assert isinstance(attention, Attention)
    student = LinearizedAttention.from_config(student_config(teacher.config, [], linear), layer)
    heads, head_dim = attention.num_heads, attention.head_dim
    state = {name: x.float() for name, x in attention.state_dict().items()}
    for name, x in state.items():
        grouped = name.startswith(("k_proj", "v_proj"))
        if name == "k_norm.weight" and attention.qk_norm == "all_heads":
            grouped = True
        state[name] = repeat_heads(x, heads, head_dim) if grouped else x
    if not student.qk_norm:
        state = {n: x for n, x in state.items() if "_norm." not in n}
    options = LinearOptions.of(linear or {})
    if options.gate is not None and not options.gate_bias:
        state["g_proj.weight"] = DAMPED * state["v_proj.weight"]
    _, unexpected = student.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    return student.to(next(attention.parameters()).device)  # type: ignore[return-value]


@torch.no_grad()
def assemble(
    teacher: TransformerForCausalLM,
    bank: dict[int, LinearizedAttention],
    linear: dict[str, Any] | None = None,
) -> HybridForCausalLM:
    """A hybrid with the teacher's weights, and the bank's weights in the layers that it holds. Its
    weights are its own; input and output embeddings are tied where the teacher's are.
    """
    config = student_config(teacher.config, sorted(bank), linear)
    student: Any = HybridForCausalLM(config)
    prefixes = tuple(f"model.layers.{i}.attn." for i in bank)
    state = {n: x for n, x in teacher.state_dict().items() if not n.startswith(prefixes)}
    for i, layer in bank.items():
        state |= {f"model.layers.{i}.attn.{n}": x for n, x in layer.state_dict().items()}
    student.load_state_dict(state)
    return student.to(teacher.device)
