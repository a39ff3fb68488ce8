# SPDX-License-Identifier: MIT
"""`python -m fla.cli` is the `fla` command."""

import sys

from fla.cli import main

if __name__ == "__main__":
    sys.exit(main())
