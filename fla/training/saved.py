# SPDX-License-Identifier: MIT
"""A saved model with the tokenizer it was trained with, for every command that is given one."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import fla.models
from fla.core.errors import UsageError
from fla.data.tokens import load_tokenizer
from fla.training.checkpoints import require_model


def load_saved(folder: str, tokenizer: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder; the tokenizer is the folder's own where none is named.

    Raises `UsageError` where one of them is missing, damaged, not ours, or where the tokenizer has
    more tokens than the model.
    """
    path = require_model(folder)
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path)
    except Exception as error:
        raise UsageError(f"checkpoint {folder!r} cannot be loaded: {error}") from error
    if not tokenizer and not list(path.glob("tokenizer*")):
        raise UsageError(
            f"checkpoint {folder!r} has no tokenizer; pass --tokenizer with 'byte', or the name or "
            "folder of one of Hugging Face"
        )
    try:
        own: Any = load_tokenizer(tokenizer) if tokenizer else AutoTokenizer.from_pretrained(path)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"the tokenizer of {folder!r} cannot be loaded: {error}") from error
    if not isinstance(model, fla.models.decoder.DecoderPreTrainedModel):
        raise UsageError(
            f"checkpoint {folder!r} is a {type(model).__name__}; this command runs fla's own models"
        )
    if len(own) > model.config.vocab_size:
        raise UsageError(
            f"--tokenizer: it has {len(own)} tokens, and checkpoint {folder!r} "
            f"{model.config.vocab_size}; pass the one it was trained with"
        )
    return model, own
