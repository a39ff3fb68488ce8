# SPDX-License-Identifier: MIT
"""Token shards: the same tokens as from memory, whatever stops the run that makes them."""

import json
from pathlib import Path

import pytest

from fla import cli
from fla.core.errors import UsageError
from fla.data.corpus import load_corpus
from fla.data.documents import Corpus
from fla.data.shards import ShardBlocks, load_held_out, make_blocks, write_shards
from fla.data.tokens import TokenBlocks, load_tokenizer
from tests.processes import kill_once, run, start

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 7) for i in range(60)]
CORPUS = Corpus("made up", TEXTS, ["held out\n", "and this"])


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix == ".npy"}


def test_one_shard_is_what_memory_holds(tmp_path):
    write_shards(CORPUS, "byte", tmp_path, characters=1 << 30)
    tokenizer = load_tokenizer("byte")
    read, memory = ShardBlocks(tmp_path, tokenizer, 64), TokenBlocks(TEXTS, tokenizer, 64)
    assert len(read) == len(memory)
    for i in range(len(read)):
        x, y = read[i], memory[i]
        assert x["input_ids"].equal(y["input_ids"]) and x["starts"] == y["starts"]
    with pytest.raises(IndexError):
        read[len(read)]
    assert load_held_out(tmp_path) == CORPUS.held_out


def test_many_shards_by_several_processes_hold_every_document_once(tmp_path):
    one = write_shards(CORPUS, "byte", tmp_path / "a", characters=500)
    two = write_shards(CORPUS, "byte", tmp_path / "b", characters=500, workers=2)
    assert one == two and one["shards"] > 5 and files(tmp_path / "a") == files(tmp_path / "b")
    assert one["tokens"] == sum(len(text) + 1 for text in TEXTS)
    blocks = ShardBlocks(tmp_path / "a", load_tokenizer("byte"), 32)
    assert len({tuple(blocks[i]["input_ids"].tolist()) for i in range(len(blocks))}) > 5


def test_what_is_there_is_kept_and_what_is_missing_made(tmp_path):
    write_shards(CORPUS, "byte", tmp_path, characters=500)
    before = files(tmp_path)
    (tmp_path / "00003.starts.npy").unlink()  # written last: this shard is not whole
    (tmp_path / "index.json").unlink()
    with pytest.raises(UsageError, match="holds no whole shards"):
        load_corpus(f"tokens:{tmp_path}")
    made = []
    write_shards(CORPUS, "byte", tmp_path, characters=500, progress=lambda n, new: made.append(new))
    assert made.count(True) == 1 and files(tmp_path) == before


def test_other_shards_and_tokenizers_are_refused(tmp_path):
    write_shards(CORPUS, "byte", tmp_path, characters=500)
    with pytest.raises(UsageError, match="holds shards with characters=500, not 600"):
        write_shards(CORPUS, "byte", tmp_path, characters=600)
    corpus = load_corpus(f"tokens:{tmp_path}")
    with pytest.raises(UsageError, match=r"no shard in .* holds a block of 9999"):
        make_blocks(corpus, load_tokenizer("byte"), 9999)

    class Other:
        def __len__(self):
            return 7

    with pytest.raises(UsageError, match="made with 'byte', which has 259"):
        make_blocks(corpus, Other(), 32)


def test_a_model_trains_on_shards_and_a_killed_run_goes_on(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.py").write_text(text)
    command = [
        "-m", "fla.cli", "preprocess", str(tmp_path / "texts"), str(tmp_path / "tok"),
        "--characters", "300", "--workers", "1",
    ]  # fmt: skip
    kill_once(start(*command), lambda: list((tmp_path / "tok").glob("*.starts.npy")))
    done = run(*command, check=True)
    assert "tokens in" in done.stdout
    flags = [
        "--model_config", "hidden_size=16", "num_hidden_layers=1", "num_heads=1", "head_dim=8",
        "--seq_len", "32", "--per_device_train_batch_size", "2", "--max_steps", "3",
        "--sample_tokens", "4", "--use_cpu", "true", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert cli.main(["train", "--data", f"tokens:{tmp_path / 'tok'}", *flags]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 3
