# SPDX-License-Identifier: MIT
"""Evaluation: perplexity and bits per byte, by position too."""
