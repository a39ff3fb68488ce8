# SPDX-License-Identifier: MIT
"""Maps of rows of channels: short convolution, norms, gates."""
