# SPDX-License-Identifier: MIT
"""The names of memory pools, without a pool: torch's caching allocator already keeps freed memory
by size and stream, and it knows when autograd is done with a tensor, which a pool in Python cannot.
Against fragmentation there is `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_attention_pytorch.core.config import MemoryPoolConfig


class UnifiedMemoryPool:
    """Hands out new tensors of torch's allocator and keeps none: no two callers share one.

    Example:
        >>> pool = UnifiedMemoryPool()
        >>> x = pool.get_buffer((2, 3), torch.float32)
        >>> pool.return_buffer(x)  # when nothing else holds x, torch reuses its memory
    """

    def __init__(self, config: MemoryPoolConfig | None = None):
        self.config = config or MemoryPoolConfig()

    def get_buffer(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device or self.config.device)

    def return_buffer(self, buffer: Tensor) -> None:
        """Nothing: the memory is free once no reference is left."""

    def clear(self) -> None:
        """Give what torch has cached back to the device, for other programs."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def get_stats(self) -> dict[str, int]:
        """torch's own counters; nothing on a CPU, whose allocator keeps none."""
        return dict(torch.cuda.memory_stats()) if torch.cuda.is_available() else {}


class BucketedMemoryPool(UnifiedMemoryPool):
    """`UnifiedMemoryPool`: torch's allocator has buckets of sizes."""


class FragmentAwareMemoryPool(UnifiedMemoryPool):
    """`UnifiedMemoryPool`: torch's allocator splits and joins its blocks."""


class NUMAAwareMemoryPool(UnifiedMemoryPool):
    """`UnifiedMemoryPool`: a GPU's memory has no NUMA nodes, and a CPU's pages lie where they are
    first written (`numactl` decides).
    """


class EnhancedMemoryPool(UnifiedMemoryPool):
    """`UnifiedMemoryPool`."""
