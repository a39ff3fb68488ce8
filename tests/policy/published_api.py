# SPDX-License-Identifier: MIT
"""The table of published names in `published_api.txt`, and how ours compare with it."""

import importlib
import inspect
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("published_api.txt")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
Published = tuple[str, str, inspect.Signature | None]


def entries() -> Iterator[Published]:
    """(module, name, signature or None) of every published name."""
    modules: list[str] = []
    for line in TABLE.read_text().splitlines():
        if line.startswith("["):
            modules = line.strip("[]").split()
        elif line and not line.startswith("#"):
            name, parenthesis, _ = line.partition("(")
            signature = _signature(line) if parenthesis else None
            yield from ((module, name, signature) for module in modules)


def _signature(line: str) -> inspect.Signature:
    space: dict = {"torch": torch, "inf": float("inf")}
    exec(f"def {line}: ...", space)
    return inspect.signature(space[line.partition("(")[0]])


def find(module: str, name: str) -> object | None:
    """Ours of that name, None where there is none."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        return None


def differences(ours: object, published: inspect.Signature) -> list[str]:
    """What a published call would meet: a parameter that is not there, at another place, without
    its default or with another one.
    """
    mine = inspect.signature(ours).parameters  # type: ignore[arg-type]
    places = [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    said = []
    for place, (name, parameter) in enumerate(published.parameters.items()):
        if name not in mine:
            said.append(f"no {name}")
            continue
        by_place = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if by_place and places[place : place + 1] != [name]:
            said.append(f"{name} is elsewhere")
        default = mine[name].default
        if parameter.default is not parameter.empty and default != parameter.default:
            said.append(f"{name}={default!r}, published {parameter.default!r}")
    return said


def documented(heading: str) -> dict[str, str]:
    """Patterns in the first column of the page's table under `heading`, with the last column."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = {}
    for line in (line for line in section.splitlines() if line.startswith("|")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.update({name: cells[-1] for name in re.findall(r"`([\w.*]+)`", cells[0])})
    return rows


def matching(patterns: dict[str, str], module: str, name: str) -> list[str]:
    """The patterns that name it, alone or with its module."""
    return [p for p in patterns if fnmatchcase(name, p) or fnmatchcase(f"{module}.{name}", p)]
