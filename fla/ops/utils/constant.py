# SPDX-License-Identifier: MIT
"""Numbers."""

import math

RCP_LN2 = 1 / math.log(2)  # natural logarithms times this are logarithms to base 2
