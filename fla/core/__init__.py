# SPDX-License-Identifier: MIT
"""What every other package of fla stands on; it imports nothing of fla."""
