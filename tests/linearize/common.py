# SPDX-License-Identifier: MIT
"""A small teacher with its tokenizer and text."""

import random
import string

import torch

from fla.data.tokens import load_tokenizer
from fla.linearize.config import Config, build
from fla.linearize.data import Text
from fla.linearize.surgery import load_teacher, make_linear
from fla.models import TransformerConfig, TransformerForCausalLM

SIZES = dict(
    vocab_size=259, hidden_size=16, num_hidden_layers=3, num_heads=2, num_kv_heads=1, qk_norm=True,
    intermediate_size=24, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def write_text(folder):
    rng = random.Random(0)
    for i in range(12):
        words = ("".join(rng.choices(string.ascii_lowercase[:6], k=3)) for _ in range(120))
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def make_teacher():
    torch.manual_seed(0)
    model = TransformerForCausalLM(TransformerConfig(**SIZES))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.dim() > 1 else 1.0)  # attention that attends to something
    return load_teacher(model)


def make_config(source, **values):
    small = dict(
        data=dict(source=str(source), seq=32, batch=2),
        calibrate=dict(tokens=128),
        align=dict(tokens=64 * 24, warmup=2, check=8, save=8, lr=3e-3),
        select=dict(tokens=64, retrieval=2, keep="1"),
        distill=dict(tokens=64 * 8, warmup=1, save=4, lr_mixer=1e-3, lr_rest=1e-4),
        report=dict(eval_bytes=400, probes=2, lengths=[16]),
        trainer=dict(use_cpu=True, report_to=[]),
    )
    for name, value in values.items():
        small[name] = small.get(name, {}) | value if isinstance(value, dict) else value
    return build(Config, small)


def make_all(folder, **values):
    """Teacher, text, config, bank."""
    teacher, config = make_teacher(), make_config(write_text(folder), **values)
    text = Text(config.data, load_tokenizer("byte"))
    bank = {i: make_linear(teacher, i, config.linear) for i in range(3)}
    return teacher, text, config, bank
