# SPDX-License-Identifier: MIT
"""The model card that a run writes beside its weights, as Hugging Face reads it."""

from __future__ import annotations

import platform
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

import fla


def shown_command(argv: list[str]) -> str:
    """The command of a run, without the values of flags that hold a secret.

    Example:
        >>> shown_command(["--hub_token", "hf_x", "--model", "gla", "--hub_token=hf_y"])
        "fla train --hub_token '***' --model gla '--hub_token=***'"
    """
    shown: list[str] = []
    for word in argv:
        name, equals, _ = word.partition("=")
        if shown and shown[-1].startswith("--") and shown[-1].endswith("_token"):
            word = "***"
        elif equals and name.endswith("_token"):
            word = f"{name}=***"
        shown.append(word)
    return shlex.join(["fla", "train", *shown])


def architecture(config: Any, parameters: int) -> list[tuple[str, str]]:
    """What the model is, as rows of a table."""
    kinds = Counter(config.layer_types)
    layers = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in kinds.items())
    return [
        ("architecture", f"`{config.model_type}`"),
        ("parameters", f"{parameters:,}"),
        ("layers", layers),
        ("width", f"{config.hidden_size:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
    ]


def training(run: Any, args: Any, corpus: Any, result: Any) -> list[tuple[str, str]]:
    """What it was trained on and how, as rows of a table."""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    start = [("started from", f"`{run.model}`")] if Path(run.model).is_dir() else []
    return [
        *start,
        ("data", f"`{corpus.name}`"),
        ("steps", f"{result.steps:,}"),
        ("tokens", f"{result.tokens:,}"),
        ("tokens per sequence", f"{run.seq_len:,}"),
        ("learning rate", f"{args.learning_rate:g}, {args.lr_scheduler_type}"),
        ("weight decay", f"{args.weight_decay:g}"),
        ("precision", precision),
        ("seed", str(args.seed)),
    ]


def scores(corpus: Any, result: Any) -> list[tuple[str, str]]:
    """Bits per byte of held-out text, beside those of compressors, as rows of a table."""
    rows = [("this model", f"{result.bits_per_byte:.3f}")]
    return rows + [(name, f"{bits:.3f}") for name, bits in result.compressed.items()]


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """Rows as a Markdown table."""
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def write_card(
    folder: Path, config: Any, run: Any, args: Any, corpus: Any, result: Any, argv: list[str] | None
) -> Path:
    """Write `folder/README.md`: front matter, architecture, training, score, command, versions and
    how to load. `argv` is the command's arguments, None where there was no command. Holds no path
    but those that were given.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fla", "linear-attention", config.model_type],
    )
    names = {"fla": fla, "torch": torch, "transformers": transformers}
    versions = [(name, str(module.__version__)) for name, module in names.items()]
    versions.append(("python", platform.python_version()))
    kept = f"{len(corpus.held_out):,} documents, {corpus.held_out_bytes():,} bytes"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {config.model_type}, {result.parameters / 1e6:.2f}M parameters",
        "A language model trained with `fla train`.",
        "## Model",
        table(("", ""), architecture(config, result.parameters)),
        "## Training",
        table(("", ""), training(run, args, corpus, result)),
        f"## Score\n\nOn held-out text of the same data ({kept}). Perplexity per token: "
        f"{result.perplexity:.3f}.",
        table(("coder", "bits per byte"), scores(corpus, result)),
    ]
    if argv is not None:
        parts.append(f"## Command\n\n```\n{shown_command(argv)}\n```")
    loading = "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"folder = {str(folder)!r}",
            "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
    )
    parts += [
        f"## Use\n\n```python\n{loading}\n```",
        "`fla` must be installed. With `import fla.models` before, `trust_remote_code` is not "
        "needed.",
        "## Versions",
        table(("package", "version"), versions),
    ]
    card = ModelCard("\n\n".join(parts) + "\n")
    path = folder / "README.md"
    card.save(path)
    return path
