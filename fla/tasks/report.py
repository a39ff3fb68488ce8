# SPDX-License-Identifier: MIT
"""Scores as a table and a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fla.tasks.rows import TASKS
from fla.tasks.scores import Scores
from fla.utils import machine

Found = dict[str, dict[str, Scores]]


def show(task: str, by_model: dict[str, Scores], console: Console) -> list[str]:
    """Print a task's table; the same as lines of Markdown."""
    lengths = sorted({n for scores in by_model.values() for n in scores.exact})
    header = [task, *(f"{n} tokens" for n in lengths)]
    table = Table(*header, title=f"{task}: rows all right (answers right)")
    guessing = f"{1 / TASKS[task].answers:.0%}"
    lines = [
        f"Rows with every answer right (answers right; guessing: {guessing}).",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
    ]
    for model, scores in by_model.items():
        cells = [
            f"{scores.exact[n]:.0%} ({scores.answers[n]:.0%})" if n in scores.exact else "-"
            for n in lengths
        ]
        table.add_row(model, *cells)
        lines.append("| " + " | ".join([model, *cells]) + " |")
    console.print(table)
    return [*lines, ""]


def report(found: Found, folder: Path, console: Console) -> None:
    """Print the tables; write them and a picture into the folder."""
    lines = ["# Tasks", ""]
    for task, by_model in found.items():
        lines += show(task, by_model, console)
    lines.append(", ".join(f"{name} {value}" for name, value in machine().items()) + "\n")
    (folder / "results.md").write_text("\n".join(lines))
    plot(found, folder / "results.png")
    console.print(f"tables and picture: {folder / 'results.md'}, {folder / 'results.png'}")


def plot(found: Found, path: Path) -> None:
    """Share of answers by length, a panel a task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(found) + 1.8, 3.2), layout="constrained", dpi=130)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (task, by_model) in zip(panels, found.items(), strict=True):
        for i, (model, scores) in enumerate(by_model.items()):
            style = dict(marker="osv^DPX<>"[i % 9], markersize=4, linewidth=1.4)
            panel.plot(list(scores.answers), list(scores.answers.values()), label=model, **style)
        panel.axhline(1 / TASKS[task].answers, color="grey", linestyle=":", linewidth=1)
        panel.set(title=task, xlabel="tokens", ylim=(0, 1.03), xscale="log")
        ticks = sorted({n for scores in by_model.values() for n in scores.answers})
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("answers right")
    handles, names = panels[-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path)
