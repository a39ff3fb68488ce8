# SPDX-License-Identifier: MIT
"""Errors the command line turns into one line and an exit code."""


class UsageError(ValueError):
    """The user asked for something that cannot be done: exit code 2."""


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite: exit code 1."""
