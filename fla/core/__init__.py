# SPDX-License-Identifier: MIT
"""The foundation of every other package of fla; it imports nothing of fla."""
