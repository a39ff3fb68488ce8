# SPDX-License-Identifier: MIT
"""Every task's answers against a reader of its rows; training, trials, and resuming."""

import json
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fla.core.errors import UsageError
from fla.tasks import TASKS, Recipe, score_task, small_config, task_of, train_task
from fla.tasks.models import FIELDS
from fla.tasks.rows import BLANK, FIRST, IGNORE, MARK, SEPARATOR
from tests.processes import kill_once, run, start

QUICK = Recipe(
    hidden_size=32, layers=1, head_dim=16, steps=6, batch_size=4, trials=8, trial_lengths=[12]
)


def read(name, x):
    """The answers to a row `x`, by position, as one would find them by reading it."""
    found = {}
    if name in ("copy", "reverse", "sorting"):
        n = x.index(SEPARATOR)
        y = {"copy": x[:n], "reverse": x[:n][::-1], "sorting": sorted(x[:n])}[name]
        found = {n + i: token for i, token in enumerate(y)}
    elif name == "selective_copy":
        n = x.index(SEPARATOR)
        symbols = [token for token in x[:n] if token != BLANK]
        found = {n + i: token for i, token in enumerate(symbols)}
    elif name == "induction":
        found = {len(x) - 1: x[x.index(MARK) + 1]}
    elif name in ("mqar", "overwrite"):
        pairs = len(x) // 3 if name == "mqar" else 2 * (len(x) // 5)
        table = dict(zip(x[0 : 2 * pairs : 2], x[1 : 2 * pairs : 2], strict=True))
        found = {i: table[x[i]] for i in range(2 * pairs, len(x))}
    elif name in ("single_needle", "multi_needle"):
        count = 1 if name == "single_needle" else min(4, len(x) // 5)
        body = x[: len(x) - 2 * count]
        marks = [i for i, token in enumerate(body) if token == MARK]
        table = {body[i + 1]: body[i + 2] for i in marks}
        assert len(marks) == count
        found = {i: table[x[i]] for i in range(len(body) + 1, len(x), 2)}
    elif name == "variables":
        told = x.index(MARK)
        value = {}
        for i in range(0, told, 2):
            value[x[i]] = value.get(x[i + 1], x[i + 1])
        found = {i: value[x[i]] for i in range(told + 1, len(x), 2)}
    elif name == "s5":
        elements, state = list(permutations(range(5))), (0, 1, 2, 3, 4)
        for i, token in enumerate(x):
            state = tuple(elements[token - FIRST][j] for j in state)
            found[i] = FIRST + elements.index(state)
    else:
        total, modulus = 0, {"parity": 2, "modular_addition": 7}[name]
        for i, token in enumerate(x):
            total += token - FIRST
            found[i] = FIRST + total % modulus
    return found


@given(name=st.sampled_from(sorted(TASKS)), length=st.integers(8, 128), seed=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_answers_are_what_a_reader_finds(name, length, seed):
    task = task_of(name)
    inputs, labels = task.rows(3, length, seed)
    assert inputs.shape == labels.shape and length - 9 <= inputs.shape[1] - 1 <= length
    assert inputs.min() >= 0 and inputs.max() < task.vocabulary
    for row, answers in zip(inputs[:, :-1].tolist(), labels[:, 1:].tolist(), strict=True):
        asked = {i: answer for i, answer in enumerate(answers) if answer != IGNORE}
        assert asked == read(name, row) and asked
        assert len(set(asked.values())) <= task.answers
    again = task.rows(3, length, seed)
    assert inputs.equal(again.input_ids) and labels.equal(again.labels)
    if length > 20:
        assert not inputs.equal(task.rows(3, length, seed + 1).input_ids)


def test_the_reader_would_find_a_wrong_answer():
    inputs, labels = task_of("mqar").rows(1, 24, 0)
    wrong = dict(read("mqar", inputs[0, :-1].tolist()))
    wrong[max(wrong)] += 1
    asked = {i: a for i, a in enumerate(labels[0, 1:].tolist()) if a != IGNORE}
    assert asked != wrong


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_architecture_can_be_compared(name):
    config = small_config(name, 64, 2, 40, head_dim=16)
    assert config.vocab_size == 40 and config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: task_of("mqra"), "'mqra' is not known; did you mean 'mqar'"),
        (lambda: task_of("mqar").rows(1, 1000, 0), "length is 1000, but there are names for 384"),
        (lambda: task_of("copy").rows(1, 3, 0), "at least 8 was expected"),
        (lambda: small_config("gated_deltnet", 64, 2, 9), "did you mean 'gated_deltanet'"),
        (lambda: small_config("gla", 60, 2, 9), "not a multiple of head_dim=32"),
        (lambda: small_config("gla:expand_q=2", 64, 2, 9), "has no field 'expand_q'"),
    ],
)
def test_wrong_names_and_sizes_are_refused(call, message):
    with pytest.raises((ValueError, UsageError), match=message):
        call()


