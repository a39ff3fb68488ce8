# SPDX-License-Identifier: MIT
"""`import fla` is enough for transformers' Auto classes to find our models, and still imports
nothing.

transformers keeps configs registered from outside in a dictionary. It is replaced by one that
imports `fla.models`, which registers everything, when one of our model types is looked up. That
happens when transformers' `configuration_auto` is imported; importing our models at that point
would be circular.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"
# fmt: off
MODEL_TYPES = (
    "abc", "bitnet", "comba", "delta_net", "deltaformer", "gated_deltanet", "gated_deltanet2",
    "gated_deltaproduct", "gla", "gsa", "hgrn", "hgrn2", "hybrid", "kda", "lightnet", "linear_attn",
    "log_linear_mamba2", "longnet", "mamba", "mamba2", "mamba3", "mesa_net", "mla", "mom",
    "precond_gated_deltanet", "precond_kda", "raven", "retnet", "rodimus", "rwkv4",
    "rwkv6", "rwkv7", "samba", "transformer",
)
# fmt: on


class _Registered(dict):
    """Configs registered from outside; a look-up of ours brings them in."""

    def __contains__(self, key: object) -> bool:
        if key in MODEL_TYPES and not super().__contains__(key):
            importlib.import_module("fla.models")
        return super().__contains__(key)


def _prepare(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _Registered(mapping._extra_content)


class _AfterAutoClasses(importlib.abc.MetaPathFinder):
    """Runs `_prepare` right after `configuration_auto`."""

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
            _prepare(module)

        spec.loader.exec_module = then_prepare  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Prepare the Auto classes now where they are loaded already, else as soon as they are."""
    if AUTO in sys.modules:
        _prepare(sys.modules[AUTO])
    else:
        sys.meta_path.insert(0, _AfterAutoClasses())
