# SPDX-License-Identifier: MIT
"""Fetch a model and its tokenizer into a local folder, for `fla linearize` and anything else:

    fla download Qwen/Qwen3-0.6B [FOLDER]

An interrupted download continues. At the end it prints the model's layers and whether `fla
linearize` knows them. A gated model needs the token that `hf auth login` stores.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fla.cli.common import command_parser

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def main(argv: list[str]) -> int:
    parser = command_parser("download", __doc__)
    parser.add_argument("name", help="hub name, as in Qwen/Qwen3-0.6B")
    parser.add_argument("folder", nargs="?", help="by default models/ and the name's last part")
    parser.add_argument("--revision", help="branch, tag or commit")
    args = parser.parse_args(argv)

    from huggingface_hub import snapshot_download

    folder = Path(args.folder or Path("models") / args.name.split("/")[-1])
    try:
        snapshot_download(
            args.name, revision=args.revision, local_dir=folder, allow_patterns=WANTED
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = str(error).splitlines()[0]
        print(f"fla download: {args.name!r} cannot be downloaded: {reason}", file=sys.stderr)
        return 1
    print(describe(folder))
    return 0


def describe(folder: Path) -> str:
    """The layers of a downloaded model."""
    from transformers import AutoConfig

    from fla.linearize.surgery import TEACHERS

    config = AutoConfig.from_pretrained(folder).get_text_config()
    heads = getattr(config, "num_attention_heads", "?")
    shared = getattr(config, "num_key_value_heads", None) or heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    known = config.model_type in TEACHERS
    lines = [
        f"{config.model_type}: {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{heads} heads on {shared} of keys and values, {config.vocab_size:,} tokens",
        *(f"  layer {i:3}  {kind}" for i, kind in enumerate(kinds)),
        f"fla linearize knows this architecture: fla linearize {folder} OUT"
        if known
        else f"fla linearize does not know {config.model_type!r}; it knows {', '.join(TEACHERS)}",
    ]
    return "\n".join(lines)
