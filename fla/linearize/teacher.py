# SPDX-License-Identifier: MIT
"""A teacher's likeliest tokens on disk: computed when a block is first read, read from then on.

A block of T tokens takes T k (4 + 2) bytes: ids as int32, log probabilities as fp16. What is stored
belongs to one teacher, one tokenizer and one text: another's is refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fla.core.errors import UsageError
from fla.linearize.data import Text
from fla.linearize.files import read_json, write_json
from fla.modules.losses import TopK


def fingerprint(*parts: Any) -> str:
    """A hash of tensors, arrays, and anything with a repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().float().cpu().numpy()
        digest.update(
            np.ascontiguousarray(part).tobytes()
            if isinstance(part, np.ndarray)
            else repr(part).encode()
        )
    return digest.hexdigest()[:16]


def teacher_fingerprint(teacher: Any) -> str:
    """A hash of all weights, from a few numbers of each."""
    sample = [(n, x.flatten()[:: max(1, x.numel() // 64)]) for n, x in teacher.state_dict().items()]
    return fingerprint(*(part for pair in sample for part in pair))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    return fingerprint(sorted(tokenizer.get_vocab().items()))


class TopTokens:
    """The k likeliest tokens after every token of a text's blocks."""

    def __init__(self, folder: Path, teacher: Any, tokenizer: Any, text: Text, k: int):
        self.teacher, self.text, self.k = teacher, text, k
        if k > teacher.config.vocab_size:
            raise UsageError(
                f"distill.top_k is {k}, but the teacher has {teacher.config.vocab_size} tokens"
            )
        about = dict(
            teacher=teacher_fingerprint(teacher),
            tokenizer=tokenizer_fingerprint(tokenizer),
            text=fingerprint(text.blocks.tokens, text.blocks.starts),
            seq=text.blocks.length,
            k=k,
        )
        there = read_json(folder / "about.json")
        if there is not None and there != about:
            different = [n for n in about if there.get(n) != about[n]]
            raise UsageError(
                f"{folder} holds tokens of another {', '.join(different)}; remove it, or choose "
                "another folder"
            )
        shape = (len(text.blocks), text.blocks.length, k)
        self.ids = self.open(folder / "ids.npy", np.int32, shape)
        self.log_probs = self.open(folder / "log_probs.npy", np.float16, shape)
        self.done = self.open(folder / "done.npy", np.bool_, shape[:1])
        if there is None:
            write_json(folder / "about.json", about)

    @staticmethod
    def open(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode: Any = "r+" if path.exists() else "w+"
        return np.lib.format.open_memmap(path, mode, dtype, shape)

    def of(self, inputs: dict[str, Tensor]) -> TopK:
        """The likeliest tokens for a batch of blocks, whose numbers are its `places`."""
        places = inputs["places"].tolist()
        if not self.done[places].all():
            self.fill(places, inputs)
        device = inputs["input_ids"].device
        rows = (torch.from_numpy(x[places]) for x in (self.ids, self.log_probs))
        ids, log_probs = (x.flatten(0, 1)[None].to(device) for x in rows)
        return TopK(ids.long(), log_probs.float())

    @torch.no_grad()
    def fill(self, places: list[int], inputs: dict[str, Tensor]) -> None:
        hidden = self.teacher.model(
            inputs["input_ids"], cu_seqlens=inputs["cu_seqlens"], use_cache=False
        ).last_hidden_state[0]
        for i, place in enumerate(places):
            rows = hidden[i * self.text.blocks.length : (i + 1) * self.text.blocks.length]
            z = self.teacher.lm_head(rows).float().log_softmax(-1)
            top, ids = z.topk(self.k)
            self.ids[place], self.log_probs[place] = ids.cpu().numpy(), top.half().cpu().numpy()
        self.ids.flush()
        self.log_probs.flush()
        self.done[places] = True  # last: the blocks it marks are on disk now
        self.done.flush()
