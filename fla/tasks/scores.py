# SPDX-License-Identifier: MIT
"""How well a model does a task, at lengths it may never have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fla.tasks.rows import IGNORE, Task, task_of

TRIALS = 1 << 40  # seeds of rows that no training sees begin here


@dataclass
class Scores:
    """How a model does on a task, by length: the share of rows with every answer right (`exact`),
    and the share of answers that are right (`answers`).
    """

    exact: dict[int, float]
    answers: dict[int, float]


@torch.inference_mode()
def score_task(
    model: Any, task: str | Task, lengths: Sequence[int], trials: int = 256, seed: int = 0
) -> Scores:
    """Exact matches of the likeliest token, on rows made from the seed.

    Raises `ValueError` where the model has fewer tokens than the task, or attention for fewer
    positions than a length.
    """
    task = task_of(task) if isinstance(task, str) else task
    if model.config.vocab_size < task.vocabulary:
        raise ValueError(
            f"task {task.name}: needs {task.vocabulary} tokens, and the model has "
            f"{model.config.vocab_size}; train one with `fla task {task.name}`"
        )
    linear = set(getattr(model.config, "layer_types", None) or ()) == {"linear_attention"}
    most = getattr(model.config, "max_position_embeddings", None)
    if most and max(lengths) > most and not linear:
        raise ValueError(
            f"task {task.name}: {max(lengths)} tokens, and the model was configured for "
            f"max_position_embeddings={most}; choose shorter trials"
        )
    model.eval()
    scores = Scores({}, {})
    for length in lengths:
        right, exact, asked = 0, 0, 0
        # equally many tokens per batch, whatever the length
        size = max(1, min(trials, 16384 // length))
        for first in range(0, trials, size):
            count = min(size, trials - first)
            rows = task.rows(count, length, seed=TRIALS + seed * trials + first)
            inputs, labels = (x.to(model.device) for x in rows)
            logits = model(inputs[:, :-1], use_cache=False).logits
            hits, kept = logits.argmax(-1) == labels[:, 1:], labels[:, 1:] != IGNORE
            right += int((hits & kept).sum())
            asked += int(kept.sum())
            exact += int((hits | ~kept).all(1).sum())
        scores.exact[length], scores.answers[length] = exact / trials, right / asked
    return scores
