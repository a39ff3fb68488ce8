# SPDX-License-Identifier: MIT
"""Pictures of what a sparse attention sees."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fla.ops.block_sparse_attention import BlockPattern
from fla.ops.dilated_attention import multiplicities

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid_figure(
    panels: Sequence[tuple[str, Tensor]], label: str, most: float, signed: bool = False
) -> "Figure":
    """One panel for each title and matrix `[tokens, tokens]`, of values up to `most`: rows read,
    columns are read.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.4 + 2.6 * len(panels), 3.1), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours: dict[str, Any] = (
        dict(cmap="RdBu", vmin=-most) if signed else dict(cmap="Blues", vmin=0)
    )
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        values = matrix.detach().float().cpu().numpy()
        image = axis.imshow(values, vmax=most, interpolation="nearest", **colours)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("key", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("query", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def plot_branches(
    tokens: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    heads: int = 4,
    causal: bool = True,
) -> "Figure":
    """How often each head counts a pair of tokens (M of `fla.ops.dilated_attention`).

    Example:
        >>> plot_branches(64, [16, 64], [1, 4]).savefig("/dev/null", format="png")
    """
    M = multiplicities(tokens, heads, segment_lengths, dilation_rates)
    M = M.tril() if causal else M
    panels = [(f"head {h}", M[h]) for h in range(heads)]
    return grid_figure(panels, "times counted", len(segment_lengths))


def plot_pattern(pattern: BlockPattern, head: int = 0) -> "Figure":
    """The pairs of tokens that a pattern keeps, with its density.

    Example:
        >>> from fla.ops.block_sparse_attention import local_window
        >>> pattern = local_window(64, 16, block_size=8, causal=True)
        >>> plot_pattern(pattern).savefig("/dev/null", format="png")
    """
    seen = pattern.dense()[0]
    title = f"{pattern.density():.0%} of the pairs"
    return grid_figure([(title, seen[min(head, len(seen) - 1)])], "kept", 1)
