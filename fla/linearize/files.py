# SPDX-License-Identifier: MIT
"""Files that are there whole or not at all: written beside, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fla.core.errors import UsageError
from fla.training.checkpoints import record, require_whole


def _replace(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(beside)
    with open(beside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def layer_file(folder: Path, layer: int) -> Path:
    """The file in which a stage keeps a layer's weights."""
    return folder / f"layer_{layer:03}.safetensors"


def write_text(path: Path, text: str) -> None:
    _replace(path, lambda beside: beside.write_text(text))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file, or None if there is no file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(
            f"{path} is not valid JSON ({error}); delete it to make it again"
        ) from None


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    _replace(
        path, lambda beside: save_file({n: x.contiguous() for n, x in tensors.items()}, beside)
    )

    record(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `save_tensors` wrote, or `UsageError` where it is another."""
    return load_file(require_whole(path))


def save_torch(path: Path, value: Any) -> None:
    _replace(path, lambda beside: torch.save(value, beside))
