# SPDX-License-Identifier: MIT
"""`fla linearize` runs the stages in order: finished stages are skipped, an interrupted stage
resumes.

A folder holds one conversion: `state.json` records the teacher and the options of each stage
that was done, and a stage asked for with other options is refused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from fla.core.errors import UsageError
from fla.layers.linearized import LinearizedAttention
from fla.linearize import report
from fla.linearize.align import Alignment, records
from fla.linearize.calibrate import calibrate
from fla.linearize.config import Config
from fla.linearize.data import Text
from fla.linearize.distill import InOrder, arguments, distill, train_stage
from fla.linearize.export import obstacle, to_qwen3_5
from fla.linearize.files import layer_file, load_tensors, read_json, save_tensors, write_json
from fla.linearize.measure import Measures, ablate, from_dict, measure
from fla.linearize.select import Selection, read_scores, uniform_layers
from fla.linearize.surgery import assemble, load_teacher, make_linear, student_config
from fla.linearize.teacher import teacher_fingerprint
from fla.models import HybridForCausalLM
from fla.training.callbacks import Interruption, clock, say
from fla.training.checkpoints import seal
from fla.training.saved import load_checked
from fla.utils import get_available_device

STAGES = ("calibrate", "align", "select", "distill", "long", "report")
# what each stage depends on, beside those before it
PARTS = {
    "calibrate": ("linear", "data", "calibrate"),
    "align": ("align",),
    "select": ("select",),
    "distill": ("distill",),
    "long": ("long",),
    "report": ("report",),
}


# options of align that change its schedule, not its weights
SCHEDULING = ("layers", "layers_at_once", "save")


class Meter:
    """How far a stage is, with time left: a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console, title: str, every: float = 10.0):
        self.console, self.title, self.every = console, title, every
        self.begun = self.shown = time.monotonic()
        self.first: int | None = None
        self.bar: Progress | None = None

    def __call__(self, done: int, total: int, text: str) -> None:
        if self.console.is_terminal:
            self.draw(done, total, text)
            return
        now = time.monotonic()
        self.first = done - 1 if self.first is None else self.first
        left = (now - self.begun) / max(1, done - self.first) * (total - done)
        if done == total or now - self.shown >= self.every:
            self.console.print(f"{self.title} {done}/{total}  {text}  left {clock(left)}")
            self.shown = now

    def draw(self, done: int, total: int, text: str) -> None:
        if self.bar is None:
            columns = (TextColumn("{task.description} {task.completed}/{task.total}"), BarColumn())
            said = TextColumn("{task.fields[said]}")
            self.bar = Progress(*columns, said, TimeRemainingColumn(), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=total, said="")
        self.bar.update(self.task, completed=done, total=total, said=text)
        if done == total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Stopped(Exception):
    """The user stopped a stage; its progress is saved."""


