# SPDX-License-Identifier: MIT
"""Train many small models alike; compare them in a table and a picture."""

from __future__ import annotations

from pathlib import Path

from fla.cli.common import command_parser


def main(argv: list[str]) -> int:
    parser = command_parser("study", __doc__)
    parser.add_argument("config", help="YAML file, as in examples/studies")
    parser.add_argument(
        "--output_dir", help="runs/NAME of the file if not given; a stopped study continues there"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="as in tokens=100000"
    )
    args = parser.parse_args(argv)

    from rich.console import Console

    from fla.studies.config import load
    from fla.studies.run import run_study

    wanted = load(args.config, args.set)
    folder = args.output_dir or f"runs/{Path(args.config).stem}"
    run_study(wanted, folder, Console(highlight=False, soft_wrap=True))
    return 0
