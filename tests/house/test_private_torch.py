"""Private names of torch are used in `qkv._torch` alone, where each says what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "src" / "qkv"
FILES = sorted(path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.py"))


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def dotted(node: ast.AST) -> str:
    """a.b.c of an attribute, empty for one of anything but a name."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def uses(source: str) -> list[str]:
    """Private names that are reached through an import of torch, and those written as text."""
    tree, known, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                (a.asname or a.name).split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
            found += [a.name for a in node.names if a.name.startswith("torch") and private(a.name)]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            found += [name for a in node.names if private(name := f"{node.module}.{a.name}")]
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            first, _, rest = name.partition(".")
            full = f"{known.get(first, '')}.{rest}"
            if full.startswith("torch.") and private(full):
                found.append(full)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            found += [word for word in node.value.split() if word.startswith("torch._")]
    return found


@pytest.mark.parametrize("file", [file for file in FILES if file != "_torch.py"])
def test_no_other_file_uses_private_torch(file: str) -> None:
    assert uses((SOURCES / file).read_text(encoding="utf-8")) == []


def test_every_way_to_write_one_is_seen() -> None:
    for source in (
        "import torch\ntorch._C._len_torch_dispatch_stack()",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch._functorch.utils import x",
        "from torch.utils._python_dispatch import x",
        "import torch._dynamo",
        "import sys\n'torch._dynamo' in sys.modules",
        "from torch import nn\nnn.modules.module._global_forward_hooks",
    ):
        assert uses(source), source
    assert uses("import torch\ntorch.__version__, self._x, torch.nn.functional.relu\n'''torch._C'''") == []
    assert len(uses((SOURCES / "_torch.py").read_text(encoding="utf-8"))) > 20
