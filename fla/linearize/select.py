# SPDX-License-Identifier: MIT
"""Which layers stay softmax attention.

Swapping layers of the teacher for their linear ones moves what it predicts; by how much is the
divergence `KL(teacher | swapped)`, the mean of that over text and that over the answers of recall
prompts.

    kl_greedy    from the teacher on: swap the layer that moves it least, score again, and so on
    kl_replace   each layer swapped alone, scored once
    kl_restore   all swapped, each layer restored alone: what that takes away
    recall       each layer swapped alone: what it costs recall, less what it costs text
    mse          the relative error of the alignment
    uniform      evenly spaced      manual  as told

Scores only run models forward. Layers below a swap see nothing of it, so their outputs are computed
once per batch and step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fla.core.errors import UsageError
from fla.core.layout import SequenceLayout
from fla.data.probes import prompts
from fla.evals.recall import Batch, pack
from fla.layers.linearized import LinearizedAttention
from fla.linearize.config import Select
from fla.linearize.data import Text
from fla.linearize.files import read_json, write_json
from fla.modules.fused_linear_divergence import fused_linear_divergence
from fla.modules.losses import Head

CHARACTERS = 200  # in a recall prompt
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def layers_kept(keep: str, config: Any) -> int:
    """How many layers stay softmax: of a count, a share, or bytes of keys and values at a length.

    Example:
        >>> from fla.models import TransformerConfig
        >>> config = TransformerConfig(num_hidden_layers=8, hidden_size=64, num_heads=4)
        >>> layers_kept("0.25", config), layers_kept("3", config), layers_kept("1MiB@1024", config)
        (2, 3, 4)
    """
    n = config.num_hidden_layers
    text, at, length = keep.partition("@")
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if text.endswith(u)), "")
    try:
        number = float(text.removesuffix(unit))
    except ValueError:
        number = math.nan
    if not number >= 0 or bool(unit) != bool(at) or (at and not length.isdigit()):
        raise UsageError(
            f"select.keep is {keep!r}; expected a count ('7'), a share ('0.25'), or bytes of cache "
            "at a length ('64MiB@32768')"
        )
    if unit:
        heads = config.num_kv_heads or config.num_heads
        width = heads * (config.head_dim or config.hidden_size // config.num_heads)
        bytes_of_layer = 2 * 2 * width * int(length)  # keys and values, bf16
        count = int(number * UNITS[unit] // bytes_of_layer)
    else:
        count = round(number * n) if number < 1 else int(number)
    return min(count, n)


@dataclass
class _Base:
    """A batch, the input of every block under the swaps so far, and the teacher's last states."""

    layout: SequenceLayout
    mask: Tensor | None
    teacher: Tensor
    inputs: list[Tensor]


class Swaps:
    """The teacher with layers swapped, and how far that is from itself."""

    def __init__(self, teacher: Any, bank: dict[int, LinearizedAttention]):
        self.model, self.bank = teacher, bank
        self.softmax = {i: block.attn for i, block in enumerate(teacher.model.layers)}
        self.head = Head(teacher.lm_head.weight.detach())

    def put(self, layers: set[int]) -> None:
        """Make exactly these layers linear."""
        for i, block in enumerate(self.model.model.layers):
            block.attn = self.bank[i] if i in layers else self.softmax[i]

    def above(self, hidden: Tensor, first: int, layout: SequenceLayout) -> list[Tensor]:
        """Run the blocks from `first` on; returns their inputs and the last states."""
        inputs = [hidden]
        for block in self.model.model.layers[first:]:
            inputs.append(block(inputs[-1], layout)[0])
        inputs[-1] = self.model.model.norm(inputs[-1])
        return inputs

    def start(self, ids: Tensor, bounds: Tensor, mask: Tensor | None) -> _Base:
        device = self.model.device
        layout = SequenceLayout.resolve(1, ids.shape[1], cu_seqlens=bounds.to(device))
        inputs = self.above(self.model.model.embeddings(ids.to(device)), 0, layout)
        mask = None if mask is None else mask.to(device)
        return _Base(layout, mask, inputs[-1], inputs)

    def moved(self, base: _Base, layer: int, linear: set[int]) -> float:
        """The divergence when this layer is changed too."""
        self.put(linear)
        last = self.above(base.inputs[layer], layer, base.layout)[-1]
        teacher = (base.teacher, self.head)
        loss, _ = fused_linear_divergence(last, self.head, teacher, mask=base.mask)
        return float(loss)


