# SPDX-License-Identifier: MIT
"""Measurements: ours beside a peer in the same process, alternating, as medians and ratios."""
