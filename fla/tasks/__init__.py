# SPDX-License-Identifier: MIT
"""Synthetic tasks: what an architecture can copy, recall and keep track of."""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.tasks.models": ["small_config"],
        "fla.tasks.rows": ["TASKS", "Rows", "Task", "task_of"],
        "fla.tasks.run": ["Recipe", "compare", "train_task"],
        "fla.tasks.scores": ["Scores", "score_task"],
    },
)
