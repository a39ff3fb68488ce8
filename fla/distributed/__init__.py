# SPDX-License-Identifier: MIT
"""Sequence parallelism over `torch.distributed`: one sequence on several processes, exactly."""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.distributed.context": [
            "gather_sequence",
            "reduce_gradients",
            "sequence_parallel",
            "shard_sequence",
        ],
    },
)
