# SPDX-License-Identifier: MIT
"""Turn a softmax transformer (Llama, Qwen, Mistral, ...) into a hybrid with linear attention."""

from __future__ import annotations

import sys

from fla.cli.common import command_parser


def main(argv: list[str]) -> int:
    parser = command_parser("linearize", __doc__)
    parser.add_argument("teacher", help="folder or hub name of a Llama, Qwen, Mistral, ...")
    parser.add_argument(
        "out", help="folder of the conversion; the same command continues a stopped one"
    )
    parser.add_argument("--config", help="YAML or JSON file, fields as in fla/linearize/config.py")
    parser.add_argument("--stage", help="run one stage alone")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="as in align.tokens=1e6"
    )
    parser.add_argument("--compare", metavar="A,B,...", help="rules side by side, small budget")
    parser.add_argument("--dry_run", action="store_true", help="print what it would take")
    parser.add_argument("--tflops", type=float, default=989, help="peak of the device, for that")
    parser.add_argument("--memory", type=float, default=80, help="GB of the device, for that")
    args = parser.parse_args(argv)

    from rich.console import Console

    from fla.linearize import config, plan
    from fla.linearize.compare import compare
    from fla.linearize.run import Conversion, Stopped

    wanted = config.load(args.config, args.set)
    console = Console(highlight=False, soft_wrap=True)
    if args.dry_run:
        return 0 if plan.show(args.teacher, wanted, args.tflops, args.memory, console) else 1
    try:
        if args.compare:
            compare(args.teacher, args.out, args.compare.split(","), wanted, console)
        else:
            Conversion(args.teacher, args.out, wanted, console).run(args.stage)
    except Stopped:
        print("fla linearize: stopped; the same command continues it", file=sys.stderr)
        return 130
    return 0