@dataclass
class Scores:
    """What a selection found. `softmax` is None until it is finished; `rounds` holds, in order, the
    layers that became linear, with the scores all candidates had; `halves` scores of each layer on
    two halves of the text, `agreement` the correlation of their ranks, `gap` the distance of the
    scores on both sides of the cut.
    """

    method: str
    softmax: list[int] | None
    scores: dict[int, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    halves: list[dict[int, float]] = field(default_factory=list)
    agreement: float | None = None
    gap: float | None = None


def spearman(a: list[float], b: list[float]) -> float:
    """Spearman's correlation of ranks.

    Example:
        >>> round(spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0]), 6)
        0.5
    """
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    x, y = (r - r.mean() for r in ranks)
    return float((x @ y) / (x.norm() * y.norm()).clamp(min=1e-12))


def uniform_layers(count: int, keep: int) -> list[int]:
    """Evenly spaced softmax layers, as in published hybrids: the last of every n.

    Example:
        >>> uniform_layers(8, 2)
        [3, 7]
    """
    return sorted(round((i + 1) * count / keep) - 1 for i in range(keep))


class Selection:
    """The stage."""

    def __init__(
        self,
        teacher: Any,
        bank: dict[int, LinearizedAttention],
        text: Text,
        tokenizer: Any,
        options: Select,
        folder: Path,
    ):
        self.options, self.file, self.config = options, folder / "layer_scores.json", teacher.config
        self.count = len(bank)
        self.swaps = Swaps(teacher, bank)
        self.text, self.tokenizer = text, tokenizer
        self.keep = layers_kept(options.keep, teacher.config)
        if options.method == "manual":
            self.keep = len(options.layers)
        pinned = set(options.pin_full) & set(options.pin_linear)
        outside = {*options.pin_full, *options.pin_linear, *options.layers} - set(range(self.count))
        if pinned or outside:
            raise UsageError(
                f"select: layers {sorted(pinned or outside)} are "
                + ("pinned both ways" if pinned else f"outside 0..{self.count - 1}")
            )
        if len(options.pin_full) > self.keep or self.keep > self.count - len(options.pin_linear):
            raise UsageError(
                f"select: {self.keep} of {self.count} layers stay softmax, which pin_full="
                f"{options.pin_full} and pin_linear={options.pin_linear} do not allow"
            )
        self.free = [i for i in range(self.count) if i not in options.pin_full]

    def bases(self) -> tuple[list[_Base], list[_Base]]:
        """The starting points of the text and of the recall prompts."""
        text = [
            self.swaps.start(b["input_ids"], b["cu_seqlens"], None)
            for b in self.text.held_out_batches(self.options.tokens)
        ]
        half, count = self.options.retrieval // 2, self.options.retrieval
        wanted = prompts("multi", half, CHARACTERS, 1) + prompts(
            "mqar", count - half, CHARACTERS, 1
        )
        packs: list[Batch] = [
            pack(self.tokenizer, wanted[i : i + 8]) for i in range(0, len(wanted), 8)
        ]
        return text, [self.swaps.start(b.input_ids, b.cu_seqlens, b.asked) for b in packs]

    @torch.no_grad()
    def run(self, records: dict[int, float], progress: Callable[[int, int, str], None]) -> Scores:
        """`records` are the layers' errors of the alignment."""
        method = self.options.method
        if method == "manual":
            found = Scores(method, sorted(self.options.layers))
        elif method == "uniform":
            found = Scores(method, uniform_layers(self.count, self.keep))
        elif method == "mse":
            found = self.ranked(method, {i: records[i] for i in range(self.count)})
        elif method == "kl_greedy":
            found = self.greedy(progress)
        else:
            found = self.single(method, progress)
        write_json(self.file, vars(found))
        return found

    def ranked(self, method: str, scores: dict[int, float]) -> Scores:
        """The pinned layers, and then those with the highest scores, stay softmax."""
        pinned = self.options.pin_full
        free = [i for i in self.free if i not in self.options.pin_linear]
        order = sorted(free, key=lambda i: -scores[i])
        cut = self.keep - len(pinned)
        gap = scores[order[cut - 1]] - scores[order[cut]] if 0 < cut < len(order) else None
        return Scores(method, sorted([*pinned, *order[:cut]]), scores, gap=gap)

    def single(self, method: str, progress: Callable[[int, int, str], None]) -> Scores:
        text, recall = self.bases()
        everything = set(range(self.count))
        restore = method == "kl_restore"
        if restore:
            self.swaps.put(everything)
            for base in (*text, *recall):
                base.inputs = self.swaps.above(base.inputs[0], 0, base.layout)
        scores: dict[int, float] = {}
        halves: list[dict[int, float]] = [{}, {}]
        whole = self.costs(0, everything, text, recall) if restore else None
        for i in range(self.count):
            costs = self.costs(i, everything - {i} if restore else {i}, text, recall)
            if whole is not None:  # what restoring the layer takes away
                pairs = zip(whole, costs, strict=True)
                costs = [[w - c for w, c in zip(*pair, strict=True)] for pair in pairs]
            scores[i] = self.joint(costs, method)
            for half in (0, 1):
                halves[half][i] = self.joint([c[half::2] or c for c in costs], method)
            progress(i + 1, self.count, f"layer {i}: {scores[i]:.4f}")
        self.swaps.put(set())
        found = self.ranked(method, scores)
        found.halves = halves
        found.agreement = spearman(*([h[i] for i in range(self.count)] for h in halves))
        return found

    def costs(
        self, layer: int, linear: set[int], text: list[_Base], recall: list[_Base]
    ) -> list[list[float]]:
        return [[self.swaps.moved(b, layer, linear) for b in bases] for bases in (text, recall)]

    @staticmethod
    def joint(costs: list[list[float]], method: str) -> float:
        text, recall = (sum(c) / len(c) if c else 0.0 for c in costs)
        if method == "recall":
            return recall - text
        return (text + recall) / 2 if costs[1] else text

    def greedy(self, progress: Callable[[int, int, str], None]) -> Scores:
        """Swap the cheapest layer in each round. A finished round is saved and not run again."""
        saved = read_json(self.file) or {}
        rounds = _rounds(saved) if saved.get("method") == "kl_greedy" else []
        linear: set[int] = set()
        wanted = self.count - self.keep
        text, recall = self.bases()
        first = list(self.options.pin_linear)
        for number in range(wanted):
            if number < len(rounds):
                linear.add(rounds[number]["layer"])
                continue
            pending = [i for i in first if i not in linear]
            candidates = pending or [i for i in self.free if i not in linear]
            self.advance(linear, text, recall)
            costs = {i: self.costs(i, linear | {i}, text, recall) for i in candidates}
            scores = {i: self.joint(cost, "kl_greedy") for i, cost in costs.items()}
            best = min(scores, key=lambda i: scores[i])
            linear.add(best)
            rounds.append(dict(layer=best, score=scores[best], scores=scores))
            write_json(self.file, vars(Scores("kl_greedy", None, rounds=rounds)))
            progress(number + 1, wanted, f"layer {best} becomes linear: {scores[best]:.4f}")
        self.swaps.put(set())
        softmax = sorted(set(range(self.count)) - linear)
        last = rounds[-1]["scores"] if rounds else {}
        ordered = sorted(last.values())
        gap = ordered[1] - ordered[0] if len(ordered) > 1 else None
        alone = rounds[0]["scores"] if rounds else {}
        return Scores("kl_greedy", softmax, alone, rounds, gap=gap)

    def advance(self, linear: set[int], text: list[_Base], recall: list[_Base]) -> None:
        """Compute what every block reads under the swaps so far."""
        self.swaps.put(linear)
        for base in (*text, *recall):
            base.inputs = self.swaps.above(base.inputs[0], 0, base.layout)


def read_scores(folder: Path) -> Scores | None:
    """The scores of a finished selection, or None."""
    saved = read_json(folder / "layer_scores.json")
    if not saved or saved["softmax"] is None:
        return None
    saved["scores"] = _by_layer(saved["scores"])
    saved["halves"] = [_by_layer(x) for x in saved["halves"]]
    saved["rounds"] = _rounds(saved)
    return Scores(**saved)


def _by_layer(saved: dict[str, float]) -> dict[int, float]:
    return {int(i): x for i, x in saved.items()}


def _rounds(saved: dict[str, Any]) -> list[dict[str, Any]]:
    return [r | dict(scores=_by_layer(r["scores"])) for r in saved.get("rounds", [])]
