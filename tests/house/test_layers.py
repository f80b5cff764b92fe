"""The pictures of the layers are what pyproject.toml says, and every file of the package has its level."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "tools" / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _tool()


@pytest.mark.parametrize("name", TOOL.PAGES)
def test_the_page_shows_the_layers(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == TOOL.page(name), "run python tools/layers.py"


def test_every_file_has_a_level_and_says_what_it_is() -> None:
    package = ROOT / "src" / "qkv"
    names = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    ranked = [name for level in TOOL.levels() for name in level]
    assert len(ranked) == len(set(ranked))
    assert set(ranked) == names - {"__init__"}
    assert [name for name in ranked if not TOOL.purpose(name)] == []
