# SPDX-License-Identifier: MIT
"""Rotary position embedding: Su et al. (2021), arXiv:2104.09864; with `scale_base` the xPos form,
arXiv:2212.10554.

    angle_{t,i} = t * base^(-2i/R)      (x_i, x_{i+R/2}) <- rotated by angle_{t,i}      i < R/2

`interleaved` pairs neighbours (x_{2i}, x_{2i+1}) instead of halves. Angles are computed in fp32
from the positions at every call: nothing is cached, so nothing goes stale and meta-device
initialisation needs no care.
"""

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fla._arguments import checked
from fla.core.layout import SequenceLayout
from fla.ops.engine.recurrence.recurrence import check_packed

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SCALINGS: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": LLAMA3}


@checked
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """Rotate the first R channels of x `[B, T, H, D]` by angles of cos, sin `[B or 1, T, R/2]`, or
    of a table `[positions, R/2]`, in which positions count from `seqlen_offsets` (an int, or one
    per sequence) in every row, or in every sequence of `cu_seqlens`. `inplace` writes the result
    over x; `chunk_indices` follows from `cu_seqlens` and is only checked.

    Example:
        >>> cos, sin = torch.zeros(4, 1), torch.ones(4, 1)  # a quarter turn at each position
        >>> rotary_embedding(torch.tensor([[[[1.0, 2.0]]]]), cos, sin, seqlen_offsets=3).tolist()
        [[[[-2.0, 1.0]]]]
    """
    op = "rotary_embedding"
    check_packed(op, cu_seqlens, chunk_indices=chunk_indices)
    if cos.dim() == 2:
        at = _positions(x, seqlen_offsets, cu_seqlens)
        last = -1 if torch.compiler.is_compiling() or not at.numel() else int(at.max())
        if last >= cos.shape[0]:
            raise ValueError(
                f"{op}: cos has {cos.shape[0]} positions, but x reaches position {last}; pass a "
                "longer table"
            )
        cos, sin = cos[at], sin[at]
    elif cu_seqlens is not None or not isinstance(seqlen_offsets, int) or seqlen_offsets:
        raise ValueError(
            f"{op}: cos has shape {list(cos.shape)}, angles of every token, beside seqlen_offsets "
            "or cu_seqlens; pass a table [positions, R/2], or drop them"
        )
    y = _rotated(x, cos, sin, interleaved)
    return x.copy_(y) if inplace else y


def _positions(x: Tensor, offset: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The position of every token, `[B or 1, T]`."""
    layout = SequenceLayout.resolve(x.shape[0], x.shape[1], cu_seqlens=cu_seqlens)
    counted = SequenceLayout(layout.batch, layout.length, layout.cu_seqlens, starts=offset)
    return counted.positions(x.device)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
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
    y = y.to(x.dtype)
    return torch.cat([y, rest], -1) if rest.shape[-1] else y


@checked
def rotary_embedding_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary_embedding` as its definition: every pair of channels turned by its angle, cos, sin
    `[T, R/2]`.
    """
    half = cos.shape[-1]
    y = x.clone()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = cos[: x.shape[1], i, None], sin[: x.shape[1], i, None]
        y[..., a] = x[..., a] * c - x[..., b] * s
        y[..., b] = x[..., b] * c + x[..., a] * s
    return y


class RotaryEmbedding(nn.Module):
    """Rotates q and k `[B, T, H, D]` in their first `dim` channels by their positions; holds no
    parameters and no tables, so `device` has nothing to place. Positions are in fp32:
    `pos_idx_in_fp32=False`, which rounds them to half precision, raises `ValueError`.

    Example:
        >>> q, k = torch.randn(2, 1, 5, 2, 8)
        >>> q_rot, k_rot = RotaryEmbedding(8)(q, k, seqlen_offset=3)
        >>> torch.allclose(q_rot.norm(), q.norm())
        True
    """

    @checked
    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        scale_base: float | None = None,
        interleaved: bool = False,
        pos_idx_in_fp32: bool = True,
        device: torch.device | str | None = None,
        scaling: dict[str, Any] | None = None,
    ):
        super().__init__()
        if not pos_idx_in_fp32:
            raise ValueError(
                "RotaryEmbedding: pos_idx_in_fp32 is False, but positions are always in fp32; "
                "drop it"
            )
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim is {dim}; an even number was expected")
        kind = (scaling or {}).get("rope_type", "default")
        if kind not in SCALINGS or any(n not in (scaling or {}) for n in SCALINGS[kind]):
            raise ValueError(
                f"RotaryEmbedding: scaling is {scaling!r}; expected rope_type to be one of "
                f"{', '.join(SCALINGS)}, and its fields: {SCALINGS.get(kind, ())}"
            )
        self.scaling = scaling or {}
        self.dim, self.base, self.scale_base, self.interleaved = dim, base, scale_base, interleaved

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Frequencies after `scaling`: all divided by a factor, or as in Llama 3 those of waves
        longer than the context it was trained on, with a ramp between.
        """
        kind, s = self.scaling.get("rope_type", "default"), self.scaling
        if kind == "default":
            return frequencies
        slow = frequencies / s["factor"]
        if kind == "linear":
            return slow
        turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return share * frequencies + (1 - share) * slow

    @checked
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        seqlen_offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        chunk_indices: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Positions are `positions` `[B or 1, T]` where given; else they count from `seqlen_offset`
        (an int, or one per sequence) in every row, or in every sequence of `cu_seqlens`.
        `max_seqlen`, the size of a table where there is one, changes nothing; `chunk_indices`
        follows from `cu_seqlens` and is only checked.
        """
        check_packed("RotaryEmbedding", cu_seqlens, chunk_indices=chunk_indices)
        if positions is None:
            positions = _positions(q, seqlen_offset, cu_seqlens)
        steps = torch.arange(0, self.dim, 2, device=q.device, dtype=torch.float32)
        angles = positions.unsqueeze(-1).float() * self.scaled(self.base ** (-steps / self.dim))
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is None:
            q, k = (_rotated(x, cos, sin, self.interleaved) for x in (q, k))
            return q, k
        stretch = (steps + 0.4 * self.dim) / (1.4 * self.dim)
        scale = stretch ** (positions.unsqueeze(-1).float() / self.scale_base)
        return (
            _rotated(q, cos * scale, sin * scale, self.interleaved),
            _rotated(k, cos / scale, sin / scale, self.interleaved),
        )
