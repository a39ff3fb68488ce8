# SPDX-License-Identifier: MIT
"""`SequenceLayout`: padding and boundaries in one canonical form.

A batch reaches a layer as a padded rectangle with a mask or as packed sequences with `cu_seqlens`.
Both become one `SequenceLayout`, which convolution and recurrence both read, so neither can forget
it. Further forms of boundaries that models take are read in `fla.models.packing`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fla.core.boundaries import boundaries_to_list
from fla.core.checks import check_boundaries
from fla.core.parallel import Shard, current, refuse_sharded


@dataclass(frozen=True)
class SequenceLayout:
    """Which tokens of a `[B, T]` rectangle are real, and which of them belong together.

    Fields:
        batch, length: B and T of the rectangle as given.
        cu_seqlens: boundaries `[N+1]` of the packed real tokens; None for B dense rows of T.
        indices: positions of the real tokens in the flattened rectangle, or None when all are real.
        starts: tokens already seen per sequence, an int or a tensor `[N]`.
        shard: inside `sequence_parallel`, which of the tokens of the whole rows these are;
            cu_seqlens is then of the whole row.

    Example:
        >>> mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        >>> layout = SequenceLayout.resolve(2, 3, attention_mask=mask)
        >>> layout.cu_seqlens.tolist()
        [0, 2, 5]
        >>> layout.pack(torch.arange(6.0).view(2, 3)).tolist()
        [[1.0, 2.0, 3.0, 4.0, 5.0]]
    """

    batch: int
    length: int
    cu_seqlens: Tensor | None = None
    indices: Tensor | None = None
    starts: int | Tensor = 0
    shard: Shard | None = None

    @classmethod
    def resolve(
        cls,
        batch: int,
        length: int,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_length: int = 0,
        device: torch.device | None = None,
    ) -> SequenceLayout:
        """Build the layout from whatever describes the input, and refuse descriptions that
        disagree. attention_mask is `[B, T]` or, under a cache, `[B, past + T]`; 1 marks a real
        token, 0 padding. `device` is where the tokens are.
        """
        if attention_mask is not None:
            _check_mask(attention_mask, device)
        parallel = current()
        if parallel is not None:
            if past_length or (attention_mask is not None and not attention_mask.bool().all()):
                what = "a cache" if past_length else "padding in attention_mask"
                refuse_sharded("SequenceLayout", f"with {what}: pack sequences with cu_seqlens")
            shard = parallel.of("SequenceLayout", length)
            shard.bounds("SequenceLayout", cu_seqlens)
            return cls(batch, length, cu_seqlens, shard=shard)
        if attention_mask is not None and attention_mask.shape == (batch, length):
            attention_mask = torch.nn.functional.pad(attention_mask, (past_length, 0), value=1)
        mask, starts = cls._split_mask(batch, length, attention_mask, past_length)
        if cu_seqlens is not None:
            check_boundaries("SequenceLayout", batch, cu_seqlens, device)
            boundaries_to_list(cu_seqlens, length)
            if mask is not None:
                raise ValueError(
                    "SequenceLayout: attention_mask marks padding inside the packed sequences of "
                    "cu_seqlens, "
                    "so the two contradict each other; drop the padded tokens or the mask"
                )
            return cls(batch, length, cu_seqlens=cu_seqlens, starts=starts)
        if mask is None:
            return cls(batch, length, starts=starts)
        bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        indices = mask.flatten().nonzero().flatten()
        return cls(batch, length, bounds, indices, starts)

    @staticmethod
    def _split_mask(
        batch: int, length: int, mask: Tensor | None, past: int
    ) -> tuple[Tensor | None, int | Tensor]:
        """The mask of the current tokens (None where it drops nothing) and the real tokens before
        them.
        """
        if mask is None:
            return None, past
        widths = (length, length + past)
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in widths:
            raise ValueError(
                f"SequenceLayout: attention_mask has shape {list(mask.shape)}; expected "
                f"[B={batch}, T={length}]"
                + (f" or [B={batch}, past+T={length + past}]" if past else "")
                + ", with 1 for real tokens and 0 for padding"
            )
        current = mask[:, mask.shape[1] - length :].bool()
        before = mask[:, : mask.shape[1] - length].bool()
        starts: int | Tensor = past if bool(before.all()) else before.sum(1)
        return (None if bool(current.all()) else current), starts

    @property
    def packed(self) -> bool:
        """Whether the tokens travel as one row `[1, total, ...]` with boundaries."""
        return self.cu_seqlens is not None

    @property
    def padded(self) -> bool:
        """Whether some tokens of the rectangle are padding."""
        return self.indices is not None

    @property
    def rows(self) -> bool:
        """Whether every row of the rectangle is one sequence, as a cache keeps them."""
        bounds = self.cu_seqlens
        return bounds is None or (self.indices is not None and len(bounds) == self.batch + 1)

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[1, total, ...]` without padding; unchanged when nothing is padded."""
        if self.indices is None:
            return x
        return x.flatten(0, 1).index_select(0, self.indices).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`, with zeros at the padding."""
        if self.indices is None:
            return x
        out = x.new_zeros(self.batch * self.length, *x.shape[2:])
        return out.index_copy(0, self.indices, x.squeeze(0)).unflatten(0, (self.batch, self.length))

    def real(self) -> Tensor | None:
        """`[B, T]`, True at real tokens; None where nothing is padded."""
        if self.indices is None:
            return None
        flat = torch.zeros(self.batch * self.length, dtype=torch.bool, device=self.indices.device)
        return flat.index_fill(0, self.indices, True).view(self.batch, self.length)

    def lengths(self) -> list[int]:
        """Length of each sequence, on the host."""
        if self.cu_seqlens is None:
            return [self.length] * self.batch
        return self.cu_seqlens.diff().tolist()

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Position of every travelling token in its own sequence, `[B, T]` or `[1, total]`."""
        starts = self.starts
        if self.shard is not None:
            return self._sharded_positions(self.shard, device)
        if self.cu_seqlens is None:
            row = torch.arange(self.length, device=device).expand(self.batch, -1)
            return row + (starts.view(-1, 1).to(device) if isinstance(starts, Tensor) else starts)
        cu = self.cu_seqlens.to(device)
        lengths = cu.diff()
        total = int(cu[-1])
        begin = cu[:-1] - (starts.to(cu) if isinstance(starts, Tensor) else starts)
        offsets = begin.repeat_interleave(lengths, output_size=total)
        return (torch.arange(total, device=device) - offsets).unsqueeze(0)

    def _sharded_positions(self, shard: Shard, device: torch.device | None) -> Tensor:
        tokens = torch.arange(shard.begin, shard.end, device=device)
        if self.cu_seqlens is None:
            return tokens.expand(self.batch, -1)
        bounds = self.cu_seqlens.to(tokens)
        first = bounds[torch.searchsorted(bounds, tokens, right=True) - 1]
        return (tokens - first).unsqueeze(0)


def _check_mask(mask: Tensor, device: torch.device | None) -> None:
    """Raise `ValueError` unless a mask holds zeros and ones, where the tokens are."""
    if not isinstance(mask, Tensor):
        problem = f"is a {type(mask).__name__}; expected a tensor [B, T] of 0 and 1"
    elif device is not None and mask.device != device:
        problem = f"is on {mask.device} and the tokens on {device}; move it there"
    elif mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all()):
        problem = "holds other values than 0 (padding) and 1; pass for example mask != 0"
    else:
        return
    raise ValueError(f"SequenceLayout: attention_mask {problem}")
