# SPDX-License-Identifier: MIT
"""Recall, for any tokenizer: prompts whose answer stands in them (`fla.data.probes`), scored by
exact string and by how surely the answer is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.data.probes import Prompt, prompts
from fla.data.tokens import encode


@dataclass
class Batch:
    """Prompts with their answers, packed: input_ids `[1, total]`, cu_seqlens, and True at the
    tokens `[1, total]` whose next token is the answer's.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    asked: Tensor


def pack(tokenizer: Any, wanted: list[Prompt]) -> Batch:
    """Prompts in one row."""
    rows, asked, bounds = [], [], [0]
    for prompt in wanted:
        before, whole = (encode(tokenizer, x) for x in (prompt.text, prompt.text + prompt.answer))
        same = 0
        while same < len(before) and before[same] == whole[same]:
            same += 1  # a tokenizer may join the end of the text with the answer
        marks = torch.zeros(len(whole), dtype=torch.bool)
        marks[same - 1 : len(whole) - 1] = True
        rows.append(torch.from_numpy(whole).long())
        asked.append(marks)
        bounds.append(bounds[-1] + len(whole))
    row = torch.cat(rows)[None]
    return Batch(row, torch.tensor(bounds, dtype=torch.int32), torch.cat(asked)[None])


@dataclass
class Recall:
    """Share of answers that are right in every token, and nats an answer's token costs."""

    exact: float
    nats: float


@torch.inference_mode()
def recall(
    model: Any, tokenizer: Any, kind: str, count: int = 32, characters: int = 400, seed: int = 0
) -> Recall:
    """Run a probe. An answer is right where every token of it is the likeliest one after the
    prompt and the answer's tokens before: what greedy generation would write.
    """
    right, nats, tokens = 0, 0.0, 0
    wanted = prompts(kind, count, characters, seed)
    for i in range(0, count, 8):
        batch = pack(tokenizer, wanted[i : i + 8])
        ids, bounds = (x.to(model.device) for x in (batch.input_ids, batch.cu_seqlens))
        logits = model(ids, cu_seqlens=bounds, use_cache=False).logits[0].float()
        at = batch.asked[0].nonzero().flatten().to(model.device)
        targets = ids[0, at + 1]
        nats += float(F.cross_entropy(logits[at], targets, reduction="sum"))
        tokens += len(at)
        hits = logits[at].argmax(-1) == targets
        owner = torch.searchsorted(bounds, at, right=True) - 1
        right += sum(bool(hits[owner == n].all()) for n in range(len(bounds) - 1))
    return Recall(right / count, nats / tokens)
