# SPDX-License-Identifier: MIT
"""Hooks of MkDocs, and an extension of Griffe, which reads docstrings for it.

The site gets a reference: a page per operator, module, layer and model, and one per tool, rendered
by mkdocstrings from the sources without importing them. Files of the tree that the guides link to
become pages too, so that links work there and in a checkout alike.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)]*)?\)")
SECTIONS = {"ops": "Operators", "modules": "Modules", "layers": "Layers", "models": "Models"}
TOOLS = ["data", "training", "linearize", "distributed", "analysis", "evals", "tasks", "studies"]
FIRST = ("config", "run")  # of a tool, in this order


class ApiPage(NamedTuple):
    """A page of the reference: where the menu has it, its heading, its file, the names it shows."""

    section: str
    entry: str
    heading: str
    uri: str
    names: tuple[str, ...]

    def markdown(self) -> str:
        blocks = [f"# {self.heading}"]
        for name in self.names:
            options: dict[str, object] = {
                "show_source": self.section == "Operators",
                "show_if_no_docstring": self.section in ("Operators", "Models"),
            }
            if len(self.names) > 1:
                blocks += [f"## {name}"] if file_of(name).is_file() else []
                options |= {"show_root_heading": not file_of(name).is_file()}
                options |= {"heading_level": 3 if file_of(name).is_file() else 2}
            lines = [f"      {option}: {str(value).lower()}" for option, value in options.items()]
            blocks.append("\n".join([f"::: {name}", "    options:", *lines]))
        return "\n\n".join(blocks) + "\n"


def file_of(name: str) -> Path:
    return ROOT / (name.replace(".", "/") + ".py")


def has_public(path: Path) -> bool:
    """Whether a file defines a function or class that is meant for others."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text()).body
    return any(isinstance(node, kinds) and not node.name.startswith("_") for node in body)


def modules_of(folder: str) -> list[str]:
    """The files of a package with something public in them; not those of folders below it."""
    paths = sorted((ROOT / "fla" / folder).glob("*.py"))
    return [f"fla.{folder}.{p.stem}" for p in paths if p.stem[0] != "_" and has_public(p)]


def heading_of(name: str) -> str | None:
    """The heading of a module's docstring, which the pages of operators have."""
    text = ast.get_docstring(ast.parse(file_of(name).read_text())) or ""
    match = re.match(r"# (.+)", text)
    return match[1] if match else None


def top_level() -> tuple[str, ...]:
    """Where the names of `import fla` are defined that no other page of the reference shows."""
    for node in ast.walk(ast.parse(file_of("fla.__init__").read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "lazy_names":
            table = node.args[1]
            assert isinstance(table, ast.Dict)
            homes = {ast.literal_eval(k): v for k, v in zip(table.keys, table.values, strict=True)}
            rest = {m: v for m, v in homes.items() if m.removeprefix("fla.") not in SECTIONS}
            return tuple(f"{m}.{name}" for m in rest for name in ast.literal_eval(rest[m]))
    raise ValueError("fla/__init__.py holds no call of lazy_names with a table of names")


def api_pages() -> Iterator[ApiPage]:
    yield ApiPage("", "fla", "fla", "api/fla.md", top_level())
    for folder, section in SECTIONS.items():
        for name in modules_of(folder):
            stem = name.rpartition(".")[2]
            heading = heading_of(name) if folder == "ops" else name
            if heading:
                entry = heading.split(":")[0] if folder == "ops" else stem
                yield ApiPage(section, entry, heading, f"api/{folder}/{stem}.md", (name,))
    for folder in TOOLS:
        names, title = modules_of(folder), f"fla.{folder}"
        names.sort(key=lambda n: [*FIRST, n.rpartition(".")[2]].index(n.rpartition(".")[2]))
        yield ApiPage("Tools", title, title, f"api/{folder}.md", tuple(names))


PAGES = list(api_pages())
# A file that has a page in the reference is linked there.
SHOWN = {file_of(p.names[0]).relative_to(ROOT).as_posix(): p.uri for p in PAGES if p.section}


def on_config(config: Any) -> Any:
    """Add the reference to the menu, and the script that searches for symbols after search's."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for page in PAGES:
        sections.setdefault(page.section, []).append({page.entry: page.uri})
    reference = [{name: pages} if name else pages[0] for name, pages in sections.items()]
    config.nav.append({"API reference": reference})
    config.extra_javascript.append("search-symbols.js")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the reference, and every file outside of docs that a page links to."""
    waiting = [ROOT / "docs" / f.src_uri for f in files if f.src_uri.endswith(".md")]
    for page in PAGES:
        files.append(File.generated(config, page.uri, content=page.markdown()))
    seen: set[Path] = set()
    while waiting:
        source = waiting.pop()
        for target, _ in LINK.findall(source.read_text()):
            path = (source.parent / target).resolve()
            if path in seen or path.is_relative_to(ROOT / "docs") or not path.is_file():
                continue
            seen.add(path)
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".md":
                waiting.append(path)
                files.append(File.generated(config, f"source/{name}", content=path.read_text()))
            elif path.suffix == ".png":
                files.append(File.generated(config, f"source/{name}", abs_src_path=str(path)))
            elif name not in SHOWN:
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
            file = path.relative_to(ROOT).as_posix()
            plain = path.suffix in (".md", ".png")
            target = SHOWN.get(file, f"source/{file}" + ("" if plain else ".md"))
        return f"]({up}{target}{anchor})"

    return LINK.sub(lead, markdown)


class Docstrings(griffe.Extension):
    """Docstrings in the form that mkdocstrings reads: a page prints the heading of its module,
    `Example:` starts examples and `Fields:` attributes.
    """

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"\A# .+\n+", "", obj.docstring.value)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r"^Fields:$", "Attributes:", text, flags=re.MULTILINE)
