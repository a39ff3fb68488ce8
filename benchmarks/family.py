# SPDX-License-Identifier: MIT
"""Every operator of the family in one table: `python -m benchmarks.ops --all`.

T = 2048 tokens, 4 heads, K = V = 64, fp32, batch 1 (smaller where an operator's features grow with
K squared, noted in the table). Linear attention is the floor, torch's causal softmax attention the
ceiling; both take a turn beside every operator. Peak memory of forward and backward is measured in
a fresh process per operator.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import alternate, machine, python, resident_memory
from fla.ops.registry import OPS, OpCase

TOKENS, HEADS, WIDTH = 2048, 4, 64
SDPA = "softmax attention (SDPA)"
# an axis that is not K, V or H: as wide as a layer with these heads would have it
SIZES = dict(M=WIDTH, D=HEADS * WIDTH, R=WIDTH // 4, L=16)
SMALL = {"Based": 16, "ReBased": 16, "Mamba": 16}  # K of operators whose usual K is small


def case(title: str) -> OpCase:
    return next(op for op in OPS if op.title == title)


def inputs(op: OpCase, T: int) -> dict[str, Tensor]:
    K = SMALL.get(op.title, WIDTH)
    return op.inputs(1, T, HEADS, K, WIDTH, **SIZES)


def leaves(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.requires_grad_() for name, t in x.items()}


def softmax_inputs(T: int) -> dict[str, Tensor]:
    return {n: torch.randn(1, HEADS, T, WIDTH) for n in "qkv"}


def softmax(x: dict[str, Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)


def runs(title: str, T: int) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """(the forward, its inputs)."""
    if title == SDPA:
        x = softmax_inputs(T)
        return lambda: softmax(x), x
    op = case(title)
    x = inputs(op, T)
    return lambda: op.call(op.chunk, x)[0], x


def both(title: str, T: int) -> Callable[[], Any]:
    """Forward and backward of every input."""
    forward, x = runs(title, T)
    leaves(x)
    return lambda: torch.autograd.grad(forward().sum(), list(x.values()), materialize_grads=True)


def step(title: str) -> Callable[[], Any] | None:
    """One token from a state."""
    if title == SDPA:
        x = softmax_inputs(TOKENS)
        q = torch.randn(1, HEADS, 1, WIDTH)
        return lambda: F.scaled_dot_product_attention(q, x["k"], x["v"])
    op = case(title)
    if not op.state:
        return None
    x = inputs(op, 1)
    states = op.call(op.token, x)[1:]
    return lambda: op.call(op.token, x, states)


def peak_memory(title: str) -> int:
    code = f"from benchmarks.family import memory_probe; print(memory_probe({title!r}))"
    return int(python("-c", code))


def memory_probe(title: str) -> int:
    """Runs in the fresh process: warm up small, then measure."""
    both(title, 64)()
    work = both(title, TOKENS)
    if sys.platform == "linux":  # what making the inputs freed must not serve the measured run
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident_memory("VmRSS")
    work()
    return resident_memory("VmHWM") - before


def measure(repeats: int, console: Console) -> dict[str, Any]:
    rows = {}
    for title in [*(op.title for op in OPS), SDPA]:
        console.print(f"measuring {title}")
        turn = list(dict.fromkeys(["Linear attention", title, SDPA]))
        with torch.no_grad():
            forward = alternate({t: runs(t, TOKENS)[0] for t in turn}, repeats)
            one = step(title)
            token = alternate({"step": one}, repeats * 10)["step"] if one else None
        backward = alternate({t: both(t, TOKENS) for t in turn}, repeats)
        rows[title] = {
            "forward": forward[title],
            "both": backward[title],
            "step": token,
            "memory": peak_memory(title),
            "over_floor": forward[title] / forward["Linear attention"],
            "over_sdpa": forward[title] / forward[SDPA],
        }
    sizes = {"tokens": TOKENS, "heads": HEADS, "width": WIDTH, "small": SMALL}
    return {"machine": machine(), **sizes, "rows": rows}


HEADER = (
    "operator",
    "forward",
    "tokens/s",
    "forward + backward",
    "one step",
    "peak memory",
    "x linear attention",
    "x SDPA",
)


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for title, row in result["rows"].items():
        small = f" (K = {SMALL[title]})" if title in SMALL else ""
        rows.append(
            (
                title + small,
                f"{row['forward'] * 1e3:.1f} ms",
                f"{result['tokens'] / row['forward']:,.0f}",
                f"{row['both'] * 1e3:.1f} ms",
                "-" if row["step"] is None else f"{row['step'] * 1e6:.0f} us",
                f"{row['memory'] / 2**20:.0f} MiB",
                f"{row['over_floor']:.1f}",
                f"{row['over_sdpa']:.2f}",
            )
        )
    return rows


def report(result: dict[str, Any], out: Path | None, console: Console, name: str) -> None:
    """The table on the console, and as Markdown and JSON under `out`."""
    write_table(HEADER, table_rows(result), result, out, console, name, __doc__)


def write_table(
    header: tuple[str, ...],
    rows: list[tuple[str, ...]],
    result: dict[str, Any],
    out: Path | None,
    console: Console,
    name: str,
    about: str,
) -> None:
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    where = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    lines = [about.strip(), "", where, "", "| " + " | ".join(header) + " |"]
    lines += ["|" + "---|" * len(header), *("| " + " | ".join(r) + " |" for r in rows)]
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
