# SPDX-License-Identifier: MIT
"""Module paths that other software imports, on the modules that hold the names here.

`PARTS` gives a page the submodules that the published package splits it into (`fla.ops.gla.naive`),
`MODULES` names other paths, `DILATED` those of `dilated_attention_pytorch`. One finder on
`sys.meta_path` serves them all: an alias is a module whose names are looked up in the real one when
asked for, and functions keep the real one as their `__module__`, so they pickle.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PARTS = {
    "fla.ops.abc": "chunk naive",
    "fla.ops.based": "fused_chunk naive parallel",
    "fla.ops.comba": "chunk fused_recurrent naive",
    "fla.ops.delta_rule": "chunk fused_recurrent naive",
    "fla.ops.deltaformer": "naive parallel",
    "fla.ops.gated_delta_product": "chunk chunk_ref naive",
    "fla.ops.gated_delta_rule": "chunk fused_recurrent gate naive",
    "fla.ops.gated_oja_rule": "chunk fused_recurrent",
    "fla.ops.gdn2": "chunk fused_recurrent naive",
    "fla.ops.generalized_delta_rule": "dplr iplr",
    "fla.ops.gla": "chunk fused_chunk fused_recurrent naive",
    "fla.ops.gsa": "chunk fused_recurrent naive",
    "fla.ops.hgrn": "chunk fused_recurrent naive",
    "fla.ops.kda": "chunk fused_recurrent gate naive",
    "fla.ops.lightning_attn": "chunk fused_recurrent",
    "fla.ops.linear_attn": "chunk fused_chunk fused_recurrent naive",
    "fla.ops.log_linear_attn": "chunk naive",
    "fla.ops.mesa_net": "chunk decoding_one_step naive",
    "fla.ops.precond_gated_delta_rule": "chunk fused_recurrent naive",
    "fla.ops.precond_kda": "chunk fused_recurrent naive",
    "fla.ops.rebased": "naive parallel",
    "fla.ops.retention": "chunk fused_chunk fused_recurrent naive parallel",
    "fla.ops.rwkv4": "fused_recurrent",
    "fla.ops.rwkv6": "chunk fused_recurrent naive",
    "fla.ops.rwkv7": ("channel_mixing chunk fused_addcmul fused_k_update fused_recurrent"),
    "fla.ops.simple_gla": "chunk fused_chunk fused_recurrent naive parallel",
    "fla.ops.titans": "naive",
    "fla.ops.ttt": "chunk fused_chunk naive",
    "fla.modules.activations": "ops",
    "fla.modules.fused_cross_entropy": "ops",
    "fla.modules.fused_kl_div": "ops",
    "fla.modules.fused_linear_cross_entropy": "ops",
    "fla.modules.grpo": "ops",
    "fla.modules.rotary": "ops",
}
MODULES = {
    "fla.ops.generalized_delta_rule.dplr.chunk": "fla.ops.generalized_delta_rule",
    "fla.ops.generalized_delta_rule.dplr.fused_recurrent": "fla.ops.generalized_delta_rule",
    "fla.ops.generalized_delta_rule.dplr.naive": "fla.ops.generalized_delta_rule",
    "fla.ops.generalized_delta_rule.iplr.chunk": "fla.ops.generalized_delta_rule",
    "fla.ops.generalized_delta_rule.iplr.fused_recurrent": "fla.ops.generalized_delta_rule",
    "fla.ops.generalized_delta_rule.iplr.naive": "fla.ops.generalized_delta_rule",
    "fla.ops.utils.logsumexp": "fla.ops.utils.matrix",
    "fla.ops.utils.pack": "fla.ops.utils.packing",
    "fla.ops.utils.pooling": "fla.ops.utils.packing",
    "fla.ops.utils.softmax": "fla.ops.utils.matrix",
    "fla.ops.utils.solve_tril": "fla.ops.utils.matrix",
    "fla.ops.utils.sinkhorn.naive": "fla.ops.utils.sinkhorn",
    "fla.layers.hgrn2": "fla.layers.hgrn",
    "fla.layers.rebased": "fla.layers.based",
    "fla.models.cache_utils": "fla.models.utils",
    "fla.models.generation_utils": "fla.models.utils",
    "fla.modules.norm": "fla.modules",
    "fla.modules.norm.fused_norm_gate": "fla.modules.fused_norm_gate",
    "fla.modules.norm.l2norm": "fla.modules.l2norm",
    "fla.modules.norm.layernorm": "fla.modules.layernorm",
    "fla.modules.norm.layernorm_gated": "fla.modules.layernorm_gated",
    "fla.modules.conv": "fla.modules.convolution",
    "fla.modules.conv.causal_conv1d": "fla.modules.convolution",
    "fla.modules.conv.cp": "fla.modules.convolution",
    "fla.modules.conv.cp.ops": "fla.modules.convolution",
    "fla.modules.conv.long_conv": "fla.modules.long_conv",
    "fla.modules.conv.short_conv": "fla.modules.convolution",
    "fla.modules.conv.triton": "fla.modules.convolution",
    "fla.modules.conv.triton.ops": "fla.modules.convolution",
    "fla.modules.causal_conv1d": "fla.modules.convolution",
    "fla.modules.causal_conv1d.cp": "fla.modules.convolution",
    "fla.modules.token_shift_cp": "fla.modules.token_shift",
}
# Modules of the package `dilated_attention_pytorch`, by the one here that holds their names.
DILATED = {
    "_arguments": "utils.validation",
    "adaptive": "block_sparse_adaptive",
    "block_sparse": (
        "block_sparse_hierarchical block_sparse_optimized block_sparse_ring_dilated_attention "
        "block_sparse_ring_distributed_dilated_attention "
        "block_sparse_ring_multihead_dilated_attention block_sparse_torch_sparse "
        "distributed_sparse_config"
    ),
    "core.pools": (
        "core.bucketed_memory_pool core.enhanced_memory_pool core.fragment_aware_pool "
        "core.memory_pool core.numa_aware_pool core.unified_memory_pool"
    ),
    "dilated_attention": (
        "core.base improved_dilated_attention improved_distributed_dilated_attention "
        "improved_multihead_dilated_attention multihead_dilated_attention"
    ),
    "patterns": "sparse_pattern_generator sparse_pattern_utils utils.sparse_pattern_utils",
    "ring": (
        "ring_dilated_attention ring_dilated_attention_production ring_dilated_attention_v2 "
        "ring_dilated_attention_v2_collective ring_dilated_attention_v2_flash"
    ),
    "utils": "utils.attention_utils",
}
# Names that are another name in the module that an alias stands for.
RENAMED = {
    "dilated_attention_pytorch.core.base": {
        "BaseDilatedAttention": "dilated_attention_pytorch.dilated_attention:DilatedAttention",
        "BaseMultiheadDilatedAttention": (
            "dilated_attention_pytorch.dilated_attention:MultiheadDilatedAttention"
        ),
    },
}


class Alias(ModuleType):
    """A module whose names are those of `_target`; those in `_renamed` are another name there."""

    _target: str
    _renamed: Mapping[str, str]

    def __setattr__(self, name: str, value: Any) -> None:
        """A function of the real module is not hidden by the alias of its name."""
        if not (isinstance(value, Alias) and hasattr(sys.modules.get(self._target), name)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            home, _, attribute = self._renamed.get(name, f"{self._target}:{name}").partition(":")
            return getattr(importlib.import_module(home), attribute)
        except AttributeError:
            raise AttributeError(
                f"module {self.__name__!r} has no attribute {name!r}: it stands for "
                f"{self._target}, which has none of that name",
                name=name,
                obj=self,
            ) from None

    def __dir__(self) -> list[str]:
        names = dir(importlib.import_module(self._target))
        return sorted({*self._renamed, *(name for name in names if not name.startswith("_"))})


class AliasFinder(MetaPathFinder, Loader):
    """Finds the paths of a table `alias -> real module`, and lets real modules have submodules that
    are aliases.
    """

    def __init__(self, table: Mapping[str, str], renamed: Mapping[str, Mapping[str, str]]):
        self.table, self.renamed = table, renamed
        self.parents = {alias.rpartition(".")[0] for alias in table}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.table and fullname not in self.parents:
            return None
        spec = PathFinder.find_spec(fullname, path)  # a file of that name goes first
        if spec is None and fullname in self.table:
            spec = ModuleSpec(fullname, self, origin=self.table[fullname], is_package=True)
        elif spec is not None and fullname in self.parents:
            spec.submodule_search_locations = spec.submodule_search_locations or []
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = Alias(spec.name)
        module._target = self.table[spec.name]
        module._renamed = self.renamed.get(spec.name, {})
        return module

    def exec_module(self, module: ModuleType) -> None:
        importlib.import_module(self.table[module.__name__])


def install(models: Mapping[str, str]) -> None:
    """Serve the aliases, with `modeling_<type>` and `configuration_<type>` of models by type."""
    table = dict(MODULES)
    for page, parts in PARTS.items():
        table.update({f"{page}.{part}": page for part in parts.split()})
    package = "dilated_attention_pytorch"
    for page, parts in DILATED.items():
        table.update({f"{package}.{part}": f"{package}.{page}" for part in parts.split()})
    renamed: dict[str, Mapping[str, str]] = dict(RENAMED)
    for kind, name in models.items():
        home = f"fla.models.{kind}"
        table[f"{home}.configuration_{kind}"] = table[f"{home}.modeling_{kind}"] = home
        block = BLOCKS.get(kind, "fla.models.decoder:Block")
        renamed[f"{home}.modeling_{kind}"] = {
            f"{name}Block": block,
            f"{name}PreTrainedModel": "fla.models.decoder:DecoderPreTrainedModel",
        }
    sys.meta_path.insert(0, AliasFinder(table, renamed))


# Models whose decoder has a block of its own.
BLOCKS = {
    "log_linear_mamba2": "fla.models.blocks:MixerMLPBlock",
    "samba": "fla.models.blocks:MixerMLPBlock",
    "mamba": "fla.models.blocks:MixerBlock",
    "mamba2": "fla.models.blocks:MixerBlock",
    "mamba3": "fla.models.blocks:MixerBlock",
    "longnet": "fla.models.blocks:SubNormBlock",
    "rodimus": "fla.models.rodimus:RodimusBlock",
    "rwkv4": "fla.models.blocks:RWKV4Block",
    "rwkv6": "fla.models.blocks:RWKV6Block",
    "rwkv7": "fla.models.blocks:RWKV7Block",
}
