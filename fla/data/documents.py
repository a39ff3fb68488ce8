# SPDX-License-Identifier: MIT
"""The documents of a corpus, split into a training and a held-out part.

The split is by document, from a hash of its name, so it is the same on every run and machine.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fla.core.errors import UsageError

HELD_OUT_ONE_IN = 20


@dataclass
class Corpus:
    """Training documents (a list, or an iterable read on the fly) and held-out documents; with
    `shards` the training part lies there as tokens.
    """

    name: str
    train: Iterable[str]
    held_out: list[str]
    shards: Path | None = None

    @property
    def streaming(self) -> bool:
        return not isinstance(self.train, list)

    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.held_out)


def split(name: str, documents: dict[str, str]) -> Corpus:
    """Hold out about a twentieth of the text in whole documents, at least one; a single document is
    cut instead.
    """
    documents = {key: text for key, text in documents.items() if text}
    if not documents:
        raise UsageError(f"--data: {name!r} holds no text; every file is empty or not UTF-8")
    if len(documents) == 1:
        text = next(iter(documents.values()))
        cut = len(text) - max(1, len(text) // HELD_OUT_ONE_IN)
        return Corpus(name, [text[:cut]], [text[cut:]])
    budget = sum(map(len, documents.values())) / HELD_OUT_ONE_IN
    held: set[str] = set()
    for key in sorted(documents, key=lambda k: hashlib.sha256(k.encode()).hexdigest()):
        if not held or len(documents[key]) <= budget:
            held.add(key)
            budget -= len(documents[key])
    return Corpus(
        name,
        [text for key, text in documents.items() if key not in held],
        [text for key, text in documents.items() if key in held],
    )
