# SPDX-License-Identifier: MIT
"""The decoder's base classes under the names that code for the published package imports."""

from fla.models.decoder import DecoderForCausalLM as FLAForCausalLM
from fla.models.decoder import DecoderModel as FLAModel
from fla.models.decoder import DecoderPreTrainedModel as FLAPreTrainedModel

__all__ = ["FLAForCausalLM", "FLAModel", "FLAPreTrainedModel"]
