# SPDX-License-Identifier: MIT
"""The vector and the selective scan, and running sums."""
