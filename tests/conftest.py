# SPDX-License-Identifier: MIT
"""Every test runs with uninitialised memory poisoned: a buffer that is read before it is written
shows as NaN."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_interpreter(monkeypatch):
    """Triton's interpreter is off, whatever the environment says."""
    from fla.core.stage import forget_choices  # after the environment above is set

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
