# SPDX-License-Identifier: MIT
"""What the kernels of the short convolution share as torch operators."""

from typing import overload

import torch
from torch import Tensor

from fla.core.boundaries import count_sequences
from fla.core.operator import Schema

# returns (y, the last W inputs `[N, D, W]` in fp32)
SCHEMA = Schema(
    "Tensor x, Tensor weight, Tensor? bias, Tensor? history",
    "Tensor? cu_seqlens, bool silu",
    saves_state=True,
)


@overload
def rows(x: Tensor) -> Tensor: ...
@overload
def rows(x: None) -> None: ...
def rows(x: Tensor | None) -> Tensor | None:
    """`[.., D, W]` as contiguous fp32 rows `[.., W, D]`, as kernels read filters and states."""
    return None if x is None else x.mT.to(torch.float32).contiguous()


def empty(x, weight, bias, history, cu_seqlens, silu):
    """The results as empty tensors, for the fake kernel."""
    shape = (count_sequences(x, cu_seqlens), *weight.shape)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)
