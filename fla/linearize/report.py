# SPDX-License-Identifier: MIT
"""`conversion_report.md`, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fla.data.probes import PROBES
from fla.linearize.align import Record, records
from fla.linearize.config import Config
from fla.linearize.files import write_text
from fla.linearize.measure import Measures
from fla.linearize.select import Scores, read_scores
from fla.training.callbacks import clock


def _axes(width: float = 7, height: float = 3.8) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), dpi=140)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_scores(found: Scores, path: Path) -> None:
    """One bar per layer: the cost of swapping it alone; layers that stay softmax are darker."""
    if not found.scores:
        return
    figure, axes = _axes()
    layers = sorted(found.scores)
    stays = [i in (found.softmax or ()) for i in layers]
    axes.bar(
        layers,
        [found.scores[i] for i in layers],
        color=["#1f4e79" if s else "#9dc3e6" for s in stays],
    )
    axes.set_xticks(layers)
    axes.set_xlabel("layer (dark: stays softmax)")
    axes.set_ylabel("relative error" if found.method == "mse" else "nats per token, swapped alone")
    axes.set_title(f"{found.method}: softmax stays in {found.softmax}", fontsize=10)
    _save(figure, path)


def plot_alignment(records: dict[int, Record], path: Path) -> None:
    """The error of every layer by step."""
    figure, axes = _axes()
    for i, record in sorted(records.items()):
        steps, errors = zip(*record.checks, strict=True)
        axes.plot(steps, errors, linewidth=1.3, label=f"{i}")
    axes.set_xlabel("step")
    axes.set_ylabel("squared error / the teacher's square")
    axes.set_ylim(bottom=0)
    axes.legend(title="layer", frameon=False, fontsize=7, ncols=2)
    _save(figure, path)


def plot_costs(found: dict[str, Measures], path: Path) -> None:
    """Time per token and bytes of the cache by length, for teacher and student."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), dpi=140)
    for name in ("teacher", "after distillation"):
        m = found[name]
        lengths = sorted(m.decode)
        left.plot(lengths, [m.decode[n] * 1e3 for n in lengths], marker="o", label=name)
        right.plot(lengths, [m.cache[n] / 2**20 for n in lengths], marker="o", label=name)
    left.set_ylabel("ms per token")
    right.set_ylabel("cache, MiB")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlabel("tokens before it")
        axes.set_ylim(bottom=0)
    left.legend(frameon=False)
    _save(figure, path)


HEADER = ("model", "bits per byte", "of teacher", "KL to teacher", "agreement", *PROBES)


def comparison(found: dict[str, Measures]) -> list[tuple[str, ...]]:
    base = found["teacher"].bits_per_byte
    return [
        (
            name,
            f"{m.bits_per_byte:.3f}",
            f"{m.bits_per_byte / base - 1:+.1%}",
            f"{m.kl:.4f}",
            f"{m.agreement:.1%}",
            *(f"{m.recall[kind]:.0%} ({m.answer_nats[kind]:.2f})" for kind in PROBES),
        )
        for name, m in found.items()
    ]


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _costs(found: dict[str, Measures]) -> list[str]:
    names = [n for n in ("teacher", "after distillation") if found[n].decode]
    lengths = sorted(found["teacher"].decode)
    header = ("tokens before", *(f"{n}: {w}" for n in names for w in ("a token", "cache")))
    rows = [
        (
            f"{length:,}",
            *(
                cell
                for n in names
                for cell in (
                    f"{found[n].decode[length] * 1e3:.1f} ms",
                    f"{found[n].cache[length] / 2**20:.2f} MiB",
                )
            ),
        )
        for length in lengths
    ]
    return markdown(header, rows)


def _layers(records: dict[int, Record], scores: Scores) -> list[str]:
    rows = []
    for i, record in sorted(records.items()):
        first = record.checks[0][1] if record.checks else math.nan
        alone = scores.scores.get(i)
        rows.append(
            (
                str(i),
                "softmax" if i in (scores.softmax or ()) else "linear",
                f"{first:.3f}",
                f"{record.error:.3f}",
                "-" if alone is None else f"{alone:.4f}",
                record.stopped or "",
            )
        )
    header = ("layer", "becomes", "error before", "after alignment", "score alone", "stopped")
    return markdown(header, rows)


@dataclass
class Finished:
    """A conversion whose stages are done.

    Fields:
        source: the teacher's name or folder.
        out: the conversion's folder.
        config: its options.
        seconds: what every stage took, by name.
    """

    source: str
    out: Path
    config: Config
    seconds: dict[str, float]


def write(
    conversion: Finished,
    found: dict[str, Measures],
    branches: dict[str, float],
    console: Console,
) -> None:
    """The report, its pictures, and its table on the console."""
    out, config = conversion.out, conversion.config
    aligned = records(out / "align")
    scores = read_scores(out)
    assert scores is not None
    plot_alignment(aligned, out / "alignment.png")
    plot_costs(found, out / "costs.png")
    linear = ", ".join(f"{k}={v}" for k, v in asdict(config)["linear"].items()) or "defaults"
    details = [f"method {scores.method}"]
    if scores.agreement is not None:
        details.append(
            f"two halves of the data rank layers with a correlation of {scores.agreement:.2f}"
        )
    if scores.gap is not None:
        details.append(f"gap at the cut {scores.gap:.4f}")
    lines = [
        f"# {conversion.source} with linear attention",
        "",
        f"Linear layers: {linear}. Softmax stays in layers {scores.softmax}.",
        f"Held-out text of {config.data.source}; recall: share of answers right in every token "
        "(nats an answer's token costs).",
        "",
        *markdown(HEADER, comparison(found)),
        "",
        "## Layers",
        "",
        "Error: squared, relative to the teacher layer's output, on held-out text. Score: nats a "
        "token that swapping the layer alone costs.",
        "",
        *_layers(aligned, scores),
        "",
        "; ".join(details) + ".",
        "",
        "![scores](layer_scores.png)" if scores.scores else "",
        "![alignment](alignment.png)",
        "",
        "## Branches",
        "",
        "Bits per byte with parts of the linear layers switched off.",
        "",
        *markdown(("left on", "bits per byte"), [(n, f"{x:.3f}") for n, x in branches.items()]),
        "",
        "## Cost of a token",
        "",
        *_costs(found),
        "",
        "![costs](costs.png)",
        "",
        "## Time taken",
        "",
        *markdown(("stage", "time"), [(n, clock(s)) for n, s in conversion.seconds.items()]),
    ]
    write_text(out / "conversion_report.md", "\n".join(lines) + "\n")
    table = Table(*HEADER)
    for row in comparison(found):
        table.add_row(*row)
    console.print(table)
    console.print(f"report {out / 'conversion_report.md'}\nmodel {out}")
