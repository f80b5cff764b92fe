"""Versions: the lock holds exact versions of everything that is installed, and the package says what it needs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import qkv
from qkv import _torch

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A file of tools/, which is no package, as it is when its command begins."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def load(name: str) -> ModuleType:
        for known in ("lock", "compatibility"):
            monkeypatch.delitem(sys.modules, known, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture
def lock(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("lock")


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
    assert said[0].endswith("pip takes the newest that pyproject.toml allows.")


def test_a_line_that_is_not_an_exact_version_is_refused(lock: ModuleType, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.lock"
    for line in ("torch>=2.5", "torch @ file:///wheels/torch.whl", "--index-url x", "torch==2.13.0+cpu"):
        wrong.write_text(f"# Python 3.11\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="name==version"):
            lock.read(wrong)


# ---- the floors


def test_the_floor_that_is_checked_is_the_one_that_pip_is_told() -> None:
    floor = ".".join(map(str, _torch.FLOOR))
    assert re.search(r"^dependencies = (.*)$", PYPROJECT, re.MULTILINE)[1] == f'["torch>={floor}"]'


@pytest.mark.parametrize("version", ["2.4.1", "1.13.1+cu117", "2.0.0a0+git1"])
def test_an_old_torch_is_named_with_what_is_needed(version: str) -> None:
    """As a person meets it: the import of a torch that lacks what is used, which today says only what it lacks."""
    code = f"import torch; torch.__version__ = {version!r}; del torch.library.register_vmap; import qkv"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    floor = ".".join(map(str, _torch.FLOOR))
    assert done.stderr.splitlines()[-1] == (
        f"qkv.errors.VersionError: import qkv: torch {floor} or newer is needed. Got torch {version}. "
        f"Use pip install 'torch>={floor}'."
    )


def test_the_error_is_one_of_an_import_and_a_value() -> None:
    with pytest.raises(ImportError, match=r"torch 2\.4\.1") as raised:
        _torch.check("2.4.1")
    assert isinstance(raised.value, (qkv.QKVError, ValueError))
    for version in (torch.__version__, "3.0.0", "2.99.0.dev20270101+cpu"):
        _torch.check(version)


def test_nothing_is_said_of_a_numpy_that_is_not_there(tmp_path: Path) -> None:
    """torch warns of it as it is imported; a stand-in that cannot be imported comes first on the path."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('no numpy')", encoding="utf-8")
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import"
    torch_alone = run([sys.executable, "-c", f"{code} torch"])
    assert "Failed to initialize NumPy" in torch_alone.stderr, "else this test shows nothing"
    ours = run([sys.executable, "-W", "error", "-c", f"{code} qkv, torch; qkv.attention(*torch.ones(3, 1, 1, 2, 8))"])
    assert (ours.returncode, ours.stderr) == (0, "")


# ---- make compatibility


@pytest.fixture
def compatibility(tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command, where nothing is installed: its environments are empty folders."""
    module = tool("compatibility")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "_made", lambda environment, folder: tmp_path / "python")
    monkeypatch.setattr(module, "_version", lambda python, package: "1.0")
    return module


def _pytest(folder: Path, counts: str | None, code: int) -> None:
    """A Python whose pytest writes these counts to the file it is asked for, or nothing."""
    lines = ["#!/bin/sh", 'for word; do case "$word" in --junitxml=*) file="${word#--junitxml=}";; esac; done']
    if counts is not None:
        lines.append(f"echo '<testsuites><testsuite {counts}/></testsuites>' > \"$file\"")
    script = folder / "python"
    script.write_text("\n".join([*lines, f"exit {code}"]) + "\n", encoding="utf-8")
    script.chmod(0o755)


def test_the_oldest_and_the_newest_are_tried(tool: Callable[[str], ModuleType]) -> None:
    module = tool("compatibility")
    floor = ".".join(map(str, _torch.FLOOR))
    assert module.floors()["torch"] == floor
    assert {e.name: e.asked for e in module.environments()} == {
        "torch-floor": (f"torch=={floor}.*",),
        "torch-newest": ("torch",),
        "transformers-floor": (f"transformers=={module.floors()['transformers']}.*",),
        "transformers-newest": ("transformers",),
        "everything-newest": (),
    }
    for environment in module.environments():
        about = environment.name.startswith("transformers")
        assert "tests/transformers/test_models.py" in environment.tests
        assert ("tests/attention/test_merge.py" in environment.tests) is not about
        assert "tests/house/test_versions.py" not in environment.tests


@pytest.mark.parametrize(
    ("counts", "code", "verdict"),
    [
        ('tests="9" failures="0" errors="0" skipped="1"', 0, "passed"),
        ('tests="9" failures="1" errors="0" skipped="0"', 1, "failed"),
        ('tests="9" failures="0" errors="1" skipped="0"', 1, "failed"),
        ('tests="0" failures="0" errors="0" skipped="0"', 5, "failed"),
        ('tests="2" failures="0" errors="0" skipped="2"', 0, "failed"),
        ('tests="9" failures="0" errors="0" skipped="0"', 3, "failed"),  # broke off after them
        (None, 4, "failed"),
    ],
)
def test_only_tests_that_ran_and_passed_are_green(
    compatibility: ModuleType, tmp_path: Path, counts: str | None, code: int, verdict: str
) -> None:
    _pytest(tmp_path, counts, code)
    assert compatibility.main(["--only", "torch-floor"]) == (verdict == "failed")
    told = (tmp_path / "table.txt").read_text(encoding="utf-8").splitlines()[1]
    assert told.split()[:3] == ["torch-floor", "1.0", "1.0"]
    assert verdict in told


def test_what_could_not_be_installed_is_not_run_and_not_green(
    compatibility: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(environment: object, folder: Path) -> Path:
        if "torch" in environment.name:  # type: ignore[attr-defined]
            raise compatibility.NotRun("pip install torch: ERROR: No matching distribution")
        return tmp_path / "python"

    monkeypatch.setattr(compatibility, "_made", made)
    _pytest(tmp_path, 'tests="9" failures="0" errors="0" skipped="0"', 0)
    assert compatibility.main(["--only", "torch-floor,transformers-floor"]) == 0
    lines = (tmp_path / "table.txt").read_text(encoding="utf-8").splitlines()
    assert re.match(r"torch-floor +– +– +– +not run +pip install torch: ERROR", lines[1])
    assert re.match(r"transformers-floor +1\.0 +1\.0 +– +passed +9 passed", lines[2])
    assert compatibility.main(["--only", "torch-floor,torch-newest"]) == 1, "nothing ran"
    assert "5 to 9 GB of disk" in capsys.readouterr().out.splitlines()[0]
