"""What CONTRIBUTING.md and the Makefile say of files is true, and code stays in pieces that one can read."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CODE = ("src", "tests", "tools", "benchmarks", "examples", "docs")
MOST_OF_A_FUNCTION, MOST_OF_A_FILE = 60, 300  # lines of code: no comments, docstrings and blanks


def recipe(name: str) -> str:
    found = re.search(rf"^\*\*To {re.escape(name)}:\*\*(.*?)\n\n", TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None, f"CONTRIBUTING.md has no recipe to {name}"
    return found[1]


def files(text: str) -> list[str]:
    return [name for name in re.findall(r"`([^`\s]+)`", text) if "/" in name and "." in name]


@pytest.mark.parametrize("name", ["add a mask", "add a backend", "add a case"])
def test_recipes_name_files_that_exist(name: str) -> None:
    named = files(recipe(name))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_a_mask_is_in_the_files_that_the_recipe_names() -> None:
    """Asked of one kind of mask that has an opcode and no other use: `dilated`."""
    needed, _, then = recipe("add a mask").partition("Then")
    assert len(files(needed)) + len(files(then)) <= 6
    suffixes = {".py", ".h", ".cpp", ".inc", ".def", ".md"}
    places = [ROOT / "src", ROOT / "csrc", ROOT / "tests" / "kit", ROOT / "tests" / "native", ROOT / "docs"]
    found = set()
    for path in (path for place in places for path in place.rglob("*") if path.suffix in suffixes):
        if path in (ROOT / "docs" / "recipes.md", ROOT / "tests" / "kit" / "cases.py"):  # calls that some masks are in
            continue
        pattern = r"dilated\(" if path.suffix == ".md" else r'Dilated|"dilated"'
        if re.search(pattern, path.read_text(encoding="utf-8")):
            found.add(str(path.relative_to(ROOT)))
    assert found == set(files(needed)) | set(files(then))


def test_make_quick_runs_tests_that_exist() -> None:
    found = re.search(r"^QUICK := ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert found is not None
    paths = [word.partition("::")[0] for word in found[1].split() if word != "\\"]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


# ------------------------------------------------------------------------------------------------------------ sizes
def code_lines(text: str, tree: ast.Module) -> set[int]:
    """The numbers of the lines that hold code."""
    documented: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            documented.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - documented


def sources() -> Iterator[tuple[str, set[int], ast.Module]]:
    for path in sorted(path for place in CODE for path in (ROOT / place).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        yield str(path.relative_to(ROOT)), code_lines(text, tree), tree


def test_no_function_and_no_file_is_too_long() -> None:
    found = []
    for name, lines, tree in sources():
        if name.startswith("src/") and len(lines) > MOST_OF_A_FILE:
            found.append(f"{name}: {len(lines)} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                own = sum(node.lineno <= line <= (node.end_lineno or 0) for line in lines)
                if own > MOST_OF_A_FUNCTION:
                    found.append(f"{name}: {node.name} has {own} lines")
    assert found == []
