# SPDX-License-Identifier: MIT
"""The rules of the tree, held by reading it: import direction, sizes, headers, pages, and what
`import fla` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fla.ops.registry import OPS

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    p
    for folder in ("fla", "dilated_attention_pytorch", "tests", "benchmarks", "examples", "scripts")
    for p in (ROOT / folder).rglob("*.py")
)
# A folder may import from itself and from folders before it.
ORDER = [
    "fla._lazy",
    "fla._register",
    "fla.ops.engine",
    "fla.ops",
    "fla.utils",
    "fla.modules",
    "fla.layers",
    "fla.models",
]
TOPS = [
    "fla.training",
    "fla.evals",
    "fla.linearize",
    "fla.tasks",
    "fla.studies",
    "fla.analysis",
    "fla.distributed",
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> int | None:
    if module == "fla.cli" or module.startswith("fla.cli."):
        return len(ORDER) + 1
    if any(module == top or module.startswith(top + ".") for top in TOPS):
        return len(ORDER)
    matches = [i for i, name in enumerate(ORDER) if module == name or module.startswith(name + ".")]
    return min(matches) if matches else None


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(path: Path, module: str) -> list[str]:
    own = layer(module)
    if own is None:
        return []
    return [name for name in imports(path) if (other := layer(name)) is not None and other > own]


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.is_relative_to(ROOT / "fla")], ids=module_of
)
def test_imports_point_one_way(path):
    assert not wrong_imports(path, module_of(path))


def test_a_wrong_import_would_be_found(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("from fla.layers import GatedDeltaNet\n")
    assert wrong_imports(file, "fla.ops.engine.bad")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_licensed(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 700
    assert not lines or lines[0] == "# SPDX-License-Identifier: MIT"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.is_relative_to(ROOT / "fla")], ids=module_of
)
def test_triton_stays_in_kernels_and_functions_are_short(path):
    if "kernels" not in path.parts:
        assert not any(name == "triton" or name.startswith("triton.") for name in imports(path))
    limit = 200 if "kernels" in path.parts else 60
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= limit, f"{node.name} has {length} lines"


def test_lock_files_and_addresses_are_absent():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert not [name for name in tracked if name.endswith(".lock")]
    assert "://" not in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_pages_hold_equation_paper_and_table(op):
    text = (ROOT / "fla" / "ops" / f"{op.name}.py").read_text()
    page = text[: text.index("import torch")]
    for part in (
        "S_t = ",
        "arXiv:",
        "| symbol | argument | shape |",
        "Numerics:",
        "On the one equation:",
    ):
        assert part.lower() in page.lower(), f"{op.name} lacks {part!r}"
    assert op.paper in page


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
        "for name in ('triton', 'accelerate', 'datasets', 'matplotlib', 'rich', 'tensorboard'):\n"
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
