# SPDX-License-Identifier: MIT
"""Language models to measure side by side: a saved one, ours of a size, or transformers' own."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fla.models  # noqa: F401  registers the architectures
from fla.tasks.models import small_config


def sizes(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which models."""
    parser.add_argument(
        "--models", nargs="+", default=["gated_deltanet", "transformer", "hf:llama"],
        help="folders of saved models, NAME:field=value:... of ours, or hf:NAME of transformers",
    )  # fmt: skip
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="benchmarks/results", help="folder, or '' for none")


def build(name: str, args: argparse.Namespace) -> Any:
    """The model, in bf16 on a GPU and fp32 elsewhere."""
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    if Path(name).is_dir():
        model = AutoModelForCausalLM.from_pretrained(name)
    else:
        model = AutoModelForCausalLM.from_config(_config(name, args))
    return model.to(device=args.device, dtype=dtype)


def _config(name: str, args: argparse.Namespace) -> Any:
    if not name.startswith("hf:"):
        return small_config(
            name, args.hidden_size, args.layers, args.vocabulary, head_dim=args.head_dim,
            max_position_embeddings=1 << 17,
        )  # fmt: skip
    return AutoConfig.for_model(
        name.removeprefix("hf:"), hidden_size=args.hidden_size, num_hidden_layers=args.layers,
        vocab_size=args.vocabulary, num_attention_heads=args.hidden_size // args.head_dim,
        num_key_value_heads=args.hidden_size // args.head_dim, head_dim=args.head_dim,
        intermediate_size=4 * args.hidden_size * 2 // 3, max_position_embeddings=1 << 17,
    )  # fmt: skip


def tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)
    return ids.to(model.device)
