# SPDX-License-Identifier: MIT
"""Sequence parallelism on two and four processes: `worker.py` holds the checks."""

import json
import socket
import subprocess
import sys

import pytest

import fla.distributed as D


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one_process(size, tmp_path):
    command = [sys.executable, "-m", "tests.distributed.worker"]
    port = str(free_port())
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), port, str(tmp_path)])
        for rank in range(size)
    ]
    for process in ranks:
        process.wait(timeout=300)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    wrong = {name: [x.get(name) for x in found if x.get(name)] for name in found[0]}
    wrong = {name: said for name, said in wrong.items() if said}
    assert not wrong, "\n".join(f"{name}: {said[0]}" for name, said in wrong.items())
    assert len(found[0]) > 50


def test_without_processes_it_says_what_to_do():
    with (
        pytest.raises(ValueError, match="not initialised; launch with torchrun"),
        D.sequence_parallel(),
    ):
        pass