class Conversion:
    """A teacher, a folder, and what was asked for."""

    def __init__(self, source: str, out: str, config: Config, console: Console | None = None):
        self.source, self.out, self.config = source, Path(out), config
        self.first = int(os.environ.get("RANK", "0")) == 0
        self.console = console or Console(highlight=False, soft_wrap=True)
        transformers_logging.disable_progress_bar()
        device = get_available_device()
        try:
            teacher: Any = load_teacher(source)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UsageError(f"teacher {source!r}: {error}") from error
        self.teacher = teacher.to(device)
        if device == "cpu":  # where products of lower dtypes are slow
            self.teacher = self.teacher.float()
        if config.export == "qwen3_5":
            reason = obstacle(student_config(self.teacher.config, [0], config.linear))
            if reason is not None:
                raise UsageError(f"export: it cannot be a Qwen3.5 model: {reason}")
        self.layers = list(range(self.teacher.config.num_hidden_layers))
        self.text = Text(config.data, self.tokenizer)
        self.state_file = self.out / "state.json"
        self.state = self.read_state()

    def read_state(self) -> dict[str, Any]:
        mark = teacher_fingerprint(self.teacher)
        new = dict(teacher=mark, source=self.source, begun={}, done={})
        state = read_json(self.state_file) or new
        if state["teacher"] != mark:
            raise UsageError(
                f"{self.out} holds a conversion of another teacher ({state['source']}); choose "
                "another folder"
            )
        return state

    def asked(self, stage: str) -> dict[str, Any]:
        """The settings that a stage's results depend on."""
        values = asdict(self.config)
        for name in SCHEDULING:
            del values["align"][name]
        return {part: values[part] for part in PARTS[stage]}

    def done(self, stage: str) -> bool:
        begun, asked = self.state["begun"].get(stage), self.asked(stage)
        if begun is not None and begun != asked:
            changed = [part for part in asked if begun[part] != asked[part]]
            raise UsageError(
                f"{self.out}: stage {stage!r} was begun with other options ({', '.join(changed)}); "
                "choose another folder, or ask for the same"
            )
        return stage in self.state["done"]

    def check_processes(self, stage: str) -> None:
        """Under `torchrun` only what the Trainer does runs in several processes."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and stage not in ("distill", "long"):
            raise UsageError(
                f"stage {stage!r} runs in one process: do it without torchrun (align.layers splits "
                "the alignment), then --stage distill with it"
            )

    def note(self, kind: str, stage: str, value: Any) -> None:
        """Record that a stage was begun, or done."""
        self.state[kind][stage] = value
        if self.first:
            write_json(self.state_file, self.state)

    def run(self, stage: str | None = None, alone: bool = True) -> None:
        """Run all stages, or one stage; if `alone` its predecessors must be done, else they run
        too.
        """
        if stage is not None and stage not in STAGES:
            raise UsageError(f"--stage: {stage!r} is not one of {', '.join(STAGES)}")
        for name in STAGES:
            if stage is not None and STAGES.index(name) > STAGES.index(stage):
                return
            if self.done(name):
                self.console.print(f"{name}: done")
                continue
            if alone and stage is not None and name != stage:
                raise UsageError(f"--stage {stage}: stage {name!r} comes first, and is not done")
            self.check_processes(name)
            self.console.rule(name)
            self.note("begun", name, self.asked(name))
            begun = time.monotonic()
            getattr(self, name)()
            self.note("done", name, round(time.monotonic() - begun, 1))

    def bank(self, folder: str = "") -> dict[int, LinearizedAttention]:
        """Every layer made linear; with a folder, as that stage saved them."""
        linear = self.config.linear
        layers = {i: make_linear(self.teacher, i, linear) for i in self.layers}
        if folder:
            for i, layer in layers.items():
                layer.load_state_dict(load_tensors(layer_file(self.out / folder, i)))
        return layers

    def calibrate(self) -> None:
        bank, tokens = self.bank(), self.config.calibrate.tokens
        found = {}
        if tokens:
            batches = [self.text.batch(i) for i in range(self.config.steps(tokens))]
            found = calibrate(self.teacher, bank, batches)
        for i, layer in bank.items():
            file = layer_file(self.out / "calibrate", i)
            save_tensors(file, {n: x.cpu() for n, x in layer.state_dict().items()})
        rows = {i: {n: x.tolist() for n, x in vars(s).items()} for i, s in found.items()}
        write_json(self.out / "calibrate" / "statistics.json", rows)
        for i, s in found.items():
            self.console.print(
                f"layer {i}: looks back {s.look_back.mean():.0f} tokens on average "
                f"({s.look_back_all.mean():.0f} with the first), focus {s.focus.mean():.2f}"
            )

    def align(self) -> None:
        options = self.config.align
        bank = self.bank("calibrate")
        outside = sorted(set(options.layers or ()) - set(self.layers))
        if outside:
            raise UsageError(f"align.layers: {outside} are outside 0..{self.layers[-1]}")
        wanted = {i: bank[i] for i in (options.layers or self.layers)}
        steps = self.config.steps(options.tokens)
        stage = Alignment(self.teacher, self.text, options, steps, self.out / "align")
        interruption = Interruption(None, say)
        interruption.on_train_begin(None, None, None)
        meter = Meter(self.console, "align")
        try:
            stage.run(wanted, meter, lambda: interruption.asked)
        finally:
            meter.close()
            interruption.restore()
        if interruption.asked:
            raise Stopped
        found = records(self.out / "align")
        for i, record in found.items():
            first = record.checks[0][1] if record.checks else float("nan")
            said = f"; stopped: {record.stopped}" if record.stopped else ""
            self.console.print(f"layer {i}: error {first:.3f} -> {record.error:.3f}{said}")
        missing = [i for i in self.layers if i not in found]
        if missing:
            raise UsageError(
                f"align: layers {missing} are not done yet (align.layers names others); run the "
                "stage for them before the next one"
            )

    def errors(self) -> dict[int, float]:
        """The errors of the alignment, by layer."""
        return {i: record.error for i, record in records(self.out / "align").items()}

    def select(self) -> None:
        bank = {i: x.to(self.teacher.dtype) for i, x in self.bank("align").items()}
        stage = Selection(
            self.teacher, bank, self.text, self.tokenizer, self.config.select, self.out
        )
        meter = Meter(self.console, "select", every=0)
        try:
            found = stage.run(self.errors(), meter)
        finally:
            meter.close()
            stage.swaps.put(set())
        report.plot_scores(found, self.out / "layer_scores.png")
        agreement = "" if found.agreement is None else f"; halves agree to {found.agreement:.2f}"
        gap = "" if found.gap is None else f"; gap at the cut {found.gap:.4f}"
        self.console.print(f"softmax stays in layers {found.softmax}{agreement}{gap}")

    def linear_layers(self) -> list[int]:
        found = read_scores(self.out)
        assert found is not None and found.softmax is not None
        return [i for i in self.layers if i not in found.softmax]

    def student(self, layers: list[int], folder: str) -> Any:
        """The teacher with some layers linear, as a stage saved them."""
        bank = self.bank(folder)
        return assemble(self.teacher, {i: bank[i] for i in layers}, self.config.linear)

    def distilled(self, name: str, layers: list[int]) -> None:
        student, folder = self.student(layers, "align"), self.out / name
        if not distill(
            student, self.teacher, self.tokenizer, self.text, self.config, folder, self.console
        ):
            raise Stopped

    def distill(self) -> None:
        self.distilled("distill", self.linear_layers())
        self.publish("distill")

    def publish(self, stage: str) -> None:
        """Save a stage's student as the conversion's result."""
        if not self.first:
            return
        model = self.student_of(stage)
        model.save_pretrained(self.out)
        self.tokenizer.save_pretrained(self.out)
        seal(self.out)
        if self.config.export == "qwen3_5":
            folder = self.out / "qwen3_5"
            to_qwen3_5(model).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def plain(self, name: str, model: Any, tokens: int, lr: float, seq: int | None = None) -> None:
        """Train a model on cross entropy alone."""
        text = self.text if seq is None else Text(self.config.data, self.tokenizer, seq)
        steps = -(-tokens // (text.blocks.length * text.data.batch))
        warmup, batch = self.config.distill.warmup, text.data.batch
        args = arguments(self.config, self.out / name, steps, lr, warmup, batch)
        if not train_stage(model, self.tokenizer, text, args, self.console, InOrder):
            raise Stopped

    def long(self) -> None:
        options = self.config.long
        if options.tokens:
            model = self.student_of("distill")
            self.plain("long", model, options.tokens, options.lr, options.seq)
            self.publish("long")

    def report(self) -> None:
        """Measures what is not measured yet, students made for comparison included."""
        options, folder = self.config.report, self.out / "report"
        final = "long" if self.config.long.tokens else "distill"
        layers = self.linear_layers()
        spent = self.config.align.tokens + self.config.distill.tokens
        loaded = HybridForCausalLM.from_pretrained
        rows: dict[str, Callable[[], Any]] = {
            "teacher": lambda: self.teacher,
            "after surgery": lambda: assemble(
                self.teacher,
                {i: make_linear(self.teacher, i, self.config.linear) for i in layers},
                self.config.linear,
            ),
            "after alignment": lambda: self.student(layers, "align"),
            "after distillation": lambda: loaded(self.out / final),
        }
        if options.uniform:
            kept = uniform_layers(len(self.layers), len(self.layers) - len(layers))
            even = [i for i in self.layers if i not in kept]
            rows["uniform placement"] = lambda: self.compared(
                "uniform", lambda: self.distilled("uniform", even)
            )
        if options.scratch:
            config = loaded(self.out / final).config
            rows["from scratch"] = lambda: self.compared(
                "scratch",
                lambda: self.plain("scratch", self.fresh(config), spent, options.scratch_lr),
            )
        if options.control:
            tokens = int(options.control * self.config.distill.tokens)
            rows["control: teacher, trained on"] = lambda: self.compared(
                "control",
                lambda: self.plain(
                    "control", assemble(self.teacher, {}), tokens, self.config.distill.lr_rest
                ),
            )
        found: dict[str, Measures] = {}
        for name, make in rows.items():
            file = folder / f"{name.replace(' ', '_').replace(':', '').replace(',', '')}.json"
            saved = read_json(file)
            if saved is None:
                self.console.print(f"measuring: {name}")
                model = make().to(self.teacher.device)
                saved = asdict(measure(model, self.teacher, self.text, options))
                write_json(file, saved)
            found[name] = from_dict(read_json(file))
        branches = ablate(loaded(self.out / final).eval(), self.text, options)
        finished = report.Finished(self.source, self.out, self.config, self.state["done"])
        report.write(finished, found, branches, self.console)

    def fresh(self, config: Any) -> Any:
        torch.manual_seed(self.config.data.seed)
        return HybridForCausalLM(config)

    def compared(self, name: str, train: Callable[[], None]) -> Any:
        """A student for comparison, trained where that is not done."""
        if name not in self.state["done"]:
            self.console.rule(name)
            begun = time.monotonic()
            train()
            self.note("done", name, round(time.monotonic() - begun, 1))
        return self.student_of(name)

    def student_of(self, stage: str) -> Any:
        """The model that a stage saved, or `UsageError` where it is damaged."""
        return load_checked(HybridForCausalLM, self.out / stage)
