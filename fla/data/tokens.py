# SPDX-License-Identifier: MIT
"""Tokenisers and packed blocks of tokens with the boundaries of the documents in them."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from fla.core.errors import UsageError

BYTE_OFFSET = 3  # ByT5's ids 0, 1, 2 are padding, end of text and unknown


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`"byte"` (ByT5's: 256 bytes and three special tokens, no download) or any Hugging Face
    tokenizer.
    """
    if name == "byte":
        return ByT5Tokenizer(extra_ids=0)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UsageError(
            f"--tokenizer: {name!r} cannot be loaded: {error}; pass 'byte' or a Hugging Face "
            "tokenizer"
        ) from error


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that begins every document: begin of text where there is one, else end of text."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise UsageError(
            "--tokenizer: it has neither a begin nor an end of text token, which documents need"
        )
    return token


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Token ids of one document, its start token first. Bytes take a shortcut with ByT5's own
    result.
    """
    if isinstance(tokenizer, ByT5Tokenizer):
        ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + BYTE_OFFSET
    else:
        ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    return np.concatenate([np.asarray([start_token(tokenizer)], dtype=np.int32), ids])


class TokenBlocks(Dataset):
    """All documents after one another, cut into blocks of `length` tokens; the rest after the last
    block is dropped.

    An item is `input_ids [length]` and `starts`, the positions in the block at which a document
    begins.
    """

    def __init__(self, documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int):
        rows = [encode(tokenizer, text) for text in documents]
        self.length = length
        self.tokens = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        self.starts = np.cumsum([0] + [len(row) for row in rows])[:-1]
        if len(self.tokens) < length:
            raise UsageError(
                f"--data: the corpus has {len(self.tokens)} tokens, fewer than one block of "
                f"--seq_len {length}"
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        begin, end = i * self.length, (i + 1) * self.length
        low, high = np.searchsorted(self.starts, [begin, end])
        return {
            "input_ids": torch.from_numpy(self.tokens[begin:end].astype(np.int64)),
            "starts": (self.starts[low:high] - begin).tolist(),
        }


class StreamedBlocks(IterableDataset):
    """`TokenBlocks` read on the fly from documents that do not fit into memory."""

    def __init__(self, documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int):
        self.documents, self.tokenizer, self.length = documents, tokenizer, length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        tokens, starts = np.zeros(0, dtype=np.int32), []
        for text in self.documents:
            starts.append(len(tokens))
            tokens = np.concatenate([tokens, encode(self.tokenizer, text)])
            while len(tokens) >= self.length:
                yield {
                    "input_ids": torch.from_numpy(tokens[: self.length].astype(np.int64)),
                    "starts": [s for s in starts if s < self.length],
                }
                starts = [s - self.length for s in starts if s >= self.length]
                tokens = tokens[self.length :]


def collate(blocks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks one after the other in a single row: input_ids and labels `[1, total]` and cu_seqlens,
    which bounds every document and every block. A sequence's first token carries no loss, and
    says so: its label is -100, which whoever counts labels must know.

    Example:
        >>> block = {"input_ids": torch.tensor([1, 7, 1, 8]), "starts": [0, 2]}
        >>> collate([block, block])["cu_seqlens"].tolist()
        [0, 2, 4, 6, 8]
    """
    ids, bounds, offset = [], set(), 0
    for block in blocks:
        bounds |= {offset, *(offset + s for s in block["starts"])}
        ids.append(block["input_ids"])
        offset += len(block["input_ids"])
    row = torch.cat(ids).unsqueeze(0)
    cu_seqlens = torch.tensor([*sorted(bounds), offset], dtype=torch.int32)
    labels = row.index_fill(1, cu_seqlens[:-1].long(), -100)
    return {"input_ids": row, "labels": labels, "cu_seqlens": cu_seqlens}
