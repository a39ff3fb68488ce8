# SPDX-License-Identifier: MIT
"""Scores against a direct computation, window by window."""

import math

import torch
import torch.nn.functional as F

from fla.evals.perplexity import score, windows
from tests.models.common import ids, make


def test_every_token_is_scored_once_on_its_own_window():
    model = make("gated_deltanet")
    documents = [ids(1, n)[0] for n in (1, 2, 9, 25)]
    result = score(model, documents, text_bytes=33, length=8, tokens_per_batch=20, bucket=4)
    nats = count = 0
    with torch.no_grad():
        for row in documents:
            for begin in range(0, len(row) - 1, 8):
                window = row[begin : begin + 9]
                logits = model(window[None, :-1], use_cache=False).logits[0]
                nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
                count += len(window) - 1
    assert result.tokens == count == sum(len(d) - 1 for d in documents)
    assert abs(result.nats - nats) < 1e-3
    assert abs(result.bits_per_byte - nats / math.log(2) / 33) < 1e-5
    assert abs(result.perplexity - math.exp(nats / count)) < 1e-3
    assert sum(n for _, n in result.buckets.values()) == count
    assert list(result.by_position()) == [0, 4]
    total = sum(nats for nats, _ in result.buckets.values())
    assert abs(total - result.nats) < 1e-3


def test_batches_change_nothing_and_progress_is_told():
    model, told = make("transformer"), []
    documents = [ids(1, n)[0] for n in (5, 30, 12)]
    a = score(model, documents, 44, length=8, tokens_per_batch=10, progress=told.append)
    b = score(model, documents, 44, length=8, tokens_per_batch=10_000)
    assert abs(a.nats - b.nats) < 1e-3 and told[-1] == a.tokens == 44


def test_windows_of_nothing():
    assert windows([torch.tensor([1])], 4) == [] and math.isnan(
        score(make("transformer"), [], 0).perplexity
    )
