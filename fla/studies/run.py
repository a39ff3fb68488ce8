# SPDX-License-Identifier: MIT
"""`fla study`: train every cell, score it, and report; finished cells are kept."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from fla.data.corpus import load_corpus
from fla.data.documents import Corpus
from fla.data.shards import make_blocks
from fla.data.tokens import encode, load_tokenizer
from fla.evals.perplexity import Score, score
from fla.studies.config import Cell, Study, told
from fla.studies.report import report
from fla.tasks.models import small_config
from fla.training.checkpoints import newest_whole, seal, step_of
from fla.training.run import make_trainer, run_trainer, short_run

Row = dict[str, Any]


def run_study(study: Study, folder: str | Path, console: Console) -> dict[str, Row]:
    """Run every cell in a folder of its own, named by its settings, then write `results.md`,
    `results.json` and `results.png`. A finished cell is read, an interrupted one resumes, and cells
    with other settings stay as they are.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(study.tokenizer)
    corpus = load_corpus(study.data)
    for cell in study.cells:  # before any of them trains
        config_of(cell, tokenizer)
    rows: dict[str, Row] = {}
    for i, cell in enumerate(study.cells):
        console.print(f"[{i + 1}/{len(study.cells)}] {cell.name}: {cell.model}", markup=False)
        rows[cell.name] = run_cell(study, cell, corpus, tokenizer, folder, console)
        console.print(f"  {rows[cell.name]['bits_per_byte']:.3f} bits per byte")
    report(study, rows, folder, console)
    return rows


def config_of(cell: Cell, tokenizer: Any) -> Any:
    """The configuration of a cell's model, for a tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields: dict[str, Any] = {name: getattr(tokenizer, name) for name in names}
    fields |= dict(initializer_range=0.02, max_position_embeddings=1 << 16) | cell.fields
    return small_config(
        cell.model, cell.hidden_size, cell.layers, len(tokenizer), head_dim=cell.head_dim, **fields
    )


def run_cell(
    study: Study, cell: Cell, corpus: Corpus, tokenizer: Any, folder: Path, console: Console
) -> Row:
    """Train and score one model, or read what an earlier run found."""
    settings = json.dumps(told(study, cell), sort_keys=True)
    mark = hashlib.sha256(settings.encode()).hexdigest()[:6]
    folder = folder / "-".join([*re.findall(r"[\w.]+", cell.name), mark])
    results = folder / "results.json"
    if results.exists():
        return json.loads(results.read_text())
    trained, seconds, steps = _train(cell, corpus, tokenizer, folder, console)
    row: Row = {
        "settings": json.loads(settings),
        "parameters": trained.num_parameters(),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(steps * cell.batch_tokens / seconds),
    }
    texts = _first(corpus.held_out, study.scored)
    documents = [torch.from_numpy(encode(tokenizer, text)).long() for text in texts]
    size = sum(len(text.encode()) for text in texts)
    scored = score(trained, documents, size, length=cell.seq_len).whole()
    row["bits_per_byte"] = scored.bits_per_byte
    if study.kind == "long_context":
        row["long"] = _long(trained, documents, size, study.lengths)
    trained.save_pretrained(folder)
    seal(folder)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    results.write_text(json.dumps(row, indent=1) + "\n")
    return row


def _first(texts: list[str], size: int) -> list[str]:
    """Whole texts, of that many characters at least."""
    kept, total = [], 0
    for text in texts:
        kept.append(text)
        total += len(text)
        if total >= size:
            break
    return kept


def _train(
    cell: Cell, corpus: Corpus, tokenizer: Any, folder: Path, console: Console
) -> tuple[Any, float, int]:
    """The model, and the seconds and steps of this run, which may have resumed another."""
    torch.manual_seed(cell.seed)
    model = AutoModelForCausalLM.from_config(config_of(cell, tokenizer))
    rows = max(1, cell.batch_tokens // cell.seq_len)
    args = short_run(folder, cell.steps, rows, cell.learning_rate, 1 / 20, cell.seed)
    blocks = make_blocks(corpus, tokenizer, cell.seq_len)
    trainer, interruption = make_trainer(args, model, blocks, console, processing_class=tokenizer)
    begun, resume = time.monotonic(), newest_whole(folder)
    run_trainer(trainer, interruption, resume)
    if interruption.asked:
        console.print("stopped; the same command continues", style="bold")
        raise SystemExit(130)
    steps = cell.steps - (step_of(resume) if resume else 0)
    return trainer.model, time.monotonic() - begun, steps


def _long(model: Any, documents: list[torch.Tensor], size: int, lengths: list[int]) -> Row:
    """Bits per token by position in the longest windows, and seconds per token at each length."""
    longest = max(lengths)
    scored: Score = score(
        model, documents, size, length=longest, tokens_per_batch=longest, bucket=longest // 16
    )
    bits = {start: math.log2(x) for start, x in scored.by_position().items()}
    timed = {}
    row = torch.cat(documents)
    row = row.repeat(-(-longest // len(row)))[None].to(model.device)
    with torch.inference_mode():
        for length in lengths:
            model(row[:, : min(256, length)], use_cache=False, logits_to_keep=1)
            begun = time.perf_counter()
            model(row[:, :length], use_cache=False, logits_to_keep=1)
            timed[length] = (time.perf_counter() - begun) / length
    return {"bits_by_position": bits, "seconds_per_token": timed}
