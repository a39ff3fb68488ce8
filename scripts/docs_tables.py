# SPDX-License-Identifier: MIT
"""Writes what README.md and docs/ repeat of the code and of the results, between
`<!-- NAME -->` and `<!-- /NAME -->`: `python -m scripts.docs_tables`.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fla.models
from fla.ops.case import FAMILIES, OpCase
from fla.ops.registry import OPS
from tests.ops import properties

ROOT = Path(__file__).parents[1]


class OpPage(NamedTuple):
    """What an operator's page says of itself."""

    name: str
    title: str
    paper: str
    equation: list[str]


def op_page(path: Path) -> OpPage | None:
    """A file of fla/ops as a page; None where its docstring has no heading."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    heading = re.match(r"# (The )?([^:(,\n]+)", text)
    if heading is None:
        return None
    title = heading[2].strip()
    title = title[0].upper() + title[1:] if heading[1] else title
    (block,) = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)[:1]
    parts = re.split(r"\s{3,}|\n", block.strip())
    equation = [part for part in parts if re.search(r" (=|<-) ", part)]  # no remarks
    papers = [op.paper for op in OPS if op.name == path.stem]
    paper = (papers or re.findall(r"arXiv:\d{4}\.\d{5}", text))[0]
    return OpPage(path.stem, title, paper.removeprefix("arXiv:"), equation)


def op_pages() -> dict[str, OpPage]:
    """All pages by name, in the order of their families."""
    found = {p.name: p for f in (ROOT / "fla" / "ops").glob("*.py") if (p := op_page(f))}
    return {name: found[name] for names in by_family(found).values() for name in names}


def by_family(pages: dict[str, OpPage]) -> dict[str, list[str]]:
    """The pages of each family; a page without a case is softmax attention of some kind."""
    of = {op.name: op.family for op in OPS}
    order = [*dict.fromkeys(op.name for op in OPS), *sorted(pages.keys() - of.keys())]
    last = next(reversed(FAMILIES))
    return {f: [n for n in order if of.get(n, last) == f] for f in FAMILIES}


def link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})"


def table(head: str, rows: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *rows])


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


def point_row(op: OpCase) -> str:
    page, paper = f"[{op.title}](../fla/ops/{op.name}.py)", link(op.paper.removeprefix("arXiv:"))
    if op.equation is None:
        return f"| {page} | see its page | | | {paper} |"
    inputs = op.inputs(2, 5, 2, 4, 3, dtype=torch.float64)
    point = op.equation(op.without_groups(inputs))
    steps = f"after {point['steps']} steps" if "steps" in point else "after the write"
    read = "before the write, and a bonus" if "bonus" in point else steps
    return f"| {page} | {decay_of(op, point)} | {erase_of(point)} | {read} | {paper} |"


def points() -> str:
    """Which point of the one equation every operator is."""
    return table("| operator | decay g | erase a bᵀ | read | paper |", [*map(point_row, OPS)])


def code(text: str) -> str:
    """Text as code within a table, for MkDocs and for other readers of Markdown alike."""
    if not set(text) & set("|`"):
        return f"`{text}`"
    return "<code>" + re.sub(r"[^\w\s]", lambda m: f"&#{ord(m[0])};", text) + "</code>"


def equations() -> str:
    """The index of operators: equation, paper, page."""
    rows = [
        f"| {p.title} | {'<br>'.join(map(code, p.equation))} | {link(p.paper)} | "
        f"[{p.name}](../fla/ops/{p.name}.py) |"
        for p in op_pages().values()
    ]
    return table("| operator | equation | paper | page |", rows)


def families() -> str:
    """The operators of the README, a line per family."""
    pages, rows = op_pages(), []
    for family, names in by_family(pages).items():
        links = ", ".join(f"[{pages[n].title}](fla/ops/{n}.py)" for n in names)
        rows.append(f"| {family} | {FAMILIES[family]} | {links} |")
    return table("| family | state | operators |", rows)


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:,.{1 if value < 0.0095 else 0}f} ms"


def speed() -> str:
    """The README's figures of the gated delta rule."""
    found, rows = results("ops-cpu.json"), []
    chosen = [("forward", "512"), ("forward", "4096"), ("forward", "16384"), ("both", "4096")]
    timed = [(what, found[what][T], f"{int(T):,} tokens") for what, T in chosen]
    names = {"forward": "forward", "both": "forward and backward"}
    cells = [(f"{names[what]}, {T}", times, seconds) for what, times, T in timed]
    cells.append(("one decode step", found["step"], seconds))
    memory = ("peak memory of the same", found["memory"], lambda b: f"{b / 2**20:.0f} MiB")
    cells.insert(len(timed), memory)
    for label, values, show in cells:
        ours, peers = values["fla"], [values.get("transformers"), values.get("sdpa")]
        shown = " | ".join("" if x is None else show(x) for x in peers)
        times = " / ".join(f"{x / ours:.1f}x" for x in peers if x is not None)
        rows.append(f"| {label} | {show(ours)} | {shown} | {times} |")
    return table("| | fla | transformers | SDPA | gain over transformers / SDPA |", rows)


def why() -> str:
    """The README's four reasons, each with its number."""
    times = results("ops-cpu.json")["forward"]["16384"]
    faster = times["transformers"] / times["fla"]
    published = json.loads((ROOT / "tests" / "models" / "state-dicts.json").read_text())
    loaded = sum(hasattr(fla.models, row["model"]) for row in published.values())
    models = sum(name.endswith("ForCausalLM") for name in fla.models.__all__)
    exact = inspect.signature(properties.results).parameters["rtol"].default
    reasons = [
        f"**Fast.** On a CPU the gated delta rule reads 16,384 tokens {faster:.1f} times as fast "
        "as the PyTorch code that transformers falls back to ([how fast](#how-fast)).",
        f"**Published checkpoints load.** {loaded} architectures have the parameter names and "
        "shapes of published models ([table](tests/models/state-dicts.json)).",
        "**Packed sequences equal separate ones, and padding cannot leak.** Outputs and states of "
        f"every operator agree to {exact:.0e} in fp64 ([tests](tests/ops/properties.py)).",
        f"**{len(op_pages())} operator pages, {models} architectures.** A page holds its "
        "operator's paper, its equation and a literal loop to hold against the paper "
        "([all equations](docs/operators.md)). `fla.explain` says which code runs, and why.",
    ]
    return "\n".join(
        textwrap.fill(f"- {r}", 120, subsequent_indent="  ", break_on_hyphens=False)
        for r in reasons
    )


BLOCKS: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "why"): why,
    ("README.md", "speed"): speed,
    ("README.md", "families"): families,
    ("docs/equation.md", "operators"): points,
    ("docs/operators.md", "equations"): equations,
}


def split(page: str, name: str) -> tuple[str, str, str]:
    """A page's text before, in and after a block."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    head, rest = (ROOT / page).read_text().split(begin)
    held, tail = rest.split(end)
    return head + begin, held, end + tail


def main() -> None:
    for (page, name), make in BLOCKS.items():
        head, _, tail = split(page, name)
        (ROOT / page).write_text(head + make() + tail)


if __name__ == "__main__":
    main()
