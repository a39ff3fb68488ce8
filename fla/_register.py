# SPDX-License-Identifier: MIT
"""`import fla` is enough for transformers' Auto classes to find our models, and for PEFT to know
their projections, and still imports nothing.

transformers keeps configs registered from outside in a dictionary. It is replaced by one that
imports an architecture, which registers itself, when its model type is looked up. That happens when
transformers' `configuration_auto` is imported; importing our models at that point would be
circular.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"
PEFT = "peft.utils.constants"
# What LoRA adapts in the mixers of each model type where `target_modules` is left out.
QKVO = "attn.q_proj attn.k_proj attn.v_proj attn.o_proj"
GATED = f"{QKVO} attn.g_proj"
LOW_RANK = f"{QKVO} attn.g_proj.0 attn.g_proj.1"
MEMORIES = " ".join(f"attn.{x}_proj.{i}" for x in "kv" for i in range(16))
LORA = {
    "abc": GATED,
    "comba": GATED,
    "gated_deltanet": GATED,
    "gated_deltanet2": LOW_RANK,
    "gated_deltaproduct": GATED,
    "gla": GATED,
    "hgrn": f"{QKVO} attn.i_proj attn.g_proj",
    "hgrn2": f"{QKVO} attn.i_proj",
    "kda": LOW_RANK,
    "lightnet": LOW_RANK,
    "log_linear_mamba2": f"{QKVO} mixer.in_proj mixer.out_proj",
    "mamba3": f"{QKVO} mixer.in_proj mixer.out_proj",
    "mla": "attn.q_proj.0 attn.q_proj.2 attn.k_rope attn.kv_proj.0 attn.kv_proj.2 attn.o_proj",
    "mom": f"attn.q_proj attn.g_proj attn.o_proj attn.shared_k attn.shared_v {MEMORIES}",
    "precond_gated_deltanet": GATED,
    "precond_kda": LOW_RANK,
    "retnet": GATED,
    "rodimus": "mixer.q_proj mixer.k_proj mixer.up_proj mixer.gate_proj mixer.down_proj "
    "ska_attn.q_proj ska_attn.k_proj ska_attn.v_proj ska_attn.o_proj",
    "rwkv4": f"{QKVO} attn.r_proj",
    "rwkv6": " ".join([*(f"attn.{x}_proj.linear" for x in "rkvg"), "attn.o_proj"]),
    "rwkv7": f"{QKVO} attn.r_proj attn.g_lora.lora.0 attn.g_lora.lora.2",
    "samba": "mixer.in_proj mixer.q_proj mixer.k_proj mixer.v_proj mixer.o_proj",
}
MAMBA = ("mamba", "mamba2")  # whose out_proj PEFT refuses, transformers' own too


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


def _tell_peft(module: ModuleType, model_types: Iterable[str]) -> None:
    table = module.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for kind in model_types:
        names = f"{QKVO} mixer.in_proj" if kind in MAMBA else LORA.get(kind, QKVO)
        table.setdefault(kind, names.split())


class _After(importlib.abc.MetaPathFinder):
    """Runs `prepare` right after a module of another package."""

    def __init__(self, name: str, prepare: Callable[[ModuleType], None]):
        self._name, self._prepare = name, prepare

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_prepare(module: ModuleType) -> None:
            execute(module)
            self._prepare(module)

        spec.loader.exec_module = then_prepare  # type: ignore[method-assign]
        return spec


def register_with_transformers(model_types: Collection[str]) -> None:
    """Prepare the Auto classes and PEFT's table now where they are loaded already, else as soon as
    they are. Each of `model_types` is a module of `fla.models`.
    """
    for name, prepare in ((AUTO, _prepare), (PEFT, _tell_peft)):
        if name in sys.modules:
            prepare(sys.modules[name], model_types)
        else:
            then = partial(prepare, model_types=model_types)
            sys.meta_path.insert(0, _After(name, then))
