# SPDX-License-Identifier: MIT
"""Softmax attention in pieces, merged by log-sum-exp."""