def test_a_model_with_too_few_tokens_is_refused():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(small_config("gla", 32, 1, 20, head_dim=16))
    with pytest.raises(ValueError, match="needs 164 tokens, and the model has 20"):
        score_task(model, "mqar", [24])


def test_attention_for_fewer_positions_is_refused():
    from transformers import AutoModelForCausalLM

    few = dict(head_dim=16, max_position_embeddings=20)
    for name, refused in (("transformer", True), ("gla", False)):
        model = AutoModelForCausalLM.from_config(small_config(name, 32, 1, 6, **few))
        if refused:
            with pytest.raises(ValueError, match="configured for max_position_embeddings=20"):
                score_task(model, "parity", [16, 24], trials=2)
        else:
            score_task(model, "parity", [16, 24], trials=2)


def test_guessing_scores_as_guessing_and_learning_is_seen(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config("delta_net", 32, 1, 6, head_dim=16))
    guess = score_task(model, "parity", [16], trials=64)
    assert guess.answers[16] < 0.7 and guess.exact[16] < 0.1
    recipe = Recipe(
        hidden_size=32, layers=1, head_dim=16, steps=300, batch_size=32, learning_rate=1e-2,
        length=12, trial_lengths=[12], trials=64,
    )  # fmt: skip
    learnt = train_task("parity", "delta_net:allow_neg_eigval=true", recipe, tmp_path / "run")
    assert learnt.answers[12] > 0.95


def test_finished_cells_are_kept_and_other_recipes_refused(tmp_path):
    first = train_task("parity", "gla", QUICK, tmp_path)
    results = tmp_path / "results.json"
    when = results.stat().st_mtime_ns
    assert train_task("parity", "gla", QUICK, tmp_path) == first
    assert results.stat().st_mtime_ns == when
    with pytest.raises(UsageError, match="another recipe's results"):
        train_task("parity", "gla", Recipe(**vars(QUICK) | dict(seed=1)), tmp_path)


COMMAND = [
    "-m", "fla.cli", "task", "parity,copy", "--model", "gla,transformer",
    "--hidden_size", "32", "--layers", "1", "--head_dim", "16", "--batch_size", "4",
    "--trials", "8", "--trial_lengths", "12", "24", "--output_dir",
]  # fmt: skip


def test_the_command_ends_with_a_table_and_a_picture(tmp_path):
    run(*COMMAND, tmp_path, "--steps", "5", check=True)
    text = (tmp_path / "results.md").read_text()
    assert "| transformer |" in text and "24 tokens" in text
    assert (tmp_path / "results.png").stat().st_size > 5000
    cell = tmp_path / "copy" / "gla"
    scores = json.loads((cell / "results.json").read_text())["scores"]
    options = ("--checkpoint", cell, "--trial_lengths", "12", "--trials", "8")
    again = run(*COMMAND[:3], "copy", *options, check=True)
    assert f"({scores['answers']['12']:.0%})" in again.stdout
    wrong = run(*COMMAND[:3], "coppy")
    assert wrong.returncode == 2 and "did you mean 'copy'" in wrong.stderr


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path):
    options = ["--steps", "60"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*COMMAND, whole, *options, check=True)
    kill_once(start(*COMMAND, killed, *options), lambda: list(killed.glob("*/*/checkpoint-30")))
    run(*COMMAND, killed, *options, check=True)
    for task in ("parity", "copy"):
        for model in ("gla", "transformer"):
            read = [
                json.loads((folder / task / model / "results.json").read_text())["scores"]
                for folder in (whole, killed)
            ]
            assert read[0] == read[1], (task, model)
