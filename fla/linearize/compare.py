# SPDX-License-Identifier: MIT
"""Which linear attention suits a teacher best: `fla linearize TEACHER OUT --compare A,B,...`.

Every rule goes through the same stages with the same small budget and evenly placed softmax layers:
the error of its alignment, its divergence before and after distillation, the speed of a prompt and
of further tokens, and the bytes of its cache.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fla.core.errors import UsageError
from fla.layers.linearized_rules import RULES
from fla.linearize.config import Config
from fla.linearize.files import read_json, write_json, write_text
from fla.linearize.measure import decode_cost, divergence
from fla.linearize.report import markdown
from fla.linearize.run import Conversion

LENGTHS = (4096, 32768, 131072)
PROMPT = 1024


@dataclass
class Row:
    """The results of one rule: errors and nats, tokens per second, bytes of a cache by length."""

    rule: str
    error: float
    kl_before: float
    kl_after: float
    prompt: float
    decode: float
    cache: list[int]


@torch.inference_mode()
def prompt_speed(model: Any) -> float:
    """Tokens per second for a prompt of `PROMPT` tokens."""
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), device=model.device)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return PROMPT / statistics.median(times[1:])


def cache_bytes(model: Any) -> list[int]:
    """Cache size at `LENGTHS`, extrapolated from two short runs: growth is linear."""
    window = max([model.config.window_size or 0, 64])
    (_, small), (_, large) = (decode_cost(model, n * window) for n in (2, 3))
    return [small + (large - small) * (n - 2 * window) // window for n in LENGTHS]


def measure(source: str, out: Path, rule: str, config: Config, console: Console) -> Row:
    config = copy.deepcopy(config)
    config.linear = config.linear | dict(rule=rule)
    config.select.method = "uniform"
    conversion = Conversion(source, str(out / rule), config, console)
    conversion.run("select", alone=False)
    layers, teacher, text = conversion.linear_layers(), conversion.teacher, conversion.text
    before, _ = divergence(conversion.student(layers, "align").eval(), teacher, text)
    conversion.run("distill")
    model = conversion.student_of("distill").eval().to(teacher.device)
    after, _ = divergence(model, teacher, text)
    errors = [conversion.errors()[i] for i in layers]
    seconds, _ = decode_cost(model, PROMPT)
    mean = sum(errors) / len(errors)
    return Row(rule, mean, before, after, prompt_speed(model), 1 / seconds, cache_bytes(model))


HEADER = (
    "rule",
    "alignment error",
    "KL aligned",
    "KL distilled",
    "prompt, tokens/s",
    "decode, tokens/s",
    *(f"cache at {n // 1024}k" for n in LENGTHS),
)


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.rule,
        f"{row.error:.3f}",
        f"{row.kl_before:.4f}",
        f"{row.kl_after:.4f}",
        f"{row.prompt:,.0f}",
        f"{row.decode:,.0f}",
        *(f"{n / 2**20:,.1f} MiB" for n in row.cache),
    )


def compare(source: str, out: str, rules: list[str], config: Config, console: Console) -> None:
    """Measure what is not measured yet, best distilled first; `comparison.md` in `out`."""
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown:
        raise UsageError(f"--compare: {unknown} are not among {', '.join(RULES)}")
    folder, rows = Path(out), []
    for rule in rules:
        file = folder / rule / "comparison.json"
        saved = read_json(file)
        if saved is None:
            console.rule(rule)
            saved = asdict(measure(source, folder, rule, config, console))
            write_json(file, saved)
        rows.append(Row(**saved))
    rows.sort(key=lambda row: row.kl_after)
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    lines = [f"# {source}, by rule", "", *markdown(HEADER, [cells(row) for row in rows])]
    write_text(folder / "comparison.md", "\n".join(lines) + "\n")
