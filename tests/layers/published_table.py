# SPDX-License-Identifier: MIT
"""How our layers and configs compare with the published ones of `published_layers.py`, and the tables of it in
docs/published-layers.md: `python -m tests.layers.published_table` writes them.
"""

import inspect
import re
from pathlib import Path

from transformers import AutoConfig

import fla.layers
import fla.models
from tests.layers.published_layers import COMMON, CONFIGS, DEFAULTS, LAYERS, MODELS, NOTES

PAGE = Path(__file__).parents[2] / "docs" / "published-layers.md"


def parse(arguments: str) -> dict[str, inspect.Parameter]:
    """Parameters of a signature that is written as in a `def`."""
    space: dict = {"inf": float("inf")}
    exec(f"def published({arguments}): ...", space)
    return dict(inspect.signature(space["published"]).parameters)


def same(ours: object, published: object) -> bool:
    """Equal, a tuple as a list and within dictionaries too."""
    if isinstance(published, dict) and isinstance(ours, dict):
        return ours.keys() == published.keys() and all(same(ours[k], published[k]) for k in ours)
    if isinstance(published, tuple) and isinstance(ours, tuple | list):
        return len(ours) == len(published) and all(map(same, ours, published))
    return ours == published


def layer_differences(name: str) -> list[str]:
    """Arguments of a published layer that ours lacks, or has elsewhere or with another default."""
    mine = inspect.signature(getattr(fla.layers, name)).parameters
    places, said = list(mine), []
    for place, (argument, published) in enumerate(parse(LAYERS[name]).items()):
        if argument not in mine:
            said.append(f"no {argument}")
        elif places[place] != argument:
            said.append(f"{argument} is elsewhere")
        elif published.default is not inspect.Parameter.empty and not same(
            mine[argument].default, published.default
        ):
            said.append(f"{argument}={mine[argument].default!r}")
    return said


def published_fields(kind: str) -> dict[str, object]:
    """Fields of a published config with their defaults."""
    own, lacks = CONFIGS[kind]
    fields = {name: p.default for name, p in parse(COMMON).items() if name not in lacks.split()}
    return fields | {name: p.default for name, p in parse(own).items()}


def default_config(kind: str):
    """Our config with nothing given but what has no default."""
    options = {"ska_attn": {"num_heads": 8}} if kind == "rodimus" else {}
    return AutoConfig.for_model(kind, **options)


def config_differences(kind: str) -> dict[str, str]:
    """Fields of a published config that ours does not take, or has with another default."""
    config, said = default_config(kind), {}
    for name, published in published_fields(kind).items():
        if kind == "rodimus" and name == "ska_attn":
            continue  # it must be given
        if name in config.unused or name in config.attribute_map:
            continue
        name = name.replace("exapnd", "expand")  # the constructor's spelling of what is kept
        if not hasattr(config, name):
            said[name] = f"no {name}"
        elif not same(getattr(config, name), published):
            said[name] = f"{name}={getattr(config, name)!r}"
    return said


def layer_table() -> str:
    """One line per layer."""
    rows = [
        "| layer | constructor | gate | norm, eps | differs | test |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(LAYERS, key=str.lower):
        gate, norm, differs, test = NOTES[name]
        total = len(parse(LAYERS[name]))
        kept = total - len(layer_differences(name))
        held = f"`{test}`" if test else "-"
        rows.append(
            f"| `{name}` | {kept} of {total} | {gate} | {norm} | {differs or '-'} | {held} |"
        )
    return "\n".join(rows)


def model_table() -> str:
    """One line per model."""
    rows = ["| model | config defaults | taken and not used | differs |", "|---|---|---|---|"]
    for kind in sorted(CONFIGS):
        total, said = len(published_fields(kind)), config_differences(kind)
        unused = [f"`{n}`" for n in published_fields(kind) if n in default_config(kind).unused]
        reasons = [f"`{n}`: {DEFAULTS[kind, n]}" for n in said if (kind, n) in DEFAULTS]
        reasons += [MODELS[kind]] if kind in MODELS else []
        text = "; ".join(reasons) or "-"
        rows.append(
            f"| `{kind}` | {total - len(said)} of {total} | {', '.join(unused) or '-'} | {text} |"
        )
    return "\n".join(rows)


TABLES = {"layers": layer_table, "models": model_table}


def main() -> None:
    text = PAGE.read_text()
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        text = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: begin + make() + end, text, flags=re.S  # noqa: B023
        )  # fmt: skip
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
