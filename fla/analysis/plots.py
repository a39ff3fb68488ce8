# SPDX-License-Identifier: MIT
"""Pictures of `fla.analysis.state`: one panel per layer, one line per head. Each function
returns a matplotlib figure; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fla.analysis.patterns import grid_figure
from fla.analysis.record import Trace
from fla.analysis.state import attention, eigenvalues, gates, half_lives, memory, state_sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _panels(traces: Sequence[Trace], rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    if not traces:
        raise ValueError("plot: there are no traces; run the model inside `trace(model)` first")
    n = len(traces)
    figure = Figure(figsize=(0.6 + 2.4 * n, 0.4 + 2.3 * rows), layout="constrained", dpi=120)
    axes = figure.subplots(rows, n, squeeze=False, **options)
    for axis, trace in zip(axes[0], traces, strict=True):
        axis.set_title(trace.layer, fontsize=8)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    return figure, axes


def plot_attention(trace: Trace, row: int = 0, heads: int = 4) -> Figure:
    """The implied attention of some heads; red is negative."""
    A = attention(trace.only(row))[0]
    panels = [(f"{trace.layer}, head {h}", A[h]) for h in range(min(heads, len(A)))]
    return grid_figure(panels, "weight", A.abs().amax().item(), signed=True)


def plot_states(traces: Sequence[Trace], every: int = 8) -> Figure:
    """Norm (above) and effective rank (below) of the states along the row, mean over the batch."""
    figure, axes = _panels(traces, 2, sharex=True)
    for column, trace in zip(axes.T, traces, strict=True):
        at, *figures = state_sizes(trace, every)
        for axis, values in zip(column, figures, strict=True):
            axis.plot(at, values.mean(1).cpu(), linewidth=1.2)
            axis.set_ylim(bottom=0)
        column[1].set_xlabel("token", fontsize=8)
    for axis, name in zip(axes[:, 0], ("norm of the state", "effective rank"), strict=True):
        axis.set_ylabel(name, fontsize=8)
    return figure


def plot_half_lives(traces: Sequence[Trace]) -> Figure:
    """Half-life of every head's channels in tokens, on a logarithmic axis, from the shortest to the
    longest; a dot is a head with one decay.
    """
    figure, axes = _panels(traces, sharey=True)
    for axis, trace in zip(axes[0], traces, strict=True):
        for head, lives in enumerate(half_lives(trace).sort(-1).values):
            finite = lives.clamp(max=1e6).cpu()
            spread = head + torch.linspace(-0.3, 0.3, len(finite)) * (len(finite) > 1)
            axis.plot(spread, finite, "." if len(finite) > 1 else "o", markersize=4)
        axis.set_yscale("log")
        axis.set_xticks(range(trace.k.shape[2]))
        axis.set_xlabel("head", fontsize=8)
    axes[0, 0].set_ylabel("half-life in tokens", fontsize=8)
    return figure


def plot_gates(traces: Sequence[Trace], bins: int = 40) -> Figure:
    """Histograms of the decay factor exp(g) and, of delta rules, of what is erased, beta |k|^2."""
    figure, axes = _panels(traces, sharex=True, sharey=True)
    for axis, trace in zip(axes[0], traces, strict=True):
        found = gates(trace)
        for name in ("decay", "erase"):
            if name in found:
                axis.hist(
                    found[name].flatten().cpu().numpy(), bins, (0, 2.05), density=True,
                    alpha=0.6, label=name,
                )  # fmt: skip
        axis.set_yscale("log")
        if found:
            axis.legend(fontsize=7, frameon=False)
    axes[0, 0].set_ylabel("density", fontsize=8)
    return figure


def plot_eigenvalues(traces: Sequence[Trace], tokens: int = 16) -> Figure:
    """Eigenvalues of the transitions: at 1 is kept, at 0 erased, at -1 turned round."""
    from matplotlib.patches import Circle

    figure, axes = _panels(traces, sharex=True, sharey=True)
    for axis, trace in zip(axes[0], traces, strict=True):
        for head, values in enumerate(eigenvalues(trace, tokens).movedim(2, 0).flatten(1)):
            axis.plot(values.real.cpu(), values.imag.cpu(), ".", markersize=3, alpha=0.5,
                      color=f"C{head % 10}")  # fmt: skip
        axis.add_patch(Circle((0, 0), 1.0, fill=False, color="grey", linewidth=0.8))
        axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
    return figure


def plot_memory(traces: Sequence[Trace]) -> Figure:
    """Share of a value that its key still reads, by tokens since; the dotted line is one half."""
    figure, axes = _panels(traces, sharey=True)
    for axis, trace in zip(axes[0], traces, strict=True):
        axis.plot(memory(trace).T.cpu(), linewidth=1.2)
        axis.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        axis.set_xscale("symlog")
        axis.set_xlabel("tokens since", fontsize=8)
        axis.set_xlim(0, math.nextafter(trace.k.shape[1], 0))
    axes[0, 0].set_ylabel("still read", fontsize=8)
    return figure
