# SPDX-License-Identifier: MIT
"""Calibration, alignment, selection, and a teacher's tokens on disk, each on its own."""

import json
import math

import pytest
import torch

from fla.core.errors import UsageError
from fla.layers.linearized_rules import RULES
from fla.linearize import align, calibrate, select
from fla.linearize.align import Alignment, errors, layer_loss, visit
from fla.linearize.config import LOSSES, METHODS
from fla.linearize.data import on
from fla.linearize.distill import collate_with_places
from fla.linearize.select import Selection, Swaps, layers_kept, read_scores, spearman
from fla.linearize.surgery import attention_of, make_linear
from fla.linearize.teacher import TopTokens
from fla.models import TransformerConfig
from fla.modules.fused_linear_divergence import fused_linear_divergence
from fla.modules.losses import Head
from tests.linearize.common import make_all


def quiet(*_):
    pass


def never():
    return False


def state_of(bank):
    return {(i, n): x.clone() for i, layer in bank.items() for n, x in layer.state_dict().items()}


def align_bank(stage, bank, stop=never):
    stage.run(bank, quiet, stop)
    return state_of(bank)


def make_stage(parts, folder):
    teacher, text, config, _ = parts
    steps = config.steps(config.align.tokens)
    return Alignment(teacher, text, config.align, steps, folder / "align")


def test_batches_are_the_same_by_number(tmp_path):
    _, text, config, _ = make_all(tmp_path)
    again = type(text)(config.data, text.tokenizer)
    for step in (0, 5, 500):
        assert torch.equal(text.batch(step)["input_ids"], again.batch(step)["input_ids"])
    epoch = len(text.blocks)
    assert sorted(text.index(i) for i in range(epoch)) == list(range(epoch))
    assert [text.index(i) for i in range(epoch)] != [text.index(epoch + i) for i in range(epoch)]


def test_statistics_are_those_of_the_attention(tmp_path):
    """Heads that look k tokens back, evenly over a window, or at the first token alone."""
    T = 40
    a = torch.zeros(3, T, T)
    for t in range(T):
        a[0, t, max(0, t - 3)] = 1
        a[1, t, max(0, t - 7) : t + 1] = 1 / min(t + 1, 8)
        a[2, t, 0] = 0.9
        a[2, t, t] += 0.1
    teacher, *_ = make_all(tmp_path)
    watch = calibrate._Watch(attention_of(teacher, 0))
    watch.back, watch.back_all, watch.focus = torch.zeros(3, 3).unbind()
    watch.add(a)
    for hook in watch.hooks:
        hook.remove()
    watch.tokens, watch.squares = 1, torch.ones(3, 2)
    found = watch.means()
    assert abs(found.look_back[0] - 3) < 0.3 and abs(found.look_back[1] - 3.3) < 0.5
    assert (
        found.look_back[2] < 0.1 < 10 < found.look_back_all[2]
    )  # what the first token draws is left out
    assert found.focus[0] == 1 and found.focus[1] < 0.5


@pytest.mark.parametrize("rule", RULES)
def test_half_lives_are_what_was_asked_for(rule, tmp_path):
    layer = make_linear(make_all(tmp_path)[0], 0, dict(rule=rule, slots=7))
    layer.rule.calibrate(torch.tensor([4.0, 40.0]), torch.tensor([0.4, 0.6]))
    x = torch.randn(1, 3, 16)
    if hasattr(layer.rule, "decay") and rule != "retnet":
        g = layer.rule.decay(x)[0]
        kept = g.exp() ** (
            torch.tensor([4.0, 40.0])[:, None] if g.dim() == 4 else torch.tensor([4.0, 40.0])
        )
        assert torch.allclose(kept, torch.full_like(kept, 0.5), atol=1e-3)
    if layer.rule.rates:
        assert torch.allclose(layer.rule.beta(x)[0, 0], torch.tensor([0.4, 0.6]), atol=1e-4)


