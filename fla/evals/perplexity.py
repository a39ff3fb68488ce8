# SPDX-License-Identifier: MIT
"""Perplexity and bits per byte of held-out documents.

    perplexity = exp(nats / tokens)        bits per byte = nats / ln 2 / bytes of the text

Documents are cut into windows of `length` tokens that overlap by one, so every token is scored
once, on the tokens of its own window; the first token of a document, a marker, is not part of its
text and carries no score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fla.core.errors import UsageError
from fla.core.layout import SequenceLayout
from fla.models.decoder import next_tokens

IGNORE = -100


@dataclass
class Score:
    """Sums over tokens, and the figures made of them."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    buckets: dict[int, tuple[float, int]] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def __add__(self, other: Score) -> Score:
        """The sums of both."""
        buckets = dict(self.buckets)
        for start, (nats, tokens) in other.buckets.items():
            mine = buckets.get(start, (0.0, 0))
            buckets[start] = (mine[0] + nats, mine[1] + tokens)
        return Score(
            self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes, buckets
        )

    def whole(self) -> Score:
        """Itself, or `UsageError` where it is the score of nothing, or no number."""
        if not self.tokens:
            raise UsageError("there is no token to score: the held-out text is empty")
        if not math.isfinite(self.nats):
            raise UsageError("the model's losses are not numbers, so it has no score")
        return self

    def by_position(self) -> dict[int, float]:
        """Perplexity by the first position of each bucket."""
        return {start: math.exp(nats / n) for start, (nats, n) in sorted(self.buckets.items())}


def windows(documents: list[Tensor], length: int) -> list[Tensor]:
    """Windows of up to `length + 1` tokens, each beginning with the last token of the one before.

    Example:
        >>> [w.tolist() for w in windows([torch.arange(6)], 3)]
        [[0, 1, 2, 3], [3, 4, 5]]
    """
    return [
        row[begin : begin + length + 1]
        for row in documents
        for begin in range(0, max(len(row) - 1, 0), length)
    ]


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    documents: list[Tensor],
    text_bytes: int,
    *,
    length: int = 512,
    tokens_per_batch: int = 8192,
    bucket: int | None = None,
    progress=None,
) -> Score:
    """Score token rows (start token first) with a causal language model; windows are packed, never
    padded.

    `bucket` collects perplexity by position in the window; `progress`, if given, is called with the
    tokens done.
    """
    result = Score(bytes=text_bytes)
    batch: list[Tensor] = []
    waiting = windows(documents, length)
    model.eval()
    for i, window in enumerate(waiting):
        batch.append(window)
        if i + 1 < len(waiting) and sum(map(len, batch)) + len(waiting[i + 1]) <= tokens_per_batch:
            continue
        _score_batch(model, batch, bucket, result)
        if progress is not None:
            progress(result.tokens)
        batch = []
    return result


def _score_batch(
    model: PreTrainedModel, batch: list[Tensor], bucket: int | None, result: Score
) -> None:
    row = torch.cat(batch).unsqueeze(0).to(model.device)
    bounds = F.pad(torch.tensor([len(w) for w in batch]).cumsum(0), (1, 0)).to(model.device)
    logits = model(row, cu_seqlens=bounds, use_cache=False).logits[0].float()
    layout = SequenceLayout.resolve(1, row.shape[1], cu_seqlens=bounds)
    targets = next_tokens(row, layout)[0]
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none").double()
    kept = targets != IGNORE
    result.nats += losses.sum().item()
    result.tokens += int(kept.sum())
    if bucket:
        starts = layout.positions(row.device)[0] // bucket * bucket
        for start in starts[kept].unique().tolist():
            inside = kept & (starts == start)
            nats, count = result.buckets.get(start, (0.0, 0))
            result.buckets[start] = (nats + losses[inside].sum().item(), count + int(inside.sum()))
