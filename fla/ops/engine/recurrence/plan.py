# SPDX-License-Identifier: MIT
"""How tokens are cut into chunks, and how chunks of many sequences march in step.

Sequences are sorted by their number of chunks, longest first, so that at every step the sequences
still running are a prefix of the batch. A chunk never crosses a boundary. A dense batch is the
special case in which all rows run to the end together and every chunk is a plain slice.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One chunk of every sequence still running.

    Fields:
        first: row of this step's first chunk in buffers that hold all chunks.
        rows: sequences still running.
        size: tokens of the longest chunk of this step.
        begin: first token, where the chunks are slices of the rows of the input.
        index: token of every (row, position) `[rows, size]`, shorter chunks padded; None where the
            chunks are slices.
        padding: True at the padding of `index`, or None where there is none.
    """

    first: int
    rows: int
    size: int
    begin: int = 0
    index: Tensor | None = None
    padding: Tensor | None = None

    def read(self, x: Tensor) -> Tensor:
        """This step's tokens of x `[B, T, ...]` as `[rows, size, ...]`; padding reads as zero."""
        if self.index is None:
            return x[:, self.begin : self.begin + self.size]
        tokens = x[0].index_select(0, self.index.flatten()).view(self.rows, self.size, *x.shape[2:])
        if self.padding is not None:
            tokens.masked_fill_(self.padding.view(self.rows, self.size, *[1] * (x.dim() - 2)), 0)
        return tokens

    def write(self, x: Tensor, tokens: Tensor) -> None:
        """The inverse of `read`, into x; padding is dropped."""
        if self.index is None:
            x[:, self.begin : self.begin + self.size].copy_(tokens)
        elif self.padding is None:
            x[0].index_copy_(0, self.index.flatten(), tokens.flatten(0, 1).to(x.dtype))
        else:
            real = ~self.padding
            x[0].index_copy_(0, self.index[real], tokens[real].to(x.dtype))


@dataclass(frozen=True)
class Plan:
    """All steps, and `order`: the sequence that row i of the state belongs to (None: row i is
    sequence i).
    """

    steps: list[Step]
    chunks: int
    order: Tensor | None = None

    def sort(self, state: Tensor) -> Tensor:
        """States by sequence to states by row."""
        return state if self.order is None else state.index_select(0, self.order)

    def unsort(self, state: Tensor) -> Tensor:
        """States by row to states by sequence."""
        if self.order is None:
            return state
        return torch.empty_like(state).index_copy_(0, self.order, state)


def count_chunks(batch: int, length: int, sequences: int, chunk_size: int, packed: bool) -> int:
    """An upper bound on the chunks of a plan that needs no look at the boundaries; exact where not
    packed.
    """
    if packed:
        return length // chunk_size + sequences
    return batch * -(-length // chunk_size)


def make_plan(
    batch: int, length: int, bounds: list[int] | None, chunk_size: int, device: torch.device
) -> Plan:
    """Cut `batch` rows of `length` tokens, or the packed sequences between `bounds`, into steps."""
    if bounds is None:
        begins = range(0, length, chunk_size)
        steps = [
            Step(i * batch, batch, min(chunk_size, length - begin), begin)
            for i, begin in enumerate(begins)
        ]
        return Plan(steps, batch * len(steps))
    spans = list(pairwise(bounds))
    order = sorted(range(len(spans)), key=lambda i: spans[i][0] - spans[i][1])
    spans = [spans[i] for i in order]
    steps, chunks = [], 0
    while spans and spans[0][0] < spans[0][1]:
        spans = [(begin, end) for begin, end in spans if begin < end]
        steps.append(_ragged_step(spans, chunks, chunk_size, device))
        chunks += len(spans)
        spans = [(begin + chunk_size, end) for begin, end in spans]
    return Plan(steps, chunks, torch.tensor(order, device=device))


def _ragged_step(
    spans: list[tuple[int, int]], first: int, chunk_size: int, device: torch.device
) -> Step:
    sizes = [min(chunk_size, end - begin) for begin, end in spans]
    size = max(sizes)
    if len(spans) == 1:
        return Step(first, 1, size, spans[0][0])
    offsets = torch.arange(size)
    index = torch.tensor([begin for begin, _ in spans])[:, None] + offsets
    padding = offsets >= torch.tensor(sizes)[:, None]
    if not bool(padding.any()):
        return Step(first, len(spans), size, index=index.to(device))
    index = index.masked_fill(padding, spans[0][0])
    return Step(first, len(spans), size, index=index.to(device), padding=padding.to(device))
