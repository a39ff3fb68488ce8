# SPDX-License-Identifier: MIT
"""Recall probes: answers stand in their prompts, and scores are those of whoever knows them."""

import random
from types import SimpleNamespace

import pytest
import torch

from fla.data.corpus import load_corpus
from fla.data.probes import PROBES, prompts
from fla.data.tokens import load_tokenizer
from fla.evals.recall import pack, recall

TOKENIZER = load_tokenizer("byte")


@pytest.mark.parametrize("kind", PROBES)
def test_prompts(kind):
    found = prompts(kind, 20, 300)
    assert found == prompts(kind, 20, 300) != prompts(kind, 20, 300, seed=1)
    for prompt in found:
        assert prompt.answer in prompt.text and 150 < len(prompt.text) < 700
    if kind == "variable":  # follow the chain
        for prompt in found:
            values = dict(line.split(" = ") for line in prompt.text.splitlines()[:-1])
            name = prompt.text.splitlines()[-1][len("print(") :].partition(")")[0]
            while not name.isdigit():
                name = values[name]
            assert name == prompt.answer


class Knows(torch.nn.Module):
    """Looks the answer up, or gets its last token wrong for some prompts."""

    device = torch.device("cpu")

    def __init__(self, wrong=0):
        super().__init__()
        self.rng, self.wrong = random.Random(0), wrong

    def forward(self, ids, cu_seqlens, use_cache):
        logits = torch.zeros(*ids.shape, 259)
        logits[0, torch.arange(ids.shape[1] - 1), ids[0, 1:]] = 20.0
        for end in cu_seqlens[1:].tolist()[: self.wrong]:
            logits[0, end - 2] = 0
            logits[0, end - 2, 5] = 20.0
        return SimpleNamespace(logits=logits)


def test_scores():
    assert recall(Knows(), TOKENIZER, "multi", 16, 200).exact == 1.0
    assert recall(Knows(), TOKENIZER, "multi", 16, 200).nats < 1e-5
    partly = recall(Knows(wrong=2), TOKENIZER, "multi", 16, 200)  # two of every eight
    assert partly.exact == 0.75 and partly.nats == pytest.approx(20 / 16, rel=0.01)
    with pytest.raises(ValueError, match="probe is 'hay'; expected one of single, multi"):
        prompts("hay", 1, 10)


def test_what_is_asked_are_the_answers_tokens():
    wanted = prompts("single", 3, 100)
    batch = pack(TOKENIZER, wanted)
    ids = batch.input_ids[0]
    answers = ids[batch.asked[0].nonzero().flatten() + 1]
    assert TOKENIZER.decode(answers) == "".join(p.answer for p in wanted)
    assert batch.cu_seqlens[-1] == len(ids)


def test_recall_as_a_corpus():
    corpus = load_corpus("recall")
    assert (
        3e6 < sum(map(len, corpus.train)) < 4e6
        and 0 < len(corpus.held_out) < len(corpus.train) / 10
    )
