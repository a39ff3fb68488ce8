# SPDX-License-Identifier: MIT
"""Bring a model and its tokenizer into a local folder, for `fla linearize` and anything else:

    python -m scripts.download_model Qwen/Qwen3-0.6B [FOLDER]

Goes on where it was interrupted, shows its progress, and prints the model's layers at the end and
whether `fla linearize` knows them. A gated model needs the token that `hf auth login` stores.
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoConfig

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def describe(folder: Path) -> str:
    """The layers of a downloaded model."""
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="hub name, as in Qwen/Qwen3-0.6B")
    parser.add_argument("folder", nargs="?", help="by default models/ and the name's last part")
    parser.add_argument("--revision", help="branch, tag or commit")
    args = parser.parse_args(argv)
    folder = Path(args.folder or Path("models") / args.name.split("/")[-1])
    try:
        snapshot_download(
            args.name, revision=args.revision, local_dir=folder, allow_patterns=WANTED
        )
    except (RepositoryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        print(f"download_model: {args.name!r} cannot be had: {reason}", file=sys.stderr)
        return 1
    print(describe(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
