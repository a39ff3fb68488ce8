# SPDX-License-Identifier: MIT
"""What several commands share."""

from __future__ import annotations

import argparse
from typing import Any


def command_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a command, whose description keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"fla {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def load(folder: str, device: str | None, tokenizer: str | None = None) -> tuple[Any, Any]:
    """A saved model, ready to run, and its tokenizer."""
    from fla.training.saved import load_saved
    from fla.utils import get_available_device

    model, own = load_saved(folder, tokenizer)
    return model.eval().to(device=device or get_available_device()), own
