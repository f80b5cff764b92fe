"""Versions: the lock holds exact versions of everything that is installed, and the package says what it needs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def _tool(name: str) -> ModuleType:
    """A file of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    return _tool("lock")


def test_the_lock_has_exact_versions_and_no_place() -> None:
    head, *lines = LOCK.splitlines()
    assert re.fullmatch(r"# Made by `make lock` with Python 3\.\d+; [^/:]+", head)
    names = [line.partition("==")[0] for line in lines]
    assert all(re.fullmatch(r"[a-z0-9-]+==\d[\w.]*", line) for line in lines)
    assert names == sorted(set(names))


def test_everything_that_is_asked_for_is_locked_with_all_that_it_needs(lock: ModuleType) -> None:
    _, versions = lock.read()
    asked = [lock.plain(re.split(r"[^\w.-]", need, maxsplit=1)[0]) for need in lock.requirements()]
    assert {"pip", "scikit-build-core", "nanobind", "cmake", "ninja", "transformers", "pytest"} <= set(asked)
    for name in [*asked, "torch"]:
        assert name in versions, name
        for needed in lock.closure(name):
            assert needed in versions or lock.of_cuda(needed), f"{name} needs {needed}"


def test_the_makefile_installs_by_the_lock_alone() -> None:
    installs = [line for line in MAKEFILE.splitlines() if "pip install" in line or "$(PIP)" in line]
    assert len(installs) >= 6
    for line in installs:
        assert "$(PIP)" in line or line.startswith("PIP := "), line
    assert "-c $(VENV)/constraints.txt" in MAKEFILE
    assert not re.search(r"==\d", MAKEFILE), "versions are in the lock"


def _constraints(lock: ModuleType, monkeypatch: pytest.MonkeyPatch, torch: str, python: str, here: dict[str, str]):
    """What pip is given by a lock of torch, sympy and numpy where `here` is installed with torch."""
    versions = {"numpy": "2.0", "pip": "26.0", "sympy": "1.14", "torch": "2.13.0"}
    monkeypatch.setattr(lock, "read", lambda: (python, versions))
    monkeypatch.setattr(lock, "closure", lambda root: here)
    return lock.constraints(torch)


def test_the_locked_torch_is_installed_with_every_locked_version(lock, monkeypatch):
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    every = ["numpy==2.0", "pip==26.0", "sympy==1.14", "torch==2.13.0"]
    assert _constraints(lock, monkeypatch, "torch==2.13.0", here, {}) == every


def test_another_torch_picks_what_it_needs_and_the_rest_is_locked_around_it(lock, monkeypatch):
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert _constraints(lock, monkeypatch, "torch==2.5.1", here, {}) == ["pip==26.0"]
    brought = {"torch": "2.5.1", "sympy": "1.13.1"}
    assert _constraints(lock, monkeypatch, "torch==2.5.1", here, brought) == ["numpy==2.0", "pip==26.0", "torch==2.5.1"]


def test_another_python_is_told_that_nothing_is_locked(lock, monkeypatch, capsys):
    brought = {"torch": "2.13.0", "sympy": "1.14"}
    assert _constraints(lock, monkeypatch, "torch==2.13.0", "3.99", {}) == []
    assert _constraints(lock, monkeypatch, "torch==2.13.0", "3.99", brought) == ["torch==2.13.0"]
    said = capsys.readouterr().err.splitlines()
    assert "is for Python 3.99" in said[0]
    assert said[0].endswith("pip installs the newest that pyproject.toml allows.")


def test_a_line_that_is_not_an_exact_version_is_refused(lock: ModuleType, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.lock"
    for line in ("torch>=2.5", "torch @ file:///wheels/torch.whl", "--index-url x", "torch==2.13.0+cpu"):
        wrong.write_text(f"# Python 3.11\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="name==version"):
            lock.read(wrong)