@pytest.mark.parametrize(
    "linear", [dict(), dict(gate=None, out_norm=False), dict(rule="gla", window=4)], ids=str
)
def test_calibration_brings_layers_closer(linear, tmp_path):
    """And the scale of what they give to the teacher's."""
    teacher, text, _, bank = make_all(tmp_path, linear=linear)
    batches = [text.batch(0), text.batch(1)]
    before = errors(teacher, bank, batches)
    found = calibrate.calibrate(teacher, bank, batches)
    after = errors(teacher, bank, batches)
    assert set(found) == {0, 1, 2} and all(0 < s.look_back.mean() < 32 for s in found.values())
    assert sum(after.values()) < sum(before.values())
    sizes = {}

    def see(layer, x, y, layout):
        sizes[layer] = (
            bank[layer](x, layout=layout)[0].square().mean().sqrt() / y.square().mean().sqrt()
        )

    visit(teacher, [0, 1, 2], text.batch(0), see)
    if linear.get("out_norm", True):  # else least squares, which shrinks what it cannot match
        assert all(0.4 < ratio < 2.5 for ratio in sizes.values())


@pytest.mark.parametrize("kind", LOSSES)
def test_losses(kind):
    a, b = torch.randn(2, 5, 8)
    literal = dict(
        l2=(a - b).norm(dim=-1).mean() / math.sqrt(8),
        mse=((a - b) ** 2).mean(),
        rel_mse=((a - b) ** 2).sum() / (b**2).sum(),
        cosine=1 - ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean(),
    )
    assert torch.allclose(layer_loss(kind, a, b), literal[kind])
    assert layer_loss(kind, b, b).abs() < 1e-6


@pytest.mark.parametrize("at_once", [0, 1])
def test_alignment_reduces_every_error_and_goes_on_where_it_stopped(at_once, tmp_path):
    """Stopped in the middle it ends with the bits of an uninterrupted run, layers together or one by one."""
    parts = make_all(tmp_path, align=dict(layers_at_once=at_once))
    whole = align_bank(make_stage(parts, tmp_path / "a"), parts[3])
    records = align.records(tmp_path / "a/align")
    assert all(r.error < 0.8 * r.checks[0][1] and r.stopped is None for r in records.values())
    again = make_all(tmp_path, align=dict(layers_at_once=at_once))[3]
    asked = iter([False] * 30 + [True] * 5)
    stage = make_stage(parts, tmp_path / "b")
    align_bank(stage, again, lambda: next(asked, True))
    assert len(align.records(tmp_path / "b/align")) < 3 and list(
        (tmp_path / "b/align").glob("progress_*")
    )
    fresh = make_all(tmp_path, align=dict(layers_at_once=at_once))[3]
    rest = align_bank(make_stage(parts, tmp_path / "b"), fresh)
    assert all(torch.equal(x, rest[n]) for n, x in whole.items())
    assert not list((tmp_path / "b/align").glob("progress_*"))


def test_layers_do_not_touch_each_other(tmp_path):
    """A layer aligned alone gets the weights it gets among others, so layers can be split over processes."""
    parts = make_all(tmp_path)
    whole = align_bank(make_stage(parts, tmp_path / "a"), parts[3])
    other = make_all(tmp_path)[3]
    alone = align_bank(make_stage(parts, tmp_path / "b"), {1: other[1]})
    assert all(torch.equal(x, whole[n]) for n, x in alone.items())
    assert list(align.records(tmp_path / "b/align")) == [1]


def test_a_layer_that_is_no_number_stops_alone(tmp_path):
    parts = make_all(tmp_path)
    stage = make_stage(parts, tmp_path)
    bank = parts[3]
    calls = iter(range(10**6))
    bank[1].register_forward_hook(
        lambda m, a, y: (y[0] * math.nan, *y[1:]) if m.training and next(calls) == 20 else None
    )
    align_bank(stage, bank)
    records = align.records(tmp_path / "align")
    assert "not a number at step" in records[1].stopped
    assert records[0].stopped is None and records[2].error < records[2].checks[0][1]
    assert all(x.isfinite().all() for x in bank[1].state_dict().values())


