# SPDX-License-Identifier: MIT
"""Writes the table of docs/equation.md, made of `OPS`: `python -m scripts.docs_tables`."""

from pathlib import Path

import torch

from fla.ops.registry import OPS, OpCase

PAGE = Path(__file__).parents[1] / "docs" / "equation.md"
BEGIN, END = "<!-- operators -->", "<!-- /operators -->"


def decay_of(op: OpCase, point: dict) -> str:
    g = point.get("g")
    if g is None:
        return "none"
    per_head = torch.equal(g, g[:1, :1].expand_as(g))
    return ("per head" if per_head else "per token") + ("" if g.shape[-1] == 1 else " and channel")


def erase_of(point: dict) -> str:
    a, k = point.get("a"), point["k"]
    if a is None:
        return "none"
    along = (a * k).sum(-1, keepdim=True) / k.square().sum(-1, keepdim=True) * k
    return "along k" if torch.allclose(a, along, atol=1e-9) else "low rank"


def row(op: OpCase) -> str:
    page = f"[{op.title}](../fla/ops/{op.name}.py)"
    if op.equation is None:
        return f"| {page} | see its page | | | {op.paper} |"
    inputs = op.inputs(2, 5, 2, 4, 3, dtype=torch.float64)
    point = op.equation(op.without_groups(inputs))
    steps = f"after {point['steps']} steps" if "steps" in point else "after the write"
    read = "before the write, and a bonus" if "bonus" in point else steps
    return f"| {page} | {decay_of(op, point)} | {erase_of(point)} | {read} | {op.paper} |"


def table() -> str:
    lines = ["| operator | decay g | erase a bᵀ | read | paper |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(row(op) for op in OPS)])


def main() -> None:
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
