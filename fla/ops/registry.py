# SPDX-License-Identifier: MIT
"""OPS: the one list that tests, benchmarks and docs are made from, collected from the pages."""

from importlib import import_module

from fla.ops import NAMES
from fla.ops.case import OpCase

OPS: list[OpCase] = [case for page in NAMES for case in getattr(import_module(page), "CASES", ())]
