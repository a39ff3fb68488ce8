# SPDX-License-Identifier: MIT
"""What helps to choose branches and patterns, from `fla`."""

from fla.analysis.patterns import plot_branches, plot_pattern
from fla.ops.block_sparse_attention import (
    BlockPattern,
    big_bird,
    dilated,
    global_local,
    hierarchical,
    local_window,
    random_blocks,
    strided,
)
from fla.ops.dilated_attention import coverage_report, geometric_schedule

__all__ = [
    "BlockPattern",
    "big_bird",
    "coverage_report",
    "dilated",
    "geometric_schedule",
    "global_local",
    "hierarchical",
    "local_window",
    "plot_branches",
    "plot_pattern",
    "random_blocks",
    "strided",
]
