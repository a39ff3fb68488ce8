# SPDX-License-Identifier: MIT
"""Names that are imported from their module when first asked for (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package with lazy names."""

    _home: Mapping[str, str]
    _submodules: Mapping[str, str]

    def __dir__(self) -> list[str]:
        """Lazy names and submodules too, imported or not."""
        return sorted({*super().__dir__(), *self._home, *self._submodules})

    def __setattr__(self, name: str, value: Any) -> None:
        """A lazy name stays what it is when the import system binds a submodule of the same name
        to the package.
        """
        if isinstance(value, ModuleType) and name in self._home:
            value = getattr(importlib.import_module(self._home[name]), name)
        super().__setattr__(name, value)


def lazy_names(
    package: str, where: Mapping[str, Iterable[str]], submodules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], list[str]]:
    """`(__getattr__, __all__)` of a package whose names live in the modules `where` maps to them.
    Its own modules in `where`, and those that `submodules` names, are attributes as well. `dir`
    of the package lists them all.

    Example:
        >>> import sys, types
        >>> sys.modules["constants"] = types.ModuleType("constants")
        >>> getter, names = lazy_names("constants", {"math": ["pi"]})
        >>> names, round(getter("pi"), 2), "pi" in dir(sys.modules["constants"])
        (['pi'], 3.14, True)
    """
    module: Any = sys.modules[package]
    home = {name: source for source, names in where.items() for name in names}
    own = [s.rpartition(".")[2] for s in where if s.rpartition(".")[0] == package]
    children = {name: f"{package}.{name}" for name in (*own, *submodules)}
    module.__class__ = _Package
    module.__dict__.update(_home=home, _submodules=children)

    def __getattr__(name: str) -> Any:
        if name in home:
            value = getattr(importlib.import_module(home[name]), name)
            setattr(module, name, value)
            return value
        if name in children:
            return importlib.import_module(children[name])
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)

    return __getattr__, sorted(home)
