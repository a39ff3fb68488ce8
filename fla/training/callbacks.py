# SPDX-License-Identifier: MIT
"""What the user sees of a run, and what ends it early: progress, interruption, a time budget, a
loss that is NaN or infinite.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import Trainer, TrainerCallback

from fla.core.errors import TrainingDiverged
from fla.optim import Muon, roles
from fla.training.checkpoints import seal


class FlaTrainer(Trainer):
    """transformers' Trainer that watches the loss and counts tokens. A loss of NaN or infinity is
    noticed at the step it appears on a CPU; on an accelerator before the next checkpoint, so that
    no step waits for the device.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tokens_done = 0
        self.use_muon = getattr(self.args, "muon", False)
        self.ranks_a_batch = 1
        self.last_loss: torch.Tensor | None = None
        self._broken: torch.Tensor | None = None

    def training_step(self, model, inputs, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens_done += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, *args, **kwargs)
        broken = ~torch.isfinite(loss.detach())
        self._broken = broken if self._broken is None else self._broken | broken
        self.last_loss = loss.detach() * self.args.gradient_accumulation_steps
        return loss

    def get_decay_parameter_names(self, model) -> list[str]:
        """The parameters with weight decay, as their layers say (`fla.optim.roles`)."""
        return [name for name, role in roles(model).items() if role.decays]

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.use_muon:
            args, own = self.args, model or self.model
            assert own is not None  # a trainer that runs has one
            self.optimizer = Muon(
                own, args.learning_rate, args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
            )  # fmt: skip
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def is_broken(self) -> bool:
        return self._broken is not None and bool(self._broken.any())


class LossGuard(TrainerCallback):
    """Raises `TrainingDiverged` before a run whose loss or weights are NaN saves anything."""

    trainer: FlaTrainer  # set by `make_trainer`

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._check(args, state, will_save=False)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._check(args, state, will_save=control.should_save)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._check(args, state, will_save=True)

    def _check(self, args, state, will_save: bool) -> None:
        on_cpu = args.device.type == "cpu"
        if (on_cpu or will_save) and self.trainer.is_broken():
            raise TrainingDiverged(f"the loss is not a number at step {state.global_step + 1}")
        model = self.trainer.model
        assert model is not None  # a trainer that runs has one
        if will_save and not all(p.isfinite().all() for p in model.parameters()):
            raise TrainingDiverged(f"the weights are not numbers after step {state.global_step}")


class Seal(TrainerCallback):
    """Writes the checksums of a checkpoint once all processes have written their part."""

    def on_save(self, args, state, control, **kwargs) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class Interruption(TrainerCallback):
    """Ctrl-C and SIGTERM finish the step, save a checkpoint and stop; a second Ctrl-C stops at
    once. `max_minutes` ends a run the same way.
    """

    def __init__(self, max_minutes: float | None, say):
        self.max_minutes, self.say = max_minutes, say
        self.begun, self.asked, self.out_of_time = time.monotonic(), False, False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread, which alone may handle signals
                return

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say(
            "stopping after this step; a checkpoint will be saved (Ctrl-C again stops at once)"
        )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        minutes = (time.monotonic() - self.begun) / 60
        self.out_of_time = self.max_minutes is not None and minutes >= self.max_minutes
        if self.asked or self.out_of_time:
            control.should_save = control.should_training_stop = True
        if self.out_of_time and state.global_step < state.max_steps and state.is_world_process_zero:
            self.say(
                f"the {self.max_minutes:g} minutes of --max_minutes are over: stopped at step "
                f"{state.global_step} of {state.max_steps}; --resume true continues from there"
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class LiveProgress(TrainerCallback):
    """A bar with loss, tokens per second and time left; one line per log where the output is not a
    terminal.
    """

    trainer: FlaTrainer  # set by `make_trainer`

    def __init__(self, console: Console):
        self.console = console
        self.bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begun, self.first = time.monotonic(), state.global_step
        self.trainer.tokens_done = 0
        if not state.is_world_process_zero:
            return
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar.start()
        self.task = self.bar.add_task(
            "train",
            total=state.max_steps,
            completed=state.global_step,
            loss="-",
            speed="-",
            left="-",
        )

    def rates(self, state) -> tuple[float, float]:
        """(tokens per second, seconds left) of this run."""
        elapsed, done = time.monotonic() - self.begun, state.global_step - self.first
        speed = self.trainer.tokens_done * self.trainer.args.world_size / max(elapsed, 1e-9)
        return speed, elapsed / max(done, 1) * (state.max_steps - state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is None or not self.console.is_terminal:
            return
        speed, left = self.rates(state)
        fields: dict[str, Any] = dict(speed=f"{speed:,.0f}", left=clock(left))
        if self.trainer.last_loss is not None and args.device.type == "cpu":
            fields["loss"] = f"{float(self.trainer.last_loss):.3f}"
        self.bar.update(self.task, completed=state.global_step, **fields)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or "loss" not in logs:
            return
        speed, left = self.rates(state)
        logs["tokens_per_second"] = round(speed, 1)
        if self.bar is None:
            return
        if self.console.is_terminal:
            self.bar.update(self.task, loss=f"{float(logs['loss']):.3f}")
        else:
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}  "
                f"{speed:,.0f} tokens/s  left {clock(left)}",
                highlight=False,
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    Example:
        >>> clock(75), clock(3675)
        ('1:15', '1:01:15')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(message: str) -> None:
    """One line to the user, beside the bar."""
    print(message, file=sys.stderr, flush=True)
