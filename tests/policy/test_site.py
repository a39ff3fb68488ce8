# SPDX-License-Identifier: MIT
"""The guides and the reference build into a site without a broken link, the site's search finds an
operator by its equation, and what is generated in README and docs is up to date."""

import html
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import fla.layers
import fla.models
import fla.modules
import fla.ops
from scripts.docs_tables import BLOCKS, op_pages, split

ROOT = Path(__file__).parents[2]
PAGES = op_pages()


def build(folder, *options):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), *options],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_links_and_pictures_hold(site):
    for page in ("equation", "operators"):
        assert "../api/ops/gla/" in (site / page / "index.html").read_text()
    assert "source/fla/ops/engine/" in (site / "equation" / "index.html").read_text()
    assert (site / "analysis-attention.png").exists()


def test_pages_of_operators_show_equation_table_paper_and_functions(site):
    for page in PAGES.values():
        text = html.unescape((site / "api/ops" / page.name / "index.html").read_text())
        for part in (*page.equation, page.paper, "<th>argument</th>", f"fla.ops.{page.name}."):
            assert part in text, (page.name, part)


def test_the_reference_holds_every_public_name(site):
    listed = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    shown = {line.split()[0].rpartition(".")[2] for line in listed.splitlines()}
    for package in (fla.ops, fla.modules, fla.layers, fla.models):
        assert set(package.__all__) <= shown, set(package.__all__) - shown
    assert {"explain", "overwrite_states", "trace", "sequence_parallel", "Conversion"} <= shown


def test_the_search_finds_an_operator_by_its_equation(site):
    index = json.loads((site / "search" / "search_index.json").read_text())
    script = (site / "search-symbols.js").read_text()
    (asked,) = re.findall(r"replace\(/(.+)/gu, \" \"\)", script)
    asked = asked.replace(r"\p{L}\p{N}_", r"\w")  # Python's \w is those three
    order = (site / "index.html").read_text()
    assert order.index("search/main.js") < order.index("search-symbols.js")
    for page in PAGES.values():
        words: set[str] = set()
        for entry in index["docs"]:
            if entry["location"] == f"api/ops/{page.name}/":
                words |= set(re.split(index["config"]["separator"], entry["text"]))
        words = {re.sub(r"^\W+|\W+$", "", word) for word in words}  # as lunr's trimmer
        for line in page.equation:
            query = [w for w in re.sub(asked, " ", line).split() if re.search(r"\w", w)]
            assert query and set(query) <= words, (page.name, line, set(query) - words)


def test_a_broken_link_would_be_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nowhere](nowhere.md)\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nnav: []\nplugins: []\n"
    )
    done = build(tmp_path / "site", "--config-file", str(config))
    assert done.returncode != 0 and "nowhere.md" in done.stderr


@pytest.mark.parametrize(("page", "name"), BLOCKS)
def test_what_is_generated_is_up_to_date(page, name):
    assert split(page, name)[1] == BLOCKS[page, name](), "run python -m scripts.docs_tables"
