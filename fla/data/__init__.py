# SPDX-License-Identifier: MIT
"""Data: documents in, packed blocks of tokens with boundaries out. Of fla it imports core alone."""
