# SPDX-License-Identifier: MIT
"""What a conversion would take, before anything is loaded: `fla linearize --dry_run`.

Computed, not measured. N: the teacher's parameters without embeddings, M: those of all its linear
layers, D and V as usual; a product of a parameter and a token is 2 flops, its gradients 4.

    align     2 N forward, 6 M; memory 2 N bytes, and 16 M of the layers trained at once
    select    2 N for every candidate of every round, halved as prefixes are kept
    distill   2 (N + D V) of the teacher, 6 (N + D V) of the student, 8 with checkpointing; memory
              2 N of the teacher, 16 (N + D V) of the student (fp32 weights, gradients, two moments)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from fla.core.errors import UsageError
from fla.linearize.config import Config
from fla.linearize.select import layers_kept
from fla.linearize.surgery import TEACHERS, student_config
from fla.models import HybridForCausalLM, TransformerConfig
from fla.models.convert import convert_config
from fla.training.callbacks import clock

EFFICIENCY = 0.4  # the share of a device's peak that a step's matrix products reach


@dataclass
class Stage:
    """The tokens, flops and bytes of memory of a stage."""

    name: str
    tokens: float
    flops: float
    memory: float


@dataclass
class Sizes:
    """Parameters: without embeddings, of all linear layers, of the head."""

    body: int
    mixers: int
    head: int
    layers: int
    width: int


def read_config(source: str) -> TransformerConfig:
    """A teacher's config as ours, without its weights."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"teacher {source!r}: {error}") from error
    if config.model_type not in TEACHERS:
        raise UsageError(
            f"teacher {source!r} is a {config.model_type!r}; expected one of {', '.join(TEACHERS)}"
        )
    return config if isinstance(config, TransformerConfig) else convert_config(config)


def sizes(teacher: Any, linear: dict[str, Any]) -> Sizes:
    every = list(range(teacher.num_hidden_layers))
    with torch.device("meta"):
        model: Any = HybridForCausalLM(student_config(teacher, every, linear))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    body = sum(count(block) for block in model.model.layers)
    mixers = sum(count(block.attn) for block in model.model.layers)
    return Sizes(body, mixers, model.lm_head.weight.numel(), len(every), teacher.hidden_size)


def stages(teacher: Any, config: Config) -> list[Stage]:
    """The stages of a run, in order."""
    s = sizes(teacher, config.linear)
    batch = config.data.seq * config.data.batch
    shown = 24 * batch * s.width  # bytes of a layer's activations
    at_once = config.align.layers_at_once or s.layers
    kept = layers_kept(config.select.keep, teacher)
    tries = sum(range(kept + 1, s.layers + 1)) if config.select.method == "kl_greedy" else s.layers
    seen = config.select.tokens * tries / 2
    whole = s.body + s.head
    a, d, long = config.align.tokens, config.distill.tokens, config.long.tokens
    c = config.calibrate.tokens
    activations, seq = s.layers * shown / 4, config.data.seq
    train = 16 * whole + activations + config.distill_bytes()
    found = [
        Stage("calibrate", c, 2 * s.body * c, 2 * whole),
        Stage(
            "align",
            a,
            a * (2 * s.body + 6 * s.mixers),
            2 * whole + 4 * s.mixers + 12 * s.mixers * at_once / s.layers + shown,
        ),
        Stage("select", seen, 2 * seen * whole, 2 * whole + 4 * s.mixers + activations),
        Stage("distill", d, d * (2 + 8) * whole, 2 * whole + train),
        Stage("long", long, long * 8 * whole, 16 * whole + activations * config.long.seq / seq),
    ]
    return [stage for stage in found if stage.tokens]


def show(source: str, config: Config, tflops: float, memory: float, console: Console) -> bool:
    """Print the plan for one device with this peak TFLOP/s and memory in GB; returns whether it
    fits.
    """
    teacher = read_config(source)
    s = sizes(teacher, config.linear)
    title = (
        f"{source}: {s.body / 1e6:,.1f} M parameters in {s.layers} layers, {s.head / 1e6:,.1f} M "
        f"in the head; on one device of {tflops:g} TFLOP/s and {memory:g} GB"
    )
    table = Table("stage", "tokens", "flops", "time", "memory", title=title)
    found, total, fits = stages(teacher, config), 0.0, True
    for stage in found:
        seconds = stage.flops / (tflops * 1e12 * EFFICIENCY)
        total += seconds
        fits &= stage.memory <= memory * 1e9
        table.add_row(
            stage.name,
            f"{stage.tokens / 1e6:,.1f} M",
            f"{stage.flops:.1e}",
            clock(seconds),
            f"{stage.memory / 1e9:,.1f} GB" + ("" if stage.memory <= memory * 1e9 else " (!)"),
        )
    console.print(table)
    console.print(
        f"computed, at {EFFICIENCY:.0%} of the peak; {clock(total)} in all"
        + ("" if fits else "\n(!) does not fit: spread it (trainer.fsdp), or align.layers_at_once")
    )
    return fits
