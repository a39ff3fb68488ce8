# SPDX-License-Identifier: MIT
"""What everything stands on; it imports nothing else of fla."""
