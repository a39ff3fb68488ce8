# SPDX-License-Identifier: MIT
"""The `fla` command. A command is a file of this package, imported when it runs."""

from __future__ import annotations

import difflib
import errno
import importlib
import sys

import fla

USAGE = 2
EXTRAS = ("accelerate", "datasets", "matplotlib", "rich", "tensorboard", "yaml")
COMMANDS = {
    "train": "train a language model; stop and resume it",
    "generate": "continue a prompt with a trained model",
    "eval": "score a trained model: perplexity, bits per byte, recall, lm-eval",
    "task": "train small models on synthetic tasks, test them on longer ones",
    "study": "train many small models alike and compare them",
    "linearize": "turn a softmax transformer into a hybrid with linear attention",
    "convert": "turn a checkpoint of transformers into ours, and back",
    "download": "fetch a model from the Hugging Face hub into a folder",
    "preprocess": "tokenise a corpus once, for fla train --data tokens:FOLDER",
    "warm-up": "compile a model's GPU kernels before they are needed",
    "doctor": "versions, devices, and what every operator would run and why",
}
HELP = "\n".join(
    [
        "usage: fla COMMAND ...",
        "",
        *(f"  {name:<11} {summary}" for name, summary in COMMANDS.items()),
        "",
        "fla COMMAND --help explains a command, fla --version tells the version.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 where it failed, 2 for wrong usage, 130 where it
    was interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("help", [])
    if command in ("-h", "--help", "help"):
        if not rest:
            print(HELP)
            return 0
        command, rest = rest[0], ["--help"]
    if command in ("--version", "version"):
        print(f"fla {fla.__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        print(
            f"fla: {command!r} is not a command; {meant}fla --help lists them all", file=sys.stderr
        )
        return USAGE
    return _run(command, rest)


def _run(command: str, argv: list[str]) -> int:
    from fla.core.errors import TrainingDiverged, UsageError

    try:
        module = importlib.import_module(f"fla.cli.{command.replace('-', '_')}")
        return module.main(argv)
    except UsageError as error:
        print(f"fla {command}: {error}", file=sys.stderr)
        return USAGE
    except TrainingDiverged as error:
        print(f"fla {command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise
        print(f"fla {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fla {command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRAS:
            raise
        print(
            f"fla {command}: the package {error.name} is not installed; "
            "pip install 'flash-linear-attention[train]'",
            file=sys.stderr,
        )
        return USAGE
