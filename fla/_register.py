# SPDX-License-Identifier: MIT
"""`import fla` is enough for transformers' Auto classes to find our models, and still imports
nothing.

transformers keeps configs registered from outside in a dictionary. It is replaced by one that
imports an architecture, which registers itself, when its model type is looked up. That happens when
transformers' `configuration_auto` is imported; importing our models at that point would be
circular.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Container, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


class _Registered(dict):
    """Configs registered from outside; a look-up of one of ours brings it in."""

    def __init__(self, registered: Mapping[str, Any], model_types: Container[object]):
        super().__init__(registered)
        self._model_types = model_types

    def __contains__(self, key: object) -> bool:
        if key in self._model_types and not super().__contains__(key):
            importlib.import_module(f"fla.models.{key}")
        return super().__contains__(key)


def _prepare(module: ModuleType, model_types: Container[object]) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _Registered(mapping._extra_content, model_types)


class _AfterAutoClasses(importlib.abc.MetaPathFinder):
    """Runs `_prepare` right after `configuration_auto`."""

    def __init__(self, model_types: Container[object]):
        self._model_types = model_types

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_prepare(module: ModuleType) -> None:
            execute(module)
            _prepare(module, self._model_types)

        spec.loader.exec_module = then_prepare  # type: ignore[method-assign]
        return spec


def register_with_transformers(model_types: Container[object]) -> None:
    """Prepare the Auto classes now where they are loaded already, else as soon as they are. Each
    of `model_types` is a module of `fla.models`.
    """
    if AUTO in sys.modules:
        _prepare(sys.modules[AUTO], model_types)
    else:
        sys.meta_path.insert(0, _AfterAutoClasses(model_types))