def test_a_plateau_ends_a_layer(tmp_path):
    parts = make_all(tmp_path, align=dict(lr=0.0, lr_copied=0.0, patience=1, check=4))
    stage = make_stage(parts, tmp_path)
    align_bank(stage, parts[3])
    records = align.records(tmp_path / "align")
    assert {r.stopped for r in records.values()} == {"no progress since 1 checks"}
    assert len(records[0].checks) == 2  # of seven


def selection(parts, folder, **options):
    teacher, text, config, bank = parts
    for name, value in options.items():
        setattr(config.select, name, value)
    return Selection(teacher, bank, text, text.tokenizer, config.select, folder)


def planted(parts, layer):
    """A bank of perfect layers but for one: the teacher's own attention stands in for the others."""
    teacher, _, _, bank = parts
    for i in bank:
        if i != layer:
            bank[i] = attention_of(teacher, i)
    return parts


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("manual", "uniform", "mse")])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_that_matters_stays(method, layer, tmp_path):
    parts = planted(make_all(tmp_path), layer)
    records = dict.fromkeys(range(3), 0.1)
    method_options = dict(method=method, retrieval=0 if method != "recall" else 4)
    found = selection(parts, tmp_path, **method_options).run(records, quiet)
    if method != "recall":  # which weighs text against recall
        assert found.softmax == [layer]
        assert max(found.scores, key=found.scores.get) == layer and found.scores[layer] > 1e-4
    assert read_scores(tmp_path) == found
    assert len(found.softmax) == 1


def test_other_ways_to_select(tmp_path):
    parts = make_all(tmp_path)
    run = lambda **o: selection(parts, tmp_path, **o).run({0: 0.3, 1: 0.9, 2: 0.1}, quiet).softmax  # noqa: E731
    assert run(method="mse") == [1]
    assert run(method="uniform", keep="1") == [2]
    assert run(method="manual", layers=[0, 2]) == [0, 2]
    assert run(method="mse", keep="2", pin_full=[2]) == [1, 2]
    assert run(method="mse", keep="1", pin_full=[], pin_linear=[1]) == [0]
    greedy = selection(parts, tmp_path, method="kl_greedy", keep="1", pin_linear=[0]).run({}, quiet)
    assert greedy.rounds[0]["layer"] == 0 and 0 not in greedy.softmax
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


def test_the_teacher_is_whole_after_a_selection(tmp_path):
    parts = make_all(tmp_path)
    teacher, text, _, _ = parts
    before = [attention_of(teacher, i) for i in range(3)]
    ids = text.batch(0)["input_ids"]
    want = teacher(ids).logits
    selection(parts, tmp_path).run({}, quiet)
    assert [attention_of(teacher, i) for i in range(3)] == before
    assert torch.equal(teacher(ids).logits, want)


def test_greedy_goes_on_with_its_rounds(tmp_path, monkeypatch):
    parts = make_all(tmp_path)
    whole = selection(parts, tmp_path).run({}, quiet)
    rounds = json.loads((tmp_path / "layer_scores.json").read_text())["rounds"]
    half = dict(method="kl_greedy", softmax=None, rounds=rounds[:1])
    (tmp_path / "layer_scores.json").write_text(json.dumps(half))
    scored = []
    moved = Swaps.moved
    monkeypatch.setattr(
        Swaps, "moved", lambda self, b, i, s: scored.append(set(s)) or moved(self, b, i, s)
    )
    again = selection(parts, tmp_path).run({}, quiet)
    assert again.softmax == whole.softmax and {len(s) for s in scored} == {2}  # round 2 alone


