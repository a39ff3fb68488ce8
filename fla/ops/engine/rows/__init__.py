# SPDX-License-Identifier: MIT
"""What the kernels of a map of rows share."""
