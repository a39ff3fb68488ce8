# SPDX-License-Identifier: MIT
"""Scans: vector, selective, and running sums."""
