# SPDX-License-Identifier: MIT
"""Hugging Face-compatible language models: one decoder (`decoder.py`), one small file per
architecture.

Importing this package registers every architecture with transformers' Auto classes.
"""

from fla.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel
from fla.models.gated_deltanet import (
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    GatedDeltaNetModel,
)
from fla.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerModel
from fla.models.utils import Cache

__all__ = [
    "Cache",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "DeltaNetModel",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
    "TransformerConfig",
    "TransformerForCausalLM",
    "TransformerModel",
]
