# SPDX-License-Identifier: MIT
"""The rules of the tree, held by reading it: import direction, circles, sizes, headers, pages, and
what `import fla` costs. A rule is one test, which lists all that break it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fla.ops.registry import OPS

ROOT = Path(__file__).parents[2]
# What may import from itself and from what stands before it, from nothing after it.
LEVELS = [
    "fla.core",
    "fla.data",
    "fla._aliases",
    "fla._arguments",
    "fla._explain",
    "fla._lazy",
    "fla._register",
    "fla.ops.engine",
    "fla.ops",
    "fla.utils",
    "fla.modules",
    "fla.layers",
    "fla.models",
    "fla.optim",
    "fla.distributed",
    "fla.analysis",
    "fla.evals",
    "fla.training",
    "fla.linearize",
    "fla.tasks",
    "fla.studies",
    "fla.cli",
    "dilated_attention_pytorch",
    "benchmarks",
    "tests",  # the tree's own tools: tests run the scripts, and these use what the tests know
    "examples",
]
TOGETHER = {"scripts": "tests"}
FOLDERS = ("fla", "dilated_attention_pytorch", "benchmarks", "scripts", "examples", "tests")
CORE_LINES = 1300


def modules(root: Path, *folders: str) -> dict[str, Path]:
    """Every Python file of the folders, by its module's name."""
    found = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return {
        ".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p
        for p in found
    }


SOURCES = modules(ROOT, *FOLDERS)
OURS = {module: path for module, path in SOURCES.items() if module.split(".")[0] == "fla"}


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(parsed(path.read_text()))


def imports(module: str, path: Path) -> set[str]:
    """The dotted names a file imports, in functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{home}.{alias.name}" for alias in node.names}
    return names


def named_lazily(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a file names in strings, as the tables of `lazy_names` do."""
    strings = (node.value for node in nodes(path) if isinstance(node, ast.Constant))
    return {text for text in strings if isinstance(text, str) and "." in text and text in known}


def outer(name: str) -> Iterator[str]:
    """A dotted name, and what it is in, from the inside out."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def level(name: str) -> int | None:
    parts = (TOGETHER.get(part, part) for part in outer(name))
    return next((LEVELS.index(part) for part in parts if part in LEVELS), None)


def wrong_imports(sources: dict[str, Path]) -> list[str]:
    """Imports from a level above one's own."""
    found = []
    for module, path in sources.items():
        own = level(module)
        for name in sorted(imports(module, path)) if own is not None else ():
            other = level(name)
            if other is not None and other > own:
                found.append(f"{module} imports {name}")
    return found


def circles(sources: dict[str, Path]) -> list[str]:
    """Circles of imports, as `a -> b -> a`: as many as there are arrows to take away."""
    graph: dict[str, list[str]] = {}
    for module, path in sources.items():
        homes = (
            next((part for part in outer(name) if part in sources), module)
            for name in imports(module, path) | named_lazily(path, sources)
        )
        graph[module] = sorted({*homes} - {module})
    found: list[str] = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            first, second, *_ = circle = error.args[1]  # the second imports the first
            found.append(" -> ".join(reversed(circle)))
            graph[second].remove(first)
        else:
            return found


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names, and lines without the docstring."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield node.name, body[-1].end_lineno - body[0].lineno + 1 if body else 0


def long_functions(sources: dict[str, Path]) -> list[str]:
    """More than 60 lines; 200 where kernels are."""
    return [
        f"{module}.{name}: {length} lines"
        for module, path in sources.items()
        for name, length in functions(path)
        if length > (200 if "kernels" in path.parts else 60)
    ]


def triton_outside_kernels(sources: dict[str, Path]) -> list[str]:
    return [
        module
        for module, path in sources.items()
        if "kernels" not in path.parts
        and any(name.split(".")[0] == "triton" for name in imports(module, path))
    ]


def long_files(sources: dict[str, Path]) -> list[str]:
    sizes = {module: len(path.read_text().splitlines()) for module, path in sources.items()}
    return [f"{module}: {size} lines" for module, size in sizes.items() if size > 700]


def unlicensed(sources: dict[str, Path]) -> list[str]:
    line = "# SPDX-License-Identifier: MIT\n"
    texts = {module: path.read_text() for module, path in sources.items()}
    return [module for module, text in texts.items() if text and not text.startswith(line)]


def test_every_file_has_a_level():
    assert [module for module in SOURCES if module != "fla" and level(module) is None] == []


def test_imports_point_one_way():
    assert wrong_imports(SOURCES) == []


def test_there_is_no_circle_of_files():
    found = circles(modules(ROOT, "fla", "dilated_attention_pytorch", "benchmarks", "scripts"))
    assert not found, "\n".join(["circles of imports:", *found])


