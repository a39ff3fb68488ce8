# SPDX-License-Identifier: MIT
"""docs/papers.md is the one table of papers: it holds every arXiv number of the tree, nothing else,
and the authors, years and titles beside a number agree with its row."""

import html
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = "docs/papers.md"
ROW = re.compile(r"\| \[(\S+)\]\(https://arxiv\.org/abs/(\S+)\) \| (.+) \| (.+) \| (\d{4}) \|")
MONTH = r"\d{2}(?:0[1-9]|1[0-2])"
CITED = re.compile(rf"(?<![\d.])(?:arXiv:\s*({MONTH}\.\d{{4,5}})|({MONTH}\.\d{{5}}))(?!\.?\d)")
YEAR = re.compile(r"\b(?:19[5-9]|20[0-3])\d\b")


class Paper(NamedTuple):
    title: str
    authors: str
    year: str

    @property
    def surname(self) -> str:
        return self.authors.split(",")[0].removesuffix(" et al.")


def read_table(text: str) -> dict[str, Paper]:
    rows = [ROW.fullmatch(line) for line in text.splitlines() if line.startswith("| [")]
    assert rows and all(row and row[1] == row[2] for row in rows)
    found = [(row[1], Paper(html.unescape(row[3]), row[4], row[5])) for row in rows if row]
    assert [number for number, _ in found] == sorted({number for number, _ in found})
    return dict(found)


TABLE = read_table((ROOT / PAGE).read_text())


def sources() -> dict[str, str]:
    """Text of every tracked or new file that may cite, without line breaks and comment signs."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.md", "*.ipynb",
         "*.yaml", "*.yml", "*.toml", "*.h", "*.cpp"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    files = [ROOT / name for name in names if name != PAGE]
    return {
        str(file.relative_to(ROOT)): re.sub(r"\s+(# )?", " ", file.read_text())
        for file in files
        if file.exists() and file != Path(__file__)
    }


def faults(text: str) -> list[str]:
    """What a text says of a paper that its row does not."""
    found, start = [], 0
    for match in CITED.finditer(text):
        number = match[1] or match[2]
        beside, start = text[start : match.start()][-200:], match.end()
        if number not in TABLE:
            found.append(f"{number} is not in {PAGE}")
            continue
        paper, years = TABLE[number], list(YEAR.finditer(beside))
        if not years:
            continue
        if years[-1][0] != paper.year or paper.surname not in beside:
            found.append(f"{number} is {paper.authors} ({paper.year}), not {beside[-80:]!r}")
        for title in re.findall(r"\*([^*`]+)\*", beside[years[-1].end() :]):
            if title.lower() not in paper.title.lower():
                found.append(f"{number} is {paper.title!r}, not {title!r}")
    return found


def test_what_pages_say_of_papers_agrees_with_the_table():
    wrong = {name: found for name, text in sources().items() if (found := faults(text))}
    assert not wrong, wrong


def test_every_row_is_cited():
    cited = {m[1] or m[2] for text in sources().values() for m in CITED.finditer(text)}
    assert not set(TABLE) - cited


def test_wrong_citations_would_be_found():
    assert not faults("Yang et al. (2024), *Gated Delta Networks*, arXiv:2412.06464.")
    assert not faults(
        "a norm (Ba et al. 2016, arXiv:1607.06450) and 512.12345 steps of 2024.123456"
    )
    for wrong in (
        "Yang et al. (2024), arXiv:2405.21060",  # another paper
        "Dao, Gu (2023), arXiv:2405.21060",  # another year
        "Dao, Gu (2024), *Mamba*, arXiv:2405.21060",  # another title
        "(Ba et al. 2017, arXiv:1607.06450)",
        "| Mamba | 2312.99999 |",  # not in the table
    ):
        assert faults(wrong), wrong
