# SPDX-License-Identifier: MIT
"""What a conversion is asked to do: every field with its default, read from YAML or JSON and from
`name.field=value` on the command line.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from fla.core.errors import UsageError
from fla.layers.linearized import LinearOptions
from fla.modules.losses import Divergence

LOSSES = ("l2", "mse", "rel_mse", "cosine")
EXPORTS = ("library", "qwen3_5")
METHODS = ("kl_greedy", "kl_replace", "kl_restore", "recall", "mse", "uniform", "manual")


@dataclass
class Data:
    """Text, as for `fla train`, tokens per block and blocks per batch."""

    source: str = "stdlib"
    column: str = "text"
    seq: int = 512
    batch: int = 4
    seed: int = 0


@dataclass
class Calibrate:
    """Sets gates from the teacher's attention over `tokens` tokens; 0 leaves them as they are."""

    tokens: int = 4096


@dataclass
class Align:
    """The regression of every layer on its teacher's output.

    Fields:
        loss: `l2` (mean length of the difference over sqrt(D)), `mse`, `rel_mse` or `cosine`.
        lr, lr_copied, min_lr: of new and of copied parameters, and where the cosine ends.
        layers: which ones; all by default.
        layers_at_once: trained in one pass over the data; 0 for all. What a pass holds is their
            parameters and optimizers, and the activations of one.
        patience: checks without 0.5 % less error after which a layer stops; 0 for never.
        check, save: steps between checks on held-out text, and between saved states.
    """

    tokens: int = 100_000_000
    loss: str = "l2"
    lr: float = 1e-3
    lr_copied: float = 1e-3
    min_lr: float = 1e-5
    warmup: int = 50
    weight_decay: float = 0.0
    layers: list[int] | None = None
    layers_at_once: int = 0
    patience: int = 0
    check: int = 50
    save: int = 200

    def __post_init__(self) -> None:
        choice("align.loss", self.loss, LOSSES)


@dataclass
class Select:
    """The choice of the layers that stay softmax.

    Fields:
        method: of `METHODS`; see `select.py`.
        keep: how many: a count, a share below 1, or bytes of cache at a length ("64MiB@32768").
        tokens: of text that one score sees; retrieval: prompts beside them.
        pin_full, pin_linear: layers that are decided; `layers` those that stay, for `manual`.
    """

    method: str = "kl_greedy"
    keep: str = "0.25"
    tokens: int = 1_000_000
    retrieval: int = 32
    pin_full: list[int] = field(default_factory=list)
    pin_linear: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keep = str(self.keep)
        choice("select.method", self.method, METHODS)


@dataclass
class Distill:
    """The training of the whole student on the teacher's logits;
    `fla.modules.fused_linear_divergence` has the formulas.

    Fields:
        lr_mixer, lr_rest: of linear layers, and of everything else.
        hidden_weight: of the relative error of every layer's output.
        top_k: of the teacher's tokens, kept on disk (0: the teacher runs along).
        save: steps between checkpoints.
    """

    tokens: int = 600_000_000
    divergence: str = "forward_kl"
    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    lr_mixer: float = 1e-4
    lr_rest: float = 1e-5
    warmup: int = 100
    weight_decay: float = 0.0
    top_k: int = 0
    save: int = 500


@dataclass
class Long:
    """Training on longer blocks at the end, with cross entropy; 0 tokens leaves it out."""

    tokens: int = 0
    seq: int = 16384
    lr: float = 1e-5


@dataclass
class Report:
    """What the report measures beside the student.

    Fields:
        uniform, scratch: students of uniform placement, and of the same shape from nothing (at
            `scratch_lr`), given the same tokens.
        control: share of the distillation's tokens that the teacher itself is trained on.
        eval_bytes: of held-out text that is scored; probes: prompts of the recall probe.
        lengths: of a cache for decode time and bytes.
    """

    uniform: bool = False
    scratch: bool = False
    scratch_lr: float = 1e-3
    control: float = 0.0
    eval_bytes: int = 500_000
    probes: int = 64
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192])


@dataclass
class Config:
    """A conversion; `linear` holds the fields of `LinearOptions`. `trainer` goes to transformers'
    TrainingArguments as it is: precision, FSDP, trackers. `export` "qwen3_5" also writes
    transformers' own class into the folder of that name.
    """

    linear: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    calibrate: Calibrate = field(default_factory=Calibrate)
    align: Align = field(default_factory=Align)
    select: Select = field(default_factory=Select)
    distill: Distill = field(default_factory=Distill)
    long: Long = field(default_factory=Long)
    report: Report = field(default_factory=Report)
    trainer: dict[str, Any] = field(default_factory=dict)
    export: str = "library"

    def __post_init__(self) -> None:
        choice("export", self.export, EXPORTS)

    def distill_bytes(self) -> int:
        """Bytes of logits that the divergence computes at a time."""
        return Divergence().chunk_bytes

    def steps(self, tokens: int) -> int:
        """The number of batches that hold `tokens` tokens."""
        return -(-tokens // (self.data.seq * self.data.batch))


def choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"{name} is {value!r}; {hint}expected one of {', '.join(known)}")


def build(kind: Any, values: dict[str, Any], path: str = "") -> Any:
    """A dataclass of nested dictionaries; unknown names and wrong kinds are refused by name."""
    known = {f.name: f for f in fields(kind)}
    found: dict[str, Any] = {}
    defaults = kind()
    for name, value in values.items():
        where = f"{path}{name}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected {', '.join(known)}"
            raise UsageError(f"--config: there is no {where!r}{hint}")
        default = getattr(defaults, name)
        if is_dataclass(default):
            if not isinstance(value, dict):
                raise UsageError(f"--config: {where} is {value!r}; names and values were expected")
            value = build(type(default), value, f"{where}.")
        elif isinstance(default, bool | int | float) and not isinstance(value, int | float):
            raise UsageError(f"--config: {where} is {value!r}; a number or flag was expected")
        elif isinstance(default, list) and not isinstance(value, list):
            raise UsageError(f"--config: {where} is {value!r}; a list was expected")
        elif isinstance(default, int) and not isinstance(default, bool):
            value = int(value)
        found[name] = value
    return kind(**found)


def load(file: str | None, changes: list[str]) -> Config:
    """The defaults, changed by a file and then by `name.field=value` pairs."""
    values: Any = {}
    if file is not None:
        if not Path(file).is_file():
            raise UsageError(f"--config: {file!r} does not exist")
        try:
            values = yaml.safe_load(Path(file).read_text()) or {}
        except yaml.YAMLError as error:
            raise UsageError(f"--config: {file} is not YAML or JSON: {error}") from error
        if not isinstance(values, dict):
            raise UsageError(f"--config: {file} must hold names and values")
    for change in changes:
        name, separator, value = change.partition("=")
        if not separator:
            raise UsageError(f"--set: {change!r} is not of the form name.field=value")
        *parents, last = name.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = yaml.safe_load(value)
    config: Config = build(Config, values)
    try:
        LinearOptions.of(config.linear)
    except ValueError as error:
        raise UsageError(f"--config: {error}") from error
    return config
