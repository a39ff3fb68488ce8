# SPDX-License-Identifier: MIT
"""What a study is, as YAML: a kind of report, how every cell learns, and the cells.

    kind: ablation
    tokens: 500_000
    cells:
      - {name: whole, model: gated_deltanet}
      - {name: no convolution, model: gated_deltanet, fields: {use_short_conv: false}}

A field of the study is that of every cell which does not have its own.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fla.core.errors import UsageError

KINDS = ("ablation", "scaling", "hybrid", "long_context")


@dataclass
class Cell:
    """One model to train.

    Fields:
        name: of its row; model, fields: of `fla.tasks.models.small_config`.
        tokens: of the training; batch_tokens, seq_len: of a step, and of a block.
        group: line of a plot that it belongs to, the model's name if absent.
    """

    name: str
    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    hidden_size: int = 128
    layers: int = 4
    head_dim: int = 32
    tokens: int = 500_000
    batch_tokens: int = 4096
    seq_len: int = 512
    learning_rate: float = 3e-3
    seed: int = 0
    group: str = ""

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_tokens)


@dataclass
class Study:
    """Cells on one corpus. `lengths` are those a long-context study tries; `scored` the bytes of
    held-out text every cell is scored on.
    """

    kind: str
    cells: list[Cell]
    data: str = "stdlib"
    tokenizer: str = "byte"
    scored: int = 400_000
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16384])


def _known(names: Any, allowed: list[str], what: str) -> None:
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(allowed)}"
            raise UsageError(f"{what} has no field {name!r}{hint}")


def load(path: str | Path, overrides: list[str] | None = None) -> Study:
    """A study of a YAML file, with `name=value` for fields of the study or of all its cells.

    Raises `UsageError` that names what is unknown or missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"study {str(path)!r} does not exist")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict) or not isinstance(values.get("cells"), list):
        raise UsageError(f"study {path}: expected 'kind' and a list 'cells'")
    for pair in overrides or []:
        name, separator, value = pair.partition("=")
        if not separator:
            raise UsageError(f"--set: {pair!r} is not of the form name=value")
        values[name] = yaml.safe_load(value)
        values["cells"] = [{n: x for n, x in c.items() if n != name} for c in values["cells"]]
    own = [f.name for f in fields(Study)]
    shared = [f.name for f in fields(Cell)]
    _known(values, own + shared, f"study {path}")
    if values.get("kind") not in KINDS:
        raise UsageError(f"study {path}: kind is {values.get('kind')!r}; one of {', '.join(KINDS)}")
    common = {n: x for n, x in values.items() if n in shared}
    cells = []
    for row in values.pop("cells"):
        _known(row, shared, f"study {path}: a cell")
        if not {"name", "model"} <= set(row):
            raise UsageError(f"study {path}: cell {row} needs a name and a model")
        cells.append(Cell(**(common | row)))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise UsageError(f"study {path}: names of cells occur twice: {names}")
    return Study(cells=cells, **{n: x for n, x in values.items() if n in own})


def told(study: Study, cell: Cell) -> dict[str, Any]:
    """All that a cell's result depends on."""
    rest = {n: x for n, x in asdict(study).items() if n not in ("cells", "kind")}
    return asdict(cell) | rest | {"long": study.kind == "long_context"}
