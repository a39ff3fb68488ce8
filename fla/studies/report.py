# SPDX-License-Identifier: MIT
"""A study's rows as a table, a file and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fla.studies.config import Study
from fla.utils import machine

Row = dict[str, Any]


def power_law(sizes: list[float], losses: list[float]) -> tuple[float, float, float]:
    """`(E, A, alpha)` of `loss = E + A size^-alpha`, by least squares of the logarithms over a grid
    of E; E = 0 with fewer than four points, which do not tell it.

    Example:
        >>> sizes = [1e3, 1e4, 1e5, 1e6]
        >>> E, A, alpha = power_law(sizes, [1 + 8 * n**-0.3 for n in sizes])
        >>> round(E, 2), round(A, 1), round(alpha, 2)
        (1.0, 8.0, 0.3)
    """
    x, y = np.log(np.asarray(sizes, float)), np.asarray(losses, float)
    floors = np.linspace(0, 0.999 * y.min(), 2000) if len(y) > 3 else np.zeros(1)
    best = (np.inf, 0.0, 0.0, 0.0)
    for floor in floors:
        slope, start = np.polyfit(x, np.log(y - floor), 1)
        error = float(((np.exp(start + slope * x) + floor - y) ** 2).sum())
        best = min(best, (error, float(floor), float(np.exp(start)), float(-slope)))
    return best[1], best[2], best[3]


def report(study: Study, rows: dict[str, Row], folder: Path, console: Console) -> None:
    """Print and write the table, with what the kind adds to it, and draw the picture."""
    first = next(iter(rows.values()))["bits_per_byte"]
    lengths = study.lengths if study.kind == "long_context" else []
    header = ["model", "parameters", "bits per byte", "to the first", "tokens/s"]
    header += [f"us per token at {n:,}" for n in lengths]
    table, lines = Table(*header, title=study.kind), [f"# {study.kind}", ""]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        cells = [
            name,
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['bits_per_byte']:.3f}",
            f"{row['bits_per_byte'] - first:+.3f}",
            f"{row['tokens_per_second']:,}",
        ]
        timed = row.get("long", {}).get("seconds_per_token", {})
        cells += [f"{1e6 * timed.get(n, timed.get(str(n))):.0f}" for n in lengths]
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    console.print(table)
    if study.kind == "scaling":
        for group, points in by_group(study, rows).items():
            if len({size for size, _ in points}) < 2:
                continue  # one size has no law
            E, A, alpha = power_law([p for p, _ in points], [b for _, b in points])
            said = f"{group}: bits per byte = {E:.2f} + {A:.1f} parameters^{-alpha:.2f}"
            console.print(said, markup=False)
            lines += ["", said]
    folder.mkdir(parents=True, exist_ok=True)
    lines += ["", ", ".join(f"{name} {value}" for name, value in machine().items())]
    result = {"machine": machine(), "kind": study.kind, "rows": rows}
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    draw(study, rows).savefig(folder / "results.png")
    console.print(f"table and picture: {folder / 'results.md'}, {folder / 'results.png'}")


def by_group(study: Study, rows: dict[str, Row]) -> dict[str, list[tuple[float, float]]]:
    """Parameters and bits per byte of the cells of each line, by size."""
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in study.cells:
        row = rows[cell.name]
        group = cell.group or cell.model.partition(":")[0]
        found.setdefault(group, []).append((row["parameters"], row["bits_per_byte"]))
    return {group: sorted(points) for group, points in found.items()}


def draw(study: Study, rows: dict[str, Row]) -> Any:
    """The picture of the study's kind."""
    from matplotlib.figure import Figure

    wide = study.kind == "long_context"
    figure = Figure(figsize=(9 if wide else 6, 3.6), layout="constrained", dpi=130)
    axes = figure.subplots(1, 2 if wide else 1, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    {"scaling": _scaling, "long_context": _long}.get(study.kind, _dots)(study, rows, axes)
    return figure


def _scaling(study: Study, rows: dict[str, Row], axes: Any) -> None:
    for i, (group, points) in enumerate(by_group(study, rows).items()):
        sizes, bits = zip(*points, strict=True)
        lone = len(set(sizes)) < 2
        axes[0].plot(sizes, bits, "o", color=f"C{i}", label=group if lone else None)
        if lone:
            continue
        E, A, alpha = power_law(list(sizes), list(bits))
        fine = np.geomspace(min(sizes), max(sizes), 50)
        label = f"{group}: {E:.2f} + {A:.1f} n^{-alpha:.2f}"
        axes[0].plot(fine, E + A * fine**-alpha, color=f"C{i}", linewidth=1.2, label=label)
    axes[0].set(xscale="log", yscale="log", xlabel="parameters", ylabel="bits per byte")
    axes[0].yaxis.set_major_formatter("{x:.2f}")
    axes[0].yaxis.set_minor_formatter("{x:.2f}")
    axes[0].legend(frameon=False, fontsize=8)


def _long(study: Study, rows: dict[str, Row], axes: Any) -> None:
    for name, row in rows.items():
        bits = {int(n): x for n, x in row["long"]["bits_by_position"].items()}
        axes[0].plot(list(bits), list(bits.values()), ".-", label=name)
        timed = {int(n): 1e6 * x for n, x in row["long"]["seconds_per_token"].items()}
        axes[1].plot(list(timed), list(timed.values()), "o-", label=name)
    axes[0].axvline(study.cells[0].seq_len, color="grey", linestyle=":", linewidth=1)
    axes[0].set(xlabel="position (dotted: length of the training)", ylabel="bits per token")
    axes[1].set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds per token")
    axes[0].legend(frameon=False, fontsize=8)


def _dots(study: Study, rows: dict[str, Row], axes: Any) -> None:
    names, bits = list(rows)[::-1], [row["bits_per_byte"] for row in rows.values()][::-1]
    axes[0].axvline(bits[-1], color="grey", linewidth=1, linestyle=":")
    axes[0].scatter(bits, names, color=["C0"] * (len(names) - 1) + ["C1"], zorder=3)
    axes[0].set_xlabel("bits per byte on held-out text")
