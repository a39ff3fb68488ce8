# SPDX-License-Identifier: MIT
"""Hugging Face-compatible language models: one decoder (`decoder.py`), one small file per
architecture.

Importing this package registers every architecture with transformers' Auto classes.
"""

from fla.models.abc import ABCConfig, ABCForCausalLM, ABCModel
from fla.models.bitnet import BitNetConfig, BitNetForCausalLM, BitNetModel
from fla.models.comba import CombaConfig, CombaForCausalLM, CombaModel
from fla.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel
from fla.models.deltaformer import DeltaFormerConfig, DeltaFormerForCausalLM, DeltaFormerModel
from fla.models.gated_deltanet import (
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    GatedDeltaNetModel,
)
from fla.models.gated_deltanet2 import (
    GatedDeltaNet2Config,
    GatedDeltaNet2ForCausalLM,
    GatedDeltaNet2Model,
)
from fla.models.gated_deltaproduct import (
    GatedDeltaProductConfig,
    GatedDeltaProductForCausalLM,
    GatedDeltaProductModel,
)
from fla.models.gla import GLAConfig, GLAForCausalLM, GLAModel
from fla.models.gsa import GSAConfig, GSAForCausalLM, GSAModel
from fla.models.hgrn import HGRNConfig, HGRNForCausalLM, HGRNModel
from fla.models.hgrn2 import HGRN2Config, HGRN2ForCausalLM, HGRN2Model
from fla.models.hybrid import HybridConfig, HybridForCausalLM, HybridModel
from fla.models.kda import KDAConfig, KDAForCausalLM, KDAModel
from fla.models.lightnet import LightNetConfig, LightNetForCausalLM, LightNetModel
from fla.models.linear_attn import (
    LinearAttentionConfig,
    LinearAttentionForCausalLM,
    LinearAttentionModel,
)
from fla.models.log_linear_mamba2 import (
    LogLinearMamba2Config,
    LogLinearMamba2ForCausalLM,
    LogLinearMamba2Model,
)
from fla.models.longnet import LongNetConfig, LongNetForCausalLM, LongNetModel
from fla.models.mamba import MambaConfig, MambaForCausalLM, MambaModel
from fla.models.mamba2 import Mamba2Config, Mamba2ForCausalLM, Mamba2Model
from fla.models.mamba3 import Mamba3Config, Mamba3ForCausalLM, Mamba3Model
from fla.models.mesa_net import MesaNetConfig, MesaNetForCausalLM, MesaNetModel
from fla.models.mla import MLAConfig, MLAForCausalLM, MLAModel
from fla.models.mom import MomConfig, MomForCausalLM, MomModel
from fla.models.precond_gated_deltanet import (
    PrecondGatedDeltaNetConfig,
    PrecondGatedDeltaNetForCausalLM,
    PrecondGatedDeltaNetModel,
)
from fla.models.precond_kda import PrecondKDAConfig, PrecondKDAForCausalLM, PrecondKDAModel
from fla.models.raven import RavenConfig, RavenForCausalLM, RavenModel
from fla.models.retnet import RetNetConfig, RetNetForCausalLM, RetNetModel
from fla.models.rodimus import RodimusConfig, RodimusForCausalLM, RodimusModel
from fla.models.rwkv4 import RWKV4Config, RWKV4ForCausalLM, RWKV4Model
from fla.models.rwkv6 import RWKV6Config, RWKV6ForCausalLM, RWKV6Model
from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM, RWKV7Model
from fla.models.samba import SambaConfig, SambaForCausalLM, SambaModel
from fla.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerModel
from fla.models.utils import Cache

__all__ = [
    "ABCConfig",
    "ABCForCausalLM",
    "ABCModel",
    "BitNetConfig",
    "BitNetForCausalLM",
    "BitNetModel",
    "Cache",
    "CombaConfig",
    "CombaForCausalLM",
    "CombaModel",
    "DeltaFormerConfig",
    "DeltaFormerForCausalLM",
    "DeltaFormerModel",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "DeltaNetModel",
    "GLAConfig",
    "GLAForCausalLM",
    "GLAModel",
    "GSAConfig",
    "GSAForCausalLM",
    "GSAModel",
    "GatedDeltaNet2Config",
    "GatedDeltaNet2ForCausalLM",
    "GatedDeltaNet2Model",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
    "GatedDeltaProductConfig",
    "GatedDeltaProductForCausalLM",
    "GatedDeltaProductModel",
    "HGRN2Config",
    "HGRN2ForCausalLM",
    "HGRN2Model",
    "HGRNConfig",
    "HGRNForCausalLM",
    "HGRNModel",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "KDAConfig",
    "KDAForCausalLM",
    "KDAModel",
    "LightNetConfig",
    "LightNetForCausalLM",
    "LightNetModel",
    "LinearAttentionConfig",
    "LinearAttentionForCausalLM",
    "LinearAttentionModel",
    "LogLinearMamba2Config",
    "LogLinearMamba2ForCausalLM",
    "LogLinearMamba2Model",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetModel",
    "MLAConfig",
    "MLAForCausalLM",
    "MLAModel",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2Model",
    "Mamba3Config",
    "Mamba3ForCausalLM",
    "Mamba3Model",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaModel",
    "MesaNetConfig",
    "MesaNetForCausalLM",
    "MesaNetModel",
    "MomConfig",
    "MomForCausalLM",
    "MomModel",
    "PrecondGatedDeltaNetConfig",
    "PrecondGatedDeltaNetForCausalLM",
    "PrecondGatedDeltaNetModel",
    "PrecondKDAConfig",
    "PrecondKDAForCausalLM",
    "PrecondKDAModel",
    "RWKV4Config",
    "RWKV4ForCausalLM",
    "RWKV4Model",
    "RWKV6Config",
    "RWKV6ForCausalLM",
    "RWKV6Model",
    "RWKV7Config",
    "RWKV7ForCausalLM",
    "RWKV7Model",
    "RavenConfig",
    "RavenForCausalLM",
    "RavenModel",
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetModel",
    "RodimusConfig",
    "RodimusForCausalLM",
    "RodimusModel",
    "SambaConfig",
    "SambaForCausalLM",
    "SambaModel",
    "TransformerConfig",
    "TransformerForCausalLM",
    "TransformerModel",
]
