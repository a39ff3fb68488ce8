# SPDX-License-Identifier: MIT
"""Names that are imported from their module when first asked for (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, where: Mapping[str, list[str]]
) -> tuple[Callable[[str], Any], list[str]]:
    """`(__getattr__, __all__)` of a package whose names live in the modules `where` maps to them.

    Example:
        >>> getter, names = lazy_names("math", {"math": ["pi"]})
        >>> names, round(getter("pi"), 2)
        (['pi'], 3.14)
    """
    home = {name: module for module, names in where.items() for name in names}
    submodules = {
        module.rpartition(".")[2]: module for module in where if module.startswith(f"{package}.")
    }

    def __getattr__(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(submodules[name])
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, sorted(home)
