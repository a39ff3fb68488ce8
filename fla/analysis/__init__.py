# SPDX-License-Identifier: MIT
"""Looking inside: what a pattern keeps, what a state remembers, what a mixer attends to."""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.analysis.patterns": ["plot_branches", "plot_pattern"],
        "fla.analysis.plots": [
            "plot_attention",
            "plot_eigenvalues",
            "plot_gates",
            "plot_half_lives",
            "plot_memory",
            "plot_states",
        ],
        "fla.analysis.state": [
            "attention",
            "eigenvalues",
            "gates",
            "half_lives",
            "memory",
            "state_sizes",
        ],
        "fla.analysis.record": ["Trace", "trace"],
    },
)
