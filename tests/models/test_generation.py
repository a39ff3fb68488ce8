# SPDX-License-Identifier: MIT
"""`generate()` in its modes: with cache as without, in a left-padded batch as alone."""

import pytest
import torch

from tests.models.common import MODELS, ids, make

every_model = pytest.mark.parametrize("name", MODELS)
COMMON = dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None)


@every_model
@pytest.mark.parametrize(
    "mode",
    [
        dict(do_sample=False),
        dict(do_sample=True, top_k=5),
        dict(num_beams=3),
        dict(num_beams=2, do_sample=True),
    ],
    ids=str,
)
def test_cache_changes_nothing(name, mode):
    model, x = make(name), ids(2, 5)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(x, use_cache=use_cache, **mode, **COMMON))
    assert torch.equal(*results)


@every_model
@pytest.mark.parametrize("mode", [dict(do_sample=False), dict(num_beams=3)], ids=str)
def test_left_padding_changes_nothing(name, mode):
    model, x = make(name), ids(2, 5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
    mask = (padded != 0).long()
    padded[1, 1:3], mask[1, 1:3] = x[0, :2], 1
    out = model.generate(padded, attention_mask=mask, **mode, **COMMON)
    assert torch.equal(out[:1, 3:], model.generate(x[:1], **mode, **COMMON))
    assert torch.equal(out[1:, 1:], model.generate(padded[1:, 1:], **mode, **COMMON))


@every_model
def test_embeddings_as_prompt_and_several_sequences(name):
    model, x = make(name), ids(2, 5)
    want = model.generate(x, do_sample=False, **COMMON)
    embeds = model.get_input_embeddings()(x)
    assert torch.equal(model.generate(inputs_embeds=embeds, do_sample=False, **COMMON), want[:, 5:])
    many = model.generate(x, do_sample=True, num_return_sequences=3, **COMMON)
    assert many.shape == (6, 11)


def test_a_static_cache_is_refused():
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        make("gated_deltanet").generate(ids(1, 5), cache_implementation="static", **COMMON)
