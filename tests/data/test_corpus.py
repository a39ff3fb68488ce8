# SPDX-License-Identifier: MIT
"""Corpora, tokens, packed blocks."""

import json

import numpy as np
import pytest
import torch

from fla.core.errors import UsageError
from fla.data.corpus import compressed_bits_per_byte, load_corpus
from fla.data.documents import split
from fla.data.shards import make_blocks
from fla.data.tokens import (
    StreamedBlocks,
    TokenBlocks,
    collate,
    encode,
    load_tokenizer,
)

BYTES = load_tokenizer("byte")


def test_the_standard_library_is_there_split_by_file_and_always_the_same():
    corpus = load_corpus("stdlib")
    assert corpus.train == load_corpus("stdlib").train
    total = sum(map(len, corpus.train)) + sum(map(len, corpus.held_out))
    assert total > 5e6 and len(corpus.held_out) > 10
    assert 0.03 < sum(map(len, corpus.held_out)) / total <= 0.05
    assert not set(corpus.train) & {t for t in corpus.held_out if len(t) > 2000}
    assert not any("import unittest" in t and "test_" in t[:200] for t in corpus.held_out[:3])


def test_folders_files_and_single_documents(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 20)
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00\xff")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.txt").write_text("no")
    corpus = load_corpus(str(tmp_path))
    assert len(corpus.train) + len(corpus.held_out) == 6 and len(corpus.held_out) == 1
    single = load_corpus(str(tmp_path / "3.txt"))
    assert single.train[0] + single.held_out[0] == (tmp_path / "3.txt").read_text()
    assert single.held_out_bytes() == len(single.held_out[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_tables(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr("fla.data.corpus.STREAM_HELD_OUT", 3)
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"body": f"row {i} " * 9, "n": i}) + "\n" for i in range(40))
    )
    corpus = load_corpus(str(file), "body", streaming)
    assert corpus.streaming == streaming
    assert len(list(corpus.train)) + len(corpus.held_out) == 40
    assert not set(corpus.train) & set(corpus.held_out)
    blocks = make_blocks(corpus, BYTES, 32)
    assert len(list(blocks)) > 40 and isinstance(
        blocks, StreamedBlocks if streaming else TokenBlocks
    )
    with pytest.raises(
        UsageError, match="no column 'text'; pass --data_column with one of body, n"
    ):
        load_corpus(str(file), "text", False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: load_corpus(str(p / "missing")), "does not exist; pass a text file"),
        (lambda p: load_corpus(str(p)), "holds no text"),
        (lambda p: split("empty", {"a": ""}), "holds no text"),
        (lambda p: load_corpus("stdlib", streaming=True), "--streaming reads tables"),
        (
            lambda p: load_corpus("hf:no-such-owner/no-such-dataset"),
            "'hf:no-such-owner/no-such-dataset' cannot be loaded",
        ),
        (lambda p: load_tokenizer(str(p / "tokenizer")), "cannot be loaded"),
        (
            lambda p: TokenBlocks(["short"], BYTES, 512),
            "6 tokens, fewer than one block of --seq_len 512",
        ),
    ],
)
def test_wrong_sources(make, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        make(tmp_path)


def test_bytes_are_byt5_tokens():
    text = "def é(x):\n\treturn '你好' # \x00"
    assert encode(BYTES, text).tolist() == [1, *BYTES(text, add_special_tokens=False)["input_ids"]]
    assert BYTES.decode(encode(BYTES, text)[1:]) == text


def test_other_tokenizers_start_documents_too(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(tmp_path)
    assert encode(load_tokenizer(str(tmp_path)), "a b a c").tolist() == [0, 1, 2, 1, 3]
    bare = AutoTokenizer.from_pretrained(tmp_path)
    bare.bos_token = None
    with pytest.raises(UsageError, match="neither a begin nor an end of text"):
        encode(bare, "a")


DOCUMENTS = ["abc", "", "defghij", "k" * 20, "lm"]


def test_blocks_hold_all_tokens_and_know_their_boundaries():
    blocks = TokenBlocks(DOCUMENTS, BYTES, 8)
    stream = np.concatenate([encode(BYTES, d) for d in DOCUMENTS])
    rows = [blocks[i] for i in range(len(blocks))]
    assert torch.cat([r["input_ids"] for r in rows]).tolist() == stream[: 8 * len(rows)].tolist()
    for i, row in enumerate(rows):
        assert row["starts"] == [j for j in range(8) if stream[8 * i + j] == 1]
    assert [
        (r["input_ids"].tolist(), r["starts"]) for r in StreamedBlocks(DOCUMENTS, BYTES, 8)
    ] == [(r["input_ids"].tolist(), r["starts"]) for r in rows]


def test_collated_boundaries_bound_documents_and_blocks():
    blocks = TokenBlocks(DOCUMENTS, BYTES, 8)
    batch = collate([blocks[0], blocks[2]])
    assert batch["input_ids"].shape == (1, 16) and batch["cu_seqlens"].dtype == torch.int32
    bounds = batch["cu_seqlens"].tolist()
    first = torch.zeros(1, 16, dtype=torch.bool).index_fill(1, torch.tensor(bounds[:-1]), True)
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(first, -100))
    assert bounds[0] == 0 and bounds[-1] == 16 and 8 in bounds and bounds == sorted(set(bounds))
    assert set(bounds) == {0, 8, 16} | {
        i for i, t in enumerate(batch["input_ids"][0].tolist()) if t == 1
    }


def test_compressors():
    bits = compressed_bits_per_byte(["hello " * 1000])
    assert set(bits) == {"gzip -9", "xz -9"} and all(0 < b < 1 for b in bits.values())
