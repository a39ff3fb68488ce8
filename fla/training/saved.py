# SPDX-License-Identifier: MIT
"""A saved model with the tokenizer it was trained with, for every command that is given one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import fla.models
from fla.core.errors import UsageError
from fla.data.tokens import load_tokenizer
from fla.training.checkpoints import broken_seal, require_model


def check_loaded(folder: str, model: Any, info: dict[str, Any]) -> None:
    """Raise `UsageError` for weights that a checkpoint lacks, that the model has not, or that are
    no numbers.
    """
    for kind, what in (
        ("missing_keys", "lacks the weights"),
        ("mismatched_keys", "holds weights of another shape:"),
        ("unexpected_keys", "holds weights that its model has not:"),
    ):
        names = sorted(str(key) for key in info.get(kind, ()))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(f"checkpoint {folder!r} {what} {', '.join(names[:3])}{more}")
    for name, x in model.state_dict().items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise UsageError(f"checkpoint {folder!r} holds NaN or infinity in {name}")


def load_checked(auto: Any, path: Path, skip: str = "") -> Any:
    """`auto.from_pretrained(path)`, or `UsageError` for a folder that is not what was saved; files
    that match `skip` are not looked at.
    """
    if problem := broken_seal(path, skip):
        raise UsageError(f"{path} is damaged: {problem}")
    try:
        model, info = auto.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise UsageError(f"checkpoint {str(path)!r} cannot be loaded: {error}") from error
    check_loaded(str(path), model, info)
    return model


def load_saved(folder: str, tokenizer: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder; the tokenizer is the folder's own where none is named.

    Raises `UsageError` where one of them is missing, damaged, not ours, or where the tokenizer has
    more tokens than the model.
    """
    path = require_model(folder)
    transformers_logging.disable_progress_bar()
    if not tokenizer and not list(path.glob("tokenizer*")):
        raise UsageError(
            f"checkpoint {folder!r} has no tokenizer; pass --tokenizer with 'byte', or the name or "
            "folder of one of Hugging Face"
        )
    model = load_checked(AutoModelForCausalLM, path, "tokenizer*" if tokenizer else "")
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
