# SPDX-License-Identifier: MIT
"""Convert a checkpoint folder of transformers' Llama, Mistral, Qwen2, Qwen3, OLMo-2, Qwen3-Next,
Qwen3.5 (text), OLMo-Hybrid, Kimi-Linear, Mamba, Mamba-2 or RWKV-4:

python -m scripts.convert SOURCE TARGET          # to ours
python -m scripts.convert OURS TARGET --like SOURCE    # back, with the config of SOURCE
"""

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a checkpoint folder")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--like", type=Path, help="back to the layout of this folder's config")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.target, args.like)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.target}")
    return 0


def convert(source: Path, target: Path, like: Path | None) -> None:
    """`main` without the command line."""
    import transformers

    from fla.models.convert import LAYOUTS, convert_model, convert_state_dict

    config_file = (like or source) / "config.json"
    described = json.loads(config_file.read_text())
    kind, names = described.get("model_type"), described.get("architectures") or ["?"]
    theirs = getattr(transformers, names[0], None)
    if kind not in LAYOUTS or theirs is None:
        raise ValueError(
            f"{config_file} describes {names[0]} ({kind}); expected a causal language model of "
            f"{', '.join(LAYOUTS)}"
        )
    if like is None:
        convert_model(theirs.from_pretrained(source)).save_pretrained(target)
        return
    import fla.models

    ours_name = json.loads((source / "config.json").read_text())["architectures"][0]
    ours = getattr(fla.models, ours_name).from_pretrained(source)
    model = theirs(theirs.config_class.from_pretrained(like))
    model.load_state_dict(convert_state_dict(ours.state_dict(), model.config, back=True))
    model.save_pretrained(target)


if __name__ == "__main__":
    sys.exit(main())
