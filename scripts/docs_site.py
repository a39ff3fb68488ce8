# SPDX-License-Identifier: MIT
"""A hook of MkDocs: files of the tree that the guides link to become pages of the site, so that
links work there and in a checkout alike.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every file outside of docs that a page links to, and those it links to."""
    waiting = [ROOT / "docs" / f.src_uri for f in files if f.src_uri.endswith(".md")]
    seen: set[Path] = set()
    while waiting:
        page = waiting.pop()
        for target, _ in LINK.findall(page.read_text()):
            path = (page.parent / target).resolve()
            if path in seen or path.is_relative_to(ROOT / "docs") or not path.is_file():
                continue
            seen.add(path)
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".md":
                waiting.append(path)
                files.append(File.generated(config, f"source/{name}", content=path.read_text()))
            elif path.suffix == ".png":
                files.append(File.generated(config, f"source/{name}", abs_src_path=str(path)))
            else:
                code = f"# {name}\n\n````{path.suffix[1:]}\n{path.read_text()}````\n"
                files.append(File.generated(config, f"source/{name}.md", content=code))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs lead to the pages of `on_files`."""
    name = page.file.src_uri
    outside = name.startswith("source/")
    here = (ROOT / name.removeprefix("source/") if outside else ROOT / "docs" / name).parent
    up = "../" * name.count("/")

    def lead(match: re.Match) -> str:
        path, anchor = (here / match[1]).resolve(), match[2] or ""
        if not path.is_file():
            return match[0]
        if path.is_relative_to(ROOT / "docs"):
            target = path.relative_to(ROOT / "docs").as_posix()
        else:
            plain = path.suffix in (".md", ".png")
            target = f"source/{path.relative_to(ROOT).as_posix()}" + ("" if plain else ".md")
        return f"]({up}{target}{anchor})"

    return LINK.sub(lead, markdown)
