# SPDX-License-Identifier: MIT
"""Every linear layer regressed on its teacher's output, on the teacher's inputs.

    l2       mean_t |A(x_t) - S(x_t)| / sqrt(D)         rel_mse  sum |A - S|^2 / sum |A|^2
    mse      mean (A - S)^2                             cosine   1 - mean_t cos(A(x_t), S(x_t))

One pass of the teacher serves all layers of a group: when it reaches one, that layer's student runs
on the same input, its loss goes backward at once, and its activations are gone before the next.
Layers share nothing, so they stop, fail and resume on their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fla.core.layout import SequenceLayout
from fla.layers.linearized import LinearizedAttention
from fla.linearize.config import Align
from fla.linearize.data import Text, on
from fla.linearize.files import (
    layer_file,
    load_tensors,
    read_json,
    save_tensors,
    save_torch,
    write_json,
)
from fla.linearize.surgery import attention_of

ENOUGH = 0.995  # an error above this share of the best one so far is no progress
HELD_OUT = 8192  # tokens of a check


def layer_loss(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """One of the losses above; `[..., D]`."""
    difference = student.float() - teacher.float()
    if kind == "mse":
        return difference.square().mean()
    if kind == "rel_mse":
        return difference.square().sum() / teacher.float().square().sum().clamp(min=1e-12)
    if kind == "cosine":
        return 1 - torch.cosine_similarity(student.float(), teacher.float(), -1).mean()
    return torch.linalg.vector_norm(difference, dim=-1).mean() * student.shape[-1] ** -0.5


@dataclass
class Record:
    """How a layer fared: relative errors on held-out text by step, and why it stopped early."""

    checks: list[tuple[int, float]] = field(default_factory=list)
    stopped: str | None = None

    @property
    def error(self) -> float:
        return self.checks[-1][1] if self.checks else math.nan

    @property
    def plateau(self) -> int:
        """The number of checks since the last progress."""
        best, since = math.inf, 0
        for _, error in self.checks:
            best, since = (error, 0) if error < best * ENOUGH else (best, since + 1)
        return since


class Regression:
    """One layer, its optimizer and its record."""

    def __init__(self, layer: LinearizedAttention, options: Align, steps: int):
        self.layer, self.options, self.record = layer, options, Record()
        copied = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
        new: list[Tensor] = []
        old: list[Tensor] = []
        for name, p in layer.named_parameters():
            (old if name.split(".")[0] in copied else new).append(p)
        groups: Any = [dict(params=new, lr=options.lr), dict(params=old, lr=options.lr_copied)]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )

        def factor(base: float) -> Callable[[int], float]:
            low = min(1.0, options.min_lr / base) if base else 1.0

            def at(step: int) -> float:
                if step < options.warmup:
                    return (step + 1) / options.warmup
                share = (step - options.warmup) / max(1, steps - options.warmup)
                return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

            return at

        rates = [factor(options.lr), factor(options.lr_copied)]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rates)
        self.good = self.weights()

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().cpu().clone() for n, p in self.layer.state_dict().items()}

    def step(self, x: Tensor, y: Tensor, layout: SequenceLayout, number: int) -> None:
        if self.record.stopped is not None:
            return
        with torch.enable_grad():
            loss = layer_loss(self.options.loss, self.layer(x.float(), layout=layout)[0], y)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.layer.parameters(), 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            self.layer.load_state_dict(self.good)
            self.record.stopped = f"not a number at step {number}; its last good weights are kept"
        else:
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, error: float, number: int) -> None:
        if self.record.stopped is not None:
            return
        if not math.isfinite(error):
            self.layer.load_state_dict(self.good)
            self.record.stopped = f"not a number at step {number}; its last good weights are kept"
            return
        self.good = self.weights()
        self.record.checks.append((number, error))
        if self.options.patience and self.record.plateau >= self.options.patience:
            self.record.stopped = f"no progress since {self.options.patience} checks"

    def state(self) -> dict[str, Any]:
        return dict(
            layer=self.weights(),
            good=self.good,
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            record=asdict(self.record),
        )

    def restore(self, state: dict[str, Any]) -> None:
        self.layer.load_state_dict(state["layer"])
        self.good = state["good"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.record = Record(**state["record"])


class _Reached(Exception):
    """The last layer that is wanted has run."""


@torch.no_grad()
def visit(
    teacher: Any,
    layers: list[int],
    batch: dict[str, Tensor],
    see: Callable[[int, Tensor, Tensor, SequenceLayout], None],
) -> None:
    """Run the teacher up to the last of the layers; at each `see(layer, input, output, layout)` of
    its attention.
    """

    def hook(layer: int) -> Any:
        def run(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            see(layer, args[0], output[0], kwargs["layout"])
            if layer == layers[-1]:
                raise _Reached

        return attention_of(teacher, layer).register_forward_hook(run, with_kwargs=True)

    hooks = [hook(layer) for layer in layers]
    batch = on(teacher.device, batch)
    try:
        teacher.model(batch["input_ids"], cu_seqlens=batch["cu_seqlens"], use_cache=False)
    except _Reached:
        pass
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def errors(
    teacher: Any, bank: dict[int, LinearizedAttention], batches: list[dict[str, Tensor]]
) -> dict[int, float]:
    """Relative squared error of every layer over batches."""
    sums = {i: [0.0, 0.0] for i in bank}

    def see(layer: int, x: Tensor, y: Tensor, layout: SequenceLayout) -> None:
        o = bank[layer](x.float(), layout=layout)[0]
        sums[layer][0] += float((o - y.float()).square().sum())
        sums[layer][1] += float(y.float().square().sum())

    for batch in batches:
        visit(teacher, sorted(bank), batch, see)
    return {i: wrong / max(whole, 1e-12) for i, (wrong, whole) in sums.items()}


Progress = Callable[[int, int, str], None]  # steps done, of how many, what to say


class Alignment:
    """The stage: groups of layers one after the other, each from its last saved state."""

    def __init__(self, teacher: Any, text: Text, options: Align, steps: int, folder: Path):
        self.teacher, self.text, self.options = teacher, text, options
        self.steps, self.folder = steps, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.checks = text.held_out_batches(HELD_OUT)

    def run(
        self, bank: dict[int, LinearizedAttention], progress: Progress, stop: Callable[[], bool]
    ) -> None:
        """Train what is not done of the bank; `stop` is asked after every step, and ends it with
        all saved.
        """
        waiting = sorted(set(bank) - set(records(self.folder)))
        for i in set(bank) - set(waiting):
            bank[i].load_state_dict(load_tensors(layer_file(self.folder, i)))
        size = self.options.layers_at_once or len(waiting) or 1
        groups = [waiting[i : i + size] for i in range(0, len(waiting), size)]
        for group in groups:
            if not self.group({i: bank[i] for i in group}, progress, stop):
                return

    def group(
        self,
        bank: dict[int, LinearizedAttention],
        progress: Progress,
        stop: Callable[[], bool],
    ) -> bool:
        """Train one group of layers; returns whether it was trained to its end."""
        runs = {i: Regression(layer, self.options, self.steps) for i, layer in bank.items()}
        saved = self.folder / f"progress_{min(bank):03}.pt"
        first = self.resume(runs, saved)
        if first == 0:
            self.check(runs, bank, 0)
        for step in range(first, self.steps):

            def see(
                layer: int, x: Tensor, y: Tensor, layout: SequenceLayout, step: int = step
            ) -> None:
                runs[layer].step(x, y, layout, step)

            visit(self.teacher, sorted(bank), self.text.batch(step), see)
            if (step + 1) % self.options.check == 0 or step + 1 == self.steps:
                self.check(runs, bank, step + 1)
            last = all(run.record.stopped for run in runs.values())
            worst = max(run.record.error for run in runs.values())
            mean = sum(run.record.error for run in runs.values()) / len(runs)
            progress(step + 1, self.steps, f"error {mean:.3f}, worst {worst:.3f}")
            if stop() or (step + 1) % self.options.save == 0:
                states = {i: run.state() for i, run in runs.items()}
                save_torch(saved, dict(step=step + 1, layers=sorted(runs), states=states))
            if stop() and step + 1 < self.steps:
                return False
            if last:
                break
        self.finish(runs)
        saved.unlink(missing_ok=True)
        return True

    def resume(self, runs: dict[int, Regression], saved: Path) -> int:
        """Restore the saved state of these layers, if there is one; returns the step to continue
        from.
        """
        if not saved.exists():
            return 0
        state = torch.load(saved, weights_only=True)
        if state["layers"] != sorted(runs):
            return 0
        for i, run in runs.items():
            run.restore(state["states"][i])
        return int(state["step"])

    def check(
        self, runs: dict[int, Regression], bank: dict[int, LinearizedAttention], step: int
    ) -> None:
        for i, error in errors(self.teacher, bank, self.checks).items():
            runs[i].check(error, step)

    def finish(self, runs: dict[int, Regression]) -> None:
        for i, run in runs.items():
            save_tensors(layer_file(self.folder, i), run.good)
            write_json(self.folder / f"layer_{i:03}.json", asdict(run.record))


def records(folder: Path) -> dict[int, Record]:
    """The records of the layers that are done. Each layer's file is written last, so that several
    processes can share the folder.
    """
    files = sorted(folder.glob("layer_*.json"))
    return {int(file.stem.removeprefix("layer_")): Record(**read_json(file)) for file in files}
