# SPDX-License-Identifier: MIT
"""Rotary position embedding: Su et al. (2021), arXiv:2104.09864; with `scale_base` the xPos form,
arXiv:2212.10554.

    angle_{t,i} = t * base^(-2i/R)      (x_i, x_{i+R/2}) <- rotated by angle_{t,i}      i < R/2

`interleaved` pairs neighbours (x_{2i}, x_{2i+1}) instead of halves. Angles are computed in fp32
from the positions at every call: nothing is cached, so nothing goes stale and meta-device
initialisation needs no care.
"""

import torch
import torch.nn as nn
from torch import Tensor

from fla.ops.engine.layout import SequenceLayout


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first R channels of x `[B, T, H, D]` by angles of cos, sin `[B or 1, T, R/2]`."""
    half = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    rotated, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        y = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([y.to(x.dtype), rest], -1)


class RotaryEmbedding(nn.Module):
    """Rotates q and k `[B, T, H, D]` in their first `dim` channels by their positions; holds no
    parameters.

    Example:
        >>> q, k = torch.randn(2, 1, 5, 2, 8)
        >>> q_rot, k_rot = RotaryEmbedding(8)(q, k, seqlen_offset=3)
        >>> torch.allclose(q_rot.norm(), q.norm())
        True
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        scale_base: float | None = None,
        interleaved: bool = False,
    ):
        super().__init__()
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim is {dim}; an even number was expected")
        self.dim, self.base, self.scale_base, self.interleaved = dim, base, scale_base, interleaved

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        seqlen_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Positions are `positions` `[B or 1, T]` where given; else they count from `seqlen_offset`
        (an int, or one per sequence) in every row, or in every sequence of `cu_seqlens`.
        """
        if positions is None:
            layout = SequenceLayout.resolve(q.shape[0], q.shape[1], cu_seqlens=cu_seqlens)
            positions = SequenceLayout(
                layout.batch, layout.length, layout.cu_seqlens, starts=seqlen_offset
            ).positions(q.device)
        steps = torch.arange(0, self.dim, 2, device=q.device, dtype=torch.float32)
        angles = positions.unsqueeze(-1).float() * self.base ** (-steps / self.dim)
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is None:
            q, k = (rotary_embedding(x, cos, sin, self.interleaved) for x in (q, k))
            return q, k
        stretch = (steps + 0.4 * self.dim) / (1.4 * self.dim)
        scale = stretch ** (positions.unsqueeze(-1).float() / self.scale_base)
        return (
            rotary_embedding(q, cos * scale, sin * scale, self.interleaved),
            rotary_embedding(k, cos / scale, sin / scale, self.interleaved),
        )
