# SPDX-License-Identifier: MIT
"""Turn a checkpoint folder of transformers' Llama, Mistral, Qwen2, Qwen3, OLMo-2, Qwen3-Next,
Qwen3.5 (text), OLMo-Hybrid, Kimi-Linear, Mamba, Mamba-2 or RWKV-4 into ours, and back:

    fla convert SOURCE TARGET
    fla convert OURS TARGET --like SOURCE    # back, with the config of SOURCE
"""

from __future__ import annotations

import json
from pathlib import Path

from fla.cli.common import command_parser


def main(argv: list[str]) -> int:
    parser = command_parser("convert", __doc__)
    parser.add_argument("source", type=Path, help="a checkpoint folder")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--like", type=Path, help="back to the layout of this folder's config")
    args = parser.parse_args(argv)

    from fla.core.errors import UsageError

    try:
        convert(args.source, args.target, args.like)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"wrote {args.target}")
    return 0


def convert(source: Path, target: Path, like: Path | None) -> None:
    """Read `source` and write `target`: ours, or the layout of the config in `like`."""
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
