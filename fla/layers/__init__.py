# SPDX-License-Identifier: MIT
"""Token mixers: projections and gates around an operator. Padding, boundaries and the cache are
`mixer.py`'s.
"""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.layers.attn": ["Attention"],
        "fla.layers.delta_net": ["DeltaNet"],
        "fla.layers.gated_deltanet": ["GatedDeltaNet"],
    },
)