def test_core_is_small_and_imports_nothing_of_ours():
    core = {m: path for m, path in OURS.items() if "fla.core" in outer(m)}
    assert sum(len(path.read_text().splitlines()) for path in core.values()) <= CORE_LINES
    ours = {
        f"{module} imports {name}"
        for module, path in core.items()
        for name in imports(module, path)
        if name.split(".")[0] == "fla" and "fla.core" not in outer(name)
    }
    assert ours == set()


def test_files_are_short():
    assert long_files(SOURCES) == []


def test_files_are_licensed():
    assert unlicensed(SOURCES) == []


def test_triton_stays_in_kernels():
    assert triton_outside_kernels(OURS) == []


def test_functions_are_short():
    assert long_functions(OURS) == []


def write(root: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return modules(root, "fla")


def test_a_circle_would_be_found(tmp_path):
    sources = write(
        tmp_path,
        {
            "fla/__init__.py": "",
            "fla/tasks/__init__.py": "lazy = {'fla.tasks.rows': ['Rows']}\n",
            "fla/tasks/rows.py": "def rows():\n    from fla.tasks import Task\n",
            "fla/tasks/run.py": "from fla.tasks.report import show\nfrom fla.tasks import rows\n",
            "fla/tasks/report.py": "if TYPE_CHECKING:\n    from . import run\n",
        },
    )
    found = circles(sources)
    assert len(found) == 2
    assert {frozenset(circle.split(" -> ")) for circle in found} == {
        frozenset({"fla.tasks", "fla.tasks.rows"}),
        frozenset({"fla.tasks.run", "fla.tasks.report"}),
    }
    sources["fla.tasks.report"].write_text("from fla.tasks.rows import Rows\n")
    sources["fla.tasks.rows"].write_text("import fla.core\n")
    assert circles(sources) == []


def test_what_breaks_a_rule_would_be_found(tmp_path):
    sources = write(
        tmp_path,
        {
            "fla/ops/engine/up.py": "def late():\n    from fla.layers import GatedDeltaNet\n",
            "fla/evals/up.py": "from ..training import run\n",
            "fla/ops/scan.py": "import triton.language as tl\n",
            "fla/ops/kernels/scan.py": "import triton\n",
            "fla/long.py": "def long():\n" + "    pass\n" * 61 + "x = 1\n" * 640,
        },
    )
    assert wrong_imports(sources) == [
        "fla.evals.up imports fla.training.run",
        "fla.ops.engine.up imports fla.layers.GatedDeltaNet",
    ]
    assert triton_outside_kernels(sources) == ["fla.ops.scan"]
    assert long_functions(sources) == ["fla.long.long: 61 lines"]
    assert long_files(sources) == ["fla.long: 702 lines"]
    assert unlicensed(sources) == list(sources)


def test_lock_files_and_addresses_are_absent():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert not [name for name in tracked if name.endswith(".lock")]
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_pages_hold_equation_paper_and_table():
    parts = (
        "S_t = ",
        "arXiv:",
        "| symbol | argument | shape |",
        "Numerics:",
        "On the one equation:",
    )
    missing = []
    for op in OPS:
        text = (ROOT / "fla" / "ops" / f"{op.name}.py").read_text()
        page = text[: text.index("import torch")].lower()
        missing += [f"{op.name}: {x}" for x in (*parts, op.paper) if x.lower() not in page]
    assert missing == []


def test_import_needs_no_triton_no_torch_and_touches_no_device():
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ImportError('triton is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "import fla\n"
        "assert 'torch' not in sys.modules, 'import fla loads torch'\n"
        "import fla.ops, fla.utils\n"
        "from fla import chunk_gated_delta_rule\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "q = torch.randn(1, 5, 2, 4)\n"
        "chunk_gated_delta_rule(q, q, q, -torch.rand(1, 5, 2), torch.rand(1, 5, 2))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_bare_install_has_models_and_names_what_training_needs():
    code = (
        "import sys\n"
        "for name in ('triton', 'peft', 'trl', 'accelerate', 'datasets', 'matplotlib', 'rich', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM\n"
        "config = GatedDeltaNetConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_heads=1, head_dim=4)\n"
        "model = GatedDeltaNetForCausalLM(config)\n"
        "model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, pad_token_id=0)\n"
        "from fla.cli import main\n"
        "assert main(['doctor']) == 0\n"
        "sys.exit(main(['train']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "is not installed; pip install 'flash-linear-attention[train]'" in done.stderr


def test_unknown_names_are_attribute_errors():
    import fla

    with pytest.raises(AttributeError, match="has no attribute 'chunk_magic'"):
        fla.chunk_magic  # noqa: B018
