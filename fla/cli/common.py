# SPDX-License-Identifier: MIT
"""What several commands share."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from fla.core.errors import UsageError
from fla.training.arguments import check_number

# The range of numeric flags, [least, most]; counts are from 1 on and other numbers above 0.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "temperature": (0, math.inf),
    "top_p": (1e-9, 1),
    "length": (2, math.inf),
}


def check_range(name: str, value: Any) -> None:
    """Raise `UsageError` for a number that a flag does not take; anything else passes."""
    for x in value if isinstance(value, list | tuple) else [value]:
        if isinstance(x, bool) or not isinstance(x, int | float):
            continue
        check_number(name, x, *RANGES.get(name, (1 if isinstance(x, int) else 1e-300, math.inf)))


class CommandParser(argparse.ArgumentParser):
    """A parser that refuses with one line, numbers out of their range too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found = super().parse_args(args, namespace)
        for action in self._actions:
            if action.type in (int, float):
                check_range(action.dest, getattr(found, action.dest))
        return found


def command_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a command, whose description keeps its lines."""
    return CommandParser(
        prog=f"fla {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def load(folder: str, device: str | None, tokenizer: str | None = None) -> tuple[Any, Any]:
    """A saved model, ready to run, and its tokenizer."""
    import torch

    from fla.training.saved import load_saved
    from fla.utils import get_available_device

    place = device or get_available_device()
    try:
        torch.empty(1, device=place).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problem = str(error).splitlines()[0]
        raise UsageError(f"--device: {place!r} cannot be used: {problem}") from None
    model, own = load_saved(folder, tokenizer)
    return model.eval().to(device=place), own
