# SPDX-License-Identifier: MIT
"""Tasks of EleutherAI's lm-evaluation-harness on a model, where that package is installed."""

from __future__ import annotations

from typing import Any

from fla.core.errors import UsageError


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    folder: str | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Every figure of every task, by name: the model through the harness's own wrapper for Hugging
    Face models, log probabilities in fp32. `folder` holds tasks of one's own, `limit` bounds the
    examples of each.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            f"--harness needs lm-evaluation-harness ({error}); pip install lm-eval"
        ) from error
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(f"--harness: {unknown} are not among the harness's tasks; see lm-eval ls")
    wrapper = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32",
        add_bos_token=False,
    )  # fmt: skip
    found: Any = lm_eval.simple_evaluate(
        wrapper, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0
    )
    return {
        task: {n.partition(",")[0]: x for n, x in figures.items() if isinstance(x, int | float)}
        for task, figures in found["results"].items()
    }
