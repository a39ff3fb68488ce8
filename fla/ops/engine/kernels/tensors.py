# SPDX-License-Identifier: MIT
"""Where the kernels run, and tensors as they read them; needs no Triton."""

from contextlib import AbstractContextManager, nullcontext
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


@overload
def fp32(x: Tensor) -> Tensor: ...
@overload
def fp32(x: None) -> None: ...
def fp32(x: Tensor | None) -> Tensor | None:
    """A state as the kernels hold it: contiguous fp32."""
    return None if x is None else x.to(torch.float32).contiguous()


def on_device(device: torch.device) -> AbstractContextManager:
    """Make a device the current one, on which Triton starts kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
