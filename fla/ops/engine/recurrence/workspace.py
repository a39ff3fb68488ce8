# SPDX-License-Identifier: MIT
"""Scratch memory of the chunk form: a few megabytes, allocated once and kept in cache."""

from math import prod

import torch
from torch import Tensor


class Workspace:
    """Named scratch buffers, allocated at the first and largest step and reused by all others."""

    def __init__(self, like: Tensor):
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size)
        return buffer[:size].view(shape)

    def constant(self, name: str, n: int) -> Tensor:
        """An `[n, n]` matrix, built once: `"eye"`; `"above"`, -inf above the diagonal, else 0;
        `"up to"`, 1 on and above the diagonal; `"below"`, 1 below it.
        """
        key = f"{name} {n}"
        if key not in self._buffers:
            ones = self._like.new_ones(n, n)
            build = {
                "eye": lambda: torch.eye(n, dtype=ones.dtype, device=ones.device),
                "above": lambda: (ones * -torch.inf).triu(1),
                "up to": ones.triu,
                "below": lambda: ones.tril(-1),
            }
            self._buffers[key] = build[name]()
        return self._buffers[key]

    def load(self, name: str, x: Tensor, size: int) -> Tensor:
        """`[rows, C, HV, D]` copied to `[R, size, D]`, with zeros behind the C tokens."""
        rows, n, heads, width = x.shape
        out = self(name, rows, heads, size, width)
        out[:, :, :n].copy_(x.transpose(1, 2))
        if n < size:
            out[:, :, n:].zero_()
        return out.view(-1, size, width)
