# SPDX-License-Identifier: MIT
"""Errors the command line turns into one line and an exit code."""


class UsageError(ValueError):
    """What the user asked for cannot be done: exit code 2."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number: exit code 1."""
