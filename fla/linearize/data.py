# SPDX-License-Identifier: MIT
"""Batches of text by number, so that a run that resumes sees the same ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fla.core.errors import UsageError
from fla.data.corpus import load_corpus
from fla.data.documents import Corpus
from fla.data.tokens import TokenBlocks, collate
from fla.linearize.config import Data


class Text:
    """Training blocks in an order that a seed fixes, epoch after epoch, and held-out ones."""

    def __init__(self, data: Data, tokenizer: Any, seq: int | None = None):
        self.data, self.tokenizer = data, tokenizer
        self.corpus: Corpus = load_corpus(data.source, data.column)
        if self.corpus.streaming:
            raise UsageError("data.source: linearize reads whole corpora; stream to a file first")
        self.epoch = -1
        length = data.seq if seq is None else seq
        self.blocks = TokenBlocks(self.corpus.train, tokenizer, length)
        self.held_out = TokenBlocks(self.corpus.held_out, tokenizer, min(length, data.seq))

    def index(self, place: int) -> int:
        """The block at a place of the endless order."""
        epoch, at = divmod(place, len(self.blocks))
        if epoch != self.epoch:
            generator = np.random.default_rng([self.data.seed, epoch])
            self.epoch, self.order = epoch, generator.permutation(len(self.blocks))
        return int(self.order[at])

    def batch(self, step: int) -> dict[str, Tensor]:
        """The step-th batch: input_ids and labels `[1, total]`, cu_seqlens."""
        places = range(step * self.data.batch, (step + 1) * self.data.batch)
        return collate([self.blocks[self.index(place)] for place in places])

    def held_out_batches(self, tokens: int) -> list[dict[str, Tensor]]:
        """About `tokens` tokens of held-out text, at least one block."""
        count = max(1, min(len(self.held_out), tokens // self.held_out.length))
        chosen = np.linspace(0, len(self.held_out) - 1, count).round().astype(int)
        size = self.data.batch
        groups = [chosen[i : i + size] for i in range(0, count, size)]
        return [collate([self.held_out[int(i)] for i in group]) for group in groups]


class Ordered(Dataset):
    """The blocks of a `Text` in its order, for a trainer that reads them in turn."""

    def __init__(self, text: Text, steps: int):
        self.text, self.count = text, steps * text.data.batch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.text.blocks[self.text.index(place)] | {"place": self.text.index(place)}


def on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in batch.items()}