def test_scores_are_the_divergence_of_the_swapped_model(tmp_path):
    """Prefix reuse changes nothing."""
    teacher, text, config, _ = parts = make_all(tmp_path)
    stage = selection(parts, tmp_path, retrieval=0)
    (base, *_), _ = stage.bases()
    with torch.no_grad():
        got = stage.swaps.moved(base, 2, {0, 2})
        stage.advance({0}, [base], [])
        reused = stage.swaps.moved(base, 2, {0, 2})
        batch = on(teacher.device, text.held_out_batches(config.select.tokens)[0])
        call = dict(input_ids=batch["input_ids"], cu_seqlens=batch["cu_seqlens"], use_cache=False)
        stage.swaps.put({0, 2})
        swapped = teacher.model(**call).last_hidden_state
        stage.swaps.put(set())
        head = Head(teacher.lm_head.weight)
        want, _ = fused_linear_divergence(
            swapped, head, (teacher.model(**call).last_hidden_state, head)
        )
        stage.swaps.put({2})
    assert reused == pytest.approx(float(want), rel=1e-5) and got != pytest.approx(
        float(want), rel=1e-3
    )
    assert select.CHARACTERS


@pytest.mark.parametrize(
    ("keep", "layers"),
    [("0", 0), ("2", 2), ("0.25", 2), (0.5, 4), ("99", 8), ("1MiB@1024", 4), ("1023KiB@1024", 3)],
)
def test_budgets(keep, layers):
    config = TransformerConfig(num_hidden_layers=8, hidden_size=64, num_heads=4)
    assert layers_kept(str(keep), config) == layers


@pytest.mark.parametrize("keep", ["some", "-1", "64MiB", "2@100", "1MiB@x"])
def test_budgets_that_say_nothing(keep):
    with pytest.raises(UsageError, match="keep is"):
        layers_kept(keep, TransformerConfig(num_hidden_layers=8, hidden_size=64, num_heads=4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(pin_full=[0], pin_linear=[0]), r"\[0\] are pinned both ways"),
        (dict(pin_full=[3]), r"\[3\] are outside 0..2"),
        (dict(pin_full=[0, 1]), "1 of 3 layers stay softmax, which pin_full"),
        (dict(method="manual", layers=[7]), r"\[7\] are outside"),
    ],
)
def test_pins_that_cannot_be(options, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        selection(make_all(tmp_path), tmp_path, **options)


def test_a_teachers_tokens_on_disk(tmp_path):
    """What was stored is what the teacher says; another teacher's or text's is refused."""
    teacher, text, _, _ = make_all(tmp_path)
    top = TopTokens(tmp_path / "top", teacher, text.tokenizer, text, 5)
    blocks = [text.blocks[i] | {"place": i} for i in (3, 1)]
    batch = collate_with_places(blocks)
    first = top.of(batch)
    with torch.no_grad():
        z = teacher(batch["input_ids"], cu_seqlens=batch["cu_seqlens"], use_cache=False).logits
    want, ids = z.log_softmax(-1).topk(5)
    assert torch.equal(first.ids, ids) and (first.log_probs - want).abs().max() < 0.01
    again = TopTokens(tmp_path / "top", teacher, text.tokenizer, text, 5)
    again.fill = None  # must not run
    assert torch.equal(again.of(batch).ids, ids)
    with pytest.raises(UsageError, match="tokens of another k; remove it"):
        TopTokens(tmp_path / "top", teacher, text.tokenizer, text, 4)
    with torch.no_grad():
        teacher.lm_head.weight.add_(1e-3)
    with pytest.raises(UsageError, match="tokens of another teacher"):
        TopTokens(tmp_path / "top", teacher, text.tokenizer, text, 5)
    with pytest.raises(UsageError, match="top_k is 1000, but the teacher has 259"):
        TopTokens(tmp_path / "else", teacher, text.tokenizer, text, 1000)


def test_a_teacher_in_bf16(tmp_path):
    """Layers learn in fp32, and are scored in the teacher's dtype."""
    parts = make_all(tmp_path)
    teacher, text, config, bank = parts
    teacher.to(torch.bfloat16)
    calibrate.calibrate(teacher, bank, [text.batch(0)])
    align_bank(make_stage(parts, tmp_path), bank)
    assert all(p.dtype == torch.float32 for layer in bank.values() for p in layer.parameters())
    bank = {i: layer.to(torch.bfloat16) for i, layer in bank.items()}
    found = selection((teacher, text, config, bank), tmp_path).run({}, quiet)
    assert len(found.softmax) == 1 and all(x >= 0 for x in found.scores.values())
