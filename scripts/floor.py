# SPDX-License-Identifier: MIT
"""The oldest versions that pyproject.toml allows, as requirements: `python -m scripts.floor`.

`make floor` installs them in a virtual environment of their own and runs tests there.
"""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# of the extra `test`, what the tests chosen for the floor import
RUNNERS = ("hypothesis", "numpy", "pytest", "pytest-xdist", "triton")


def floors(extras: tuple[str, ...] = ("train",), runners: tuple[str, ...] = RUNNERS) -> list[str]:
    """`name==version` for every `name>=version`; a requirement that is none stays as it is.

    Raises:
        ValueError: a requirement has neither a lower nor an upper bound.
    """
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for extra in extras for r in optional[extra])]
    wanted += [r for r in optional["test"] if re.split(r"[<>=]", r)[0] in runners]
    for requirement in wanted:
        if not re.match(r"[\w-]+[<>]", requirement):
            raise ValueError(
                f"pyproject.toml: {requirement!r} has no bound; write it as 'name>=version'"
            )
    return [requirement.replace(">=", "==", 1) for requirement in dict.fromkeys(wanted)]


def main() -> int:
    print("\n".join(floors()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
