# SPDX-License-Identifier: MIT
"""The guides build into a site without a broken link; what is generated in them is up to date."""

import subprocess
import sys
from pathlib import Path

from scripts.docs_tables import BEGIN, END, PAGE, table

ROOT = Path(__file__).parents[2]


def build(folder, *options):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), *options],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip


def test_the_site_builds_and_links_hold(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "equation" / "index.html").read_text()
    assert "source/fla/ops/gla.py/" in page
    assert "arXiv:2312.06635" in (tmp_path / "source/fla/ops/gla.py/index.html").read_text()
    assert (tmp_path / "analysis-attention.png").exists()


def test_a_broken_link_would_be_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nowhere](nowhere.md)\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nnav: []\n")
    done = build(tmp_path / "site", "--config-file", str(config))
    assert done.returncode != 0 and "nowhere.md" in done.stderr


def test_the_table_of_operators_is_up_to_date():
    text = PAGE.read_text()
    held = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert held == table(), "run python -m scripts.docs_tables"
