# SPDX-License-Identifier: MIT
"""Sequence parallelism on two and four processes: `worker.py` holds the checks."""

import json

import pytest

import fla.distributed as D
from tests.helpers import matrix
from tests.processes import run_ranks, start_ranks


@pytest.mark.parametrize(
    ("size", "models"),
    matrix([(2, "few"), (2, "all"), (4, "few")], lambda *case: case == (2, "few")),
)
def test_ranks_agree_with_one_process(size, models, tmp_path):
    ranks = start_ranks(size, "-m", "tests.distributed.worker", tmp_path, models)
    said = [process.communicate(timeout=300) for process in ranks]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    wrong = {name: [x.get(name) for x in found if x.get(name)] for name in found[0]}
    wrong = {name: said for name, said in wrong.items() if said}
    assert not wrong, "\n".join(f"{name}: {said[0]}" for name, said in wrong.items())
    assert len(found[0]) > 50 and [process.returncode for process in ranks] == [0] * size, said


def test_without_processes_it_says_what_to_do():
    with (
        pytest.raises(ValueError, match="not initialised; launch with torchrun"),
        D.sequence_parallel(),
    ):
        pass


DYING = """
import os, torch, torch.distributed as dist
from datetime import timedelta
from fla.distributed import sequence_parallel
from fla.ops.delta_rule import chunk_delta_rule
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
q, k, v = torch.randn(3, 1, 8, 2, 4)
with sequence_parallel(lengths=[8, 8]):
    chunk_delta_rule(q, k, v, torch.ones(1, 8, 2))
    if dist.get_rank() == 0:
        os._exit(7)
    chunk_delta_rule(q, k, v, torch.ones(1, 8, 2))
"""


def test_a_rank_that_dies_ends_the_others():
    ranks = start_ranks(2, "-c", DYING)
    _, said = ranks[1].communicate(timeout=100)
    assert ranks[0].wait(timeout=10) == 7
    assert ranks[1].returncode not in (0, None) and "gloo" in said


def test_the_example_runs_on_two_processes():
    said, _ = run_ranks(2, "examples/sequence_parallel.py")
    lines = [line for line in said.splitlines() if "2049 of 4097 tokens here" in line]
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_shards_of_what_does_not_divide():
    assert D.context.split_evenly(10, 4) == [3, 3, 2, 2]
