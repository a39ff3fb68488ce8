# SPDX-License-Identifier: MIT
"""What a conversion report measures of a model: how well it predicts, how far it is from its
teacher, what it recalls, and what a token costs after a long prompt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fla.data.probes import PROBES
from fla.data.tokens import encode
from fla.evals.perplexity import score
from fla.evals.recall import recall
from fla.layers.linearized import LinearizedAttention
from fla.linearize.config import Report
from fla.linearize.data import Text, on
from fla.modules.fused_linear_divergence import fused_linear_divergence
from fla.modules.losses import Head

KL_TOKENS = 32768
CHARACTERS = 200  # in a recall prompt
TIMED = 7  # steps of a decode time


@dataclass
class Measures:
    """The measurements of one model. `decode` holds seconds per further token and `cache` bytes,
    both by the number of tokens before it.
    """

    bits_per_byte: float
    kl: float
    agreement: float
    recall: dict[str, float]
    answer_nats: dict[str, float]
    decode: dict[int, float] = field(default_factory=dict)
    cache: dict[int, int] = field(default_factory=dict)


def held_out_rows(text: Text, limit: int) -> tuple[list[Tensor], int]:
    """Held-out documents as tokens, and their bytes, up to a limit of bytes."""
    rows, size = [], 0
    for document in text.corpus.held_out:
        document = document.encode()[: limit - size].decode(errors="ignore")
        if not document:
            break
        rows.append(torch.from_numpy(encode(text.tokenizer, document)).long())
        size += len(document.encode())
    return rows, size


@torch.no_grad()
def divergence(model: Any, teacher: Any, text: Text) -> tuple[float, float]:
    """KL(teacher | model) in nats per token, and how often their likeliest tokens agree."""
    sums = torch.zeros(2, dtype=torch.float64)
    batches = text.held_out_batches(KL_TOKENS)
    heads = Head(model.lm_head.weight.detach()), Head(teacher.lm_head.weight.detach())
    count = 0
    for batch in batches:
        batch = on(model.device, batch)
        ids, bounds = batch["input_ids"], batch["cu_seqlens"]
        x, y = (
            m.model(ids, cu_seqlens=bounds, use_cache=False).last_hidden_state
            for m in (model, teacher)
        )
        loss, metrics = fused_linear_divergence(x, heads[0], (y, heads[1]))
        sums += ids.numel() * torch.stack([loss, metrics["agreement"]]).double().cpu()
        count += ids.numel()
    kl, agreement = (sums / count).tolist()
    return kl, agreement


@torch.inference_mode()
def decode_cost(model: Any, length: int) -> tuple[float, int]:
    """Median seconds of a token after `length` others, and the bytes of the cache."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    size, times = cache.size_in_bytes(), []
    for _ in range(TIMED):
        begun = time.perf_counter()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times), size


def measure(model: Any, teacher: Any, text: Text, options: Report) -> Measures:
    """Measure everything in `Measures`."""
    model.eval()
    rows, size = held_out_rows(text, options.eval_bytes)
    scored = score(model, rows, size, length=text.data.seq)
    kl, agreement = divergence(model, teacher, text)
    probes = {
        kind: recall(model, text.tokenizer, kind, options.probes, CHARACTERS) for kind in PROBES
    }
    found = Measures(
        scored.bits_per_byte,
        kl,
        agreement,
        {kind: r.exact for kind, r in probes.items()},
        {kind: r.nats for kind, r in probes.items()},
    )
    for length in options.lengths:
        found.decode[length], found.cache[length] = decode_cost(model, length)
    return found


BRANCHES = ("linear alone", "window alone", "nothing")


@contextmanager
def without(model: Any, branch: str) -> Iterator[None]:
    """Inside the block every linear layer has only this branch, or gives zero for "nothing"."""
    layers = [m for m in model.modules() if isinstance(m, LinearizedAttention)]
    hooks = []
    for layer in layers:
        if branch == "nothing":
            hooks.append(
                layer.register_forward_hook(lambda m, a, y: (torch.zeros_like(y[0]), *y[1:]))
            )
        elif layer.options.window:
            share = 40.0 if branch == "linear alone" else -40.0
            gate: Any = layer.m_proj
            hooks.append(
                gate.register_forward_hook(lambda m, a, y, share=share: torch.full_like(y, share))
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ablate(model: Any, text: Text, options: Report) -> dict[str, float]:
    """Bits per byte as it is, and without branches of its linear layers: where "nothing" or
    "window alone" scores like the whole, the linear attention does nothing.
    """
    rows, size = held_out_rows(text, options.eval_bytes // 4)
    windowed = any(m.options.window for m in model.modules() if isinstance(m, LinearizedAttention))
    found = {"whole": score(model, rows, size, length=text.data.seq).bits_per_byte}
    for branch in BRANCHES if windowed else BRANCHES[-1:]:
        with without(model, branch):
            found[branch] = score(model, rows, size, length=text.data.seq).bits_per_byte
    return found


def from_dict(saved: dict[str, Any]) -> Measures:
    """`Measures` from the JSON of its `asdict`."""
    numbers = {n: {int(k): x for k, x in saved[n].items()} for n in ("decode", "cache")}
    return Measures(**saved | numbers)
