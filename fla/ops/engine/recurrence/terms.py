# SPDX-License-Identifier: MIT
"""The words of the recurrence that torch, C++ and Triton share."""

AFTER, DECAYED, BEFORE = "after", "decayed", "before"
