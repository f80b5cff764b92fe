"""Files import each other in one direction: no circle, and none that a late import or TYPE_CHECKING would hide."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"


def _module(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


def _imports(tree: ast.AST) -> list[str]:
    """The files of ours that are imported anywhere in it."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [
                inner if (inner := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names
            ]
    return [name for name in names if name in FILES]


# What `__getattr__` of a package gives on first use, written again for type checkers: these name files above them.
LAZY_PACKAGES = {"qkv", "qkv.nn"}
GRAPH = {
    name: set() if name in LAZY_PACKAGES else set(_imports(tree)) - {name, *LAZY_PACKAGES}
    for name, tree in FILES.items()
}


def _way(start: str, goal: str) -> list[str]:
    """The files by which `start` comes to import `goal`; none where it does not."""
    ways, seen = [[start]], {start}
    for way in ways:
        for name in sorted(GRAPH[way[-1]]):
            if name == goal:
                return [*way, name]
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []


def test_files_import_in_no_circle() -> None:
    circles = [" → ".join(way) for name in GRAPH if (way := _way(name, name))]
    assert not circles, circles


def test_the_search_sees_a_circle() -> None:
    GRAPH["a"], GRAPH["b"], GRAPH["c"] = {"b"}, {"c"}, {"a"}
    try:
        assert _way("a", "a") == ["a", "b", "c", "a"]
    finally:
        del GRAPH["a"], GRAPH["b"], GRAPH["c"]


# Late imports, by the file that makes them: they save a second of start-up, and are for calls that most never make.
LATE = {  # gradients, and the definition behind weights
    "qkv.functional": {"qkv.autograd"},
    "qkv.graph.ops": {"qkv.autograd"},
    "qkv.probabilities": {"qkv.autograd", "qkv.backends.reference"},
}


def test_late_imports_are_those_that_save_time_at_the_start() -> None:
    """In the library; bench and cli load their parts when a command wants them."""
    for name, tree in FILES.items():
        if name.split(".")[1:2] in (["cli"], ["bench"], ["lm"]):
            continue
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        late = {inner for function in functions for inner in _imports(function)}
        assert late <= LATE.get(name, set()), f"{name} imports {sorted(late)} late"
