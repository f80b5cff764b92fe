"""Where things are: what the command line, the examples and the language model may hold and import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qkv.cli
from qkv.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "examples").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def _imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


PACKAGE = ROOT / "src" / "qkv"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_use_the_library_and_not_the_command_line(path: Path) -> None:
    assert not [name for name in _imported(path) if re.match(r"qkv\.cli\b", name)]


def test_a_command_parses_calls_and_prints() -> None:
    for path in sorted((PACKAGE / "cli").rglob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, path.name


def test_the_command_line_says_which_commands_it_has() -> None:
    assert set(re.findall(r"`qkv (\w+)`", qkv.cli.__doc__ or "")) == set(COMMANDS)


def test_the_language_model_needs_no_command_line_and_nothing_that_draws() -> None:
    code = "import sys, qkv.lm; print([m for m in sys.modules if m.startswith(('rich', 'qkv.cli', 'qkv.bench'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
