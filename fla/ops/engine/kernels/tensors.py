# SPDX-License-Identifier: MIT
"""Tensors as the kernels read them; needs no Triton."""

from typing import overload

import torch
from torch import Tensor


@overload
def flat(x: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def flat(x: None, dtype: torch.dtype | None = None) -> None: ...
def flat(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """`[B, T, ...]` as contiguous `[B T, ...]`."""
    return None if x is None else x.to(dtype or x.dtype).flatten(0, 1).contiguous()


def fp32(x: Tensor | None) -> Tensor | None:
    """A state, as the kernels hold it."""
    return None if x is None else x.to(torch.float32).contiguous()
