# SPDX-License-Identifier: MIT
"""Training: transformers' Trainer on packed tokens, checkpoints that survive a kill."""
