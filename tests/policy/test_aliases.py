# SPDX-License-Identifier: MIT
"""Published module paths: every one is imported, and gives the names of the module it stands for."""

import importlib
import pickle
import sys

import pytest

import fla
from fla._aliases import MODULES, PARTS, AliasFinder

(FINDER,) = [finder for finder in sys.meta_path if isinstance(finder, AliasFinder)]


@pytest.mark.parametrize("alias", sorted(FINDER.table))
def test_an_alias_is_imported_and_hides_nothing(alias):
    if alias.startswith("dilated"):
        importlib.import_module("dilated_attention_pytorch")
    home, _, part = alias.rpartition(".")
    source = importlib.import_module(home).__dict__.get(part)
    module = importlib.import_module(alias)
    same = source is None or source is module or source is getattr(module, part, None)
    assert same, f"{home} has {part} of its own"
    real = importlib.import_module(FINDER.table[alias])
    public = [name for name in dir(module) if hasattr(real, name)]
    assert public and getattr(module, public[0]) is getattr(real, public[0])
    if not alias.startswith(("dilated", "fla.models")):
        assert {*MODULES, *PARTS} & {alias, home, FINDER.table[alias]}


def test_the_ways_to_import():
    import fla.ops.gla.naive
    from fla.models.gated_deltanet.modeling_gated_deltanet import GatedDeltaNetBlock
    from fla.models.gla.configuration_gla import GLAConfig
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.kda.gate import fused_kda_gate

    from fla.ops.gla import naive

    assert naive is fla.ops.gla.naive
    assert naive_recurrent_gla is fla.ops.gla.naive_recurrent_gla is fla.ops.naive_recurrent_gla
    assert pickle.loads(pickle.dumps(naive.naive_recurrent_gla)) is naive_recurrent_gla
    assert fused_kda_gate is fla.ops.fused_kda_gate and GLAConfig is fla.GLAConfig
    assert GatedDeltaNetBlock is fla.models.gated_deltanet.GatedDeltaNetModel.block


def test_modules_of_dilated_attention_pytorch_hold_its_names():
    from dilated_attention_pytorch.core.base import (
        BaseDilatedAttention,
        BaseMultiheadDilatedAttention,
    )
    from dilated_attention_pytorch.utils.validation import check_dropout

    import dilated_attention_pytorch as package
    from dilated_attention_pytorch.utils import sparse_pattern_utils

    assert sparse_pattern_utils.PatternType is package.PatternType
    assert check_dropout("test", 0.1) == 0.1
    assert issubclass(package.RingDilatedAttentionV2Flash, BaseDilatedAttention)
    assert issubclass(
        package.BlockSparseRingMultiheadDilatedAttention, BaseMultiheadDilatedAttention
    )


def test_blocks_are_those_of_the_models():
    for kind, name in fla.models.MODELS.items():
        module = importlib.import_module(f"fla.models.{kind}.modeling_{kind}")
        assert getattr(module, f"{name}Block") is getattr(module, f"{name}Model").block, kind


def test_what_is_not_there_is_an_error_that_helps():
    with pytest.raises(ImportError, match="NoSuch"):
        from fla.ops.gla.naive import NoSuch  # noqa: F401
    with pytest.raises(AttributeError, match=r"stands for fla\.ops\.gla"):
        importlib.import_module("fla.ops.gla.naive").NoSuch  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fla.ops.gla.nosuch")
