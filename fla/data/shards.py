# SPDX-License-Identifier: MIT
"""Token shards: a corpus tokenised once, on disk, and read from there by memory map.

A folder holds `plan.json` (what the shards are made of), for every shard `NNNNN.tokens.npy` (ids)
and `NNNNN.starts.npy` (where its documents begin), `held_out.jsonl` (texts), and when it is whole
`index.json`. A shard is written under another name and renamed, so what is there is whole, and a
run that stopped makes only what is missing.

`make_blocks` gives any corpus as blocks of tokens: from its shards, from memory or on the fly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fla.core.errors import UsageError
from fla.data.documents import Corpus
from fla.data.tokens import StreamedBlocks, TokenBlocks, encode, load_tokenizer


def write_shards(
    corpus: Corpus,
    tokenizer: str,
    folder: str | Path,
    *,
    characters: int = 1 << 24,
    workers: int = 1,
    progress: Callable[[int, bool], None] = lambda characters, made: None,
) -> dict[str, Any]:
    """Tokenise a corpus into shards of about `characters` characters each, in `workers` processes
    (one is this process), and return the index. `progress` is told the characters of each shard,
    and whether it had to be made.

    Raises `UsageError` where the folder holds shards of another corpus, tokenizer or size.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_tokenizer(tokenizer)
    plan = dict(
        corpus=corpus.name, tokenizer=tokenizer, vocabulary=len(loaded), characters=characters
    )
    _agree(folder / "plan.json", plan)
    _replace(
        folder / "held_out.jsonl", "".join(json.dumps(x) + "\n" for x in corpus.held_out).encode()
    )
    count = 0
    with _workers(workers, tokenizer) as pool:
        waiting: dict[Future, int] = {}
        for i, texts in enumerate(_groups(corpus.train, characters)):
            size, count = sum(map(len, texts)), i + 1
            if _paths(folder, i)[1].exists():
                progress(size, False)
                continue
            while len(waiting) >= 2 * workers:  # no more texts in memory than are worked on
                _collect(waiting, progress)
            waiting[pool.submit(_write_one, folder, i, texts)] = size
        while waiting:
            _collect(waiting, progress)
    made = [np.load(_paths(folder, i)[0], mmap_mode="r").shape[0] for i in range(count)]
    index = plan | dict(shards=count, tokens=int(sum(made)))
    _replace(folder / "index.json", json.dumps(index, indent=1).encode())
    return index


def _agree(path: Path, plan: dict[str, Any]) -> None:
    if not path.exists():
        _replace(path, json.dumps(plan, indent=1).encode())
        return
    found = json.loads(path.read_text())
    for name, value in plan.items():
        if found.get(name) != value:
            raise UsageError(
                f"{path.parent} holds shards with {name}={found.get(name)!r}, not {value!r}; "
                "choose another folder, or delete it"
            )


def _groups(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _collect(waiting: dict[Future, int], progress: Callable[[int, bool], None]) -> None:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        future.result()
        progress(waiting.pop(future), True)


_tokenizer: PreTrainedTokenizerBase | None = None


def _workers(count: int, tokenizer: str) -> Executor:
    """A single worker is a thread of this process: a process would take seconds to import torch."""
    if count == 1:
        return ThreadPoolExecutor(1, initializer=_begin, initargs=(tokenizer,))
    return ProcessPoolExecutor(
        count, get_context("spawn"), initializer=_begin, initargs=(tokenizer,)
    )


def _begin(tokenizer: str) -> None:
    """Runs once in every worker."""
    global _tokenizer
    _tokenizer = load_tokenizer(tokenizer)


def _write_one(folder: Path, i: int, texts: list[str]) -> None:
    assert _tokenizer is not None
    rows = [encode(_tokenizer, text) for text in texts]
    small = len(_tokenizer) <= np.iinfo(np.uint16).max
    starts = np.cumsum([0] + [len(row) for row in rows])[:-1]
    for path, values in zip(
        _paths(folder, i),
        (np.concatenate(rows).astype(np.uint16 if small else np.uint32), starts.astype(np.int64)),
        strict=True,
    ):
        scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
        with scratch.open("wb") as file:
            np.save(file, values)
        os.replace(scratch, path)


def _paths(folder: Path, i: int) -> tuple[Path, Path]:
    """The files of a shard's tokens and of its documents' starts; the starts are written last."""
    return folder / f"{i:05}.tokens.npy", folder / f"{i:05}.starts.npy"


def _replace(path: Path, data: bytes) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    scratch.write_bytes(data)
    os.replace(scratch, path)


def load_index(folder: str | Path) -> dict[str, Any]:
    """The index of a folder of shards; raises `UsageError` where it is not whole."""
    path = Path(folder).expanduser() / "index.json"
    if not path.exists():
        raise UsageError(
            f"--data: {str(folder)!r} holds no whole shards (no index.json); run the same "
            "`fla preprocess` again, which resumes"
        )
    return json.loads(path.read_text())


def load_held_out(folder: str | Path) -> list[str]:
    lines = (Path(folder).expanduser() / "held_out.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class ShardBlocks(Dataset):
    """Blocks of `length` tokens of a folder of shards, items as of `TokenBlocks`; what is left at
    the end of a shard is dropped.
    """

    def __init__(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, length: int):
        index = load_index(folder)
        if index["vocabulary"] != len(tokenizer):
            raise UsageError(
                f"--tokenizer: it has {len(tokenizer)} tokens, and the shards in {folder} were "
                f"made with {index['tokenizer']!r}, which has {index['vocabulary']}; pass that one"
            )
        self.folder, self.length = Path(folder).expanduser(), length
        # opened in the process that reads: a memory map does not travel to a data worker
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        sizes = [len(self._shard(i)[0]) // length for i in range(index["shards"])]
        self.ends = np.cumsum(sizes)
        self._open = {}
        if not self.ends.size or self.ends[-1] == 0:
            raise UsageError(f"--seq_len: no shard in {folder} holds a block of {length} tokens")

    def _shard(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if i not in self._open:
            tokens, starts = _paths(self.folder, i)
            self._open[i] = np.load(tokens, mmap_mode="r"), np.load(starts)
        return self._open[i]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        shard = int(np.searchsorted(self.ends, i, side="right"))
        first = i - (int(self.ends[shard - 1]) if shard else 0)
        tokens, starts = self._shard(shard)
        begin, end = first * self.length, (first + 1) * self.length
        low, high = np.searchsorted(starts, [begin, end])
        return {
            "input_ids": torch.from_numpy(tokens[begin:end].astype(np.int64)),
            "starts": (starts[low:high] - begin).tolist(),
        }


def make_blocks(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """The training part of a corpus as blocks."""
    if corpus.shards is not None:
        return ShardBlocks(corpus.shards, tokenizer, length)
    kind = StreamedBlocks if corpus.streaming else TokenBlocks
    return kind(corpus.train, tokenizer, length)
