# SPDX-License-Identifier: MIT
"""Looking inside: what a pattern keeps, what a state remembers."""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.analysis.patterns": ["plot_branches", "plot_pattern"],
    },
)
