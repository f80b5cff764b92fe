"""A wheel's name says what is in it: one without the native kernels is for any machine, and can be refused."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qkv

ROOT = Path(__file__).resolve().parents[2]


def _wheel(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`pip wheel` of this tree with a compiler that compiles nothing, by the build tools that are installed."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    options = ["-C", f"build-dir={folder}/build", str(ROOT)]
    env = {**os.environ, "CXX": "/bin/false", "CC": "/bin/false", **more}
    return subprocess.run([*command, *options], env=env, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_wheel_is_for_any_machine(tmp_path: Path) -> None:
    done = _wheel(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = tmp_path.glob("*.whl")
    assert found.name == f"qkv-{qkv.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(found) as wheel:
        names = wheel.namelist()
        about = wheel.read(next(name for name in names if name.endswith("/WHEEL"))).decode()
    assert "qkv/functional.py" in names
    assert "qkv/lm/model/reference.safetensors" in names
    assert {"qkv/insight/page/page.css", "qkv/insight/page/page.js"} <= set(names)
    assert not [name for name in names if "_native" in name and not name.endswith(".pyi")]
    assert "Root-Is-Purelib: true" in about


@pytest.mark.parametrize("required", ["1", "ON"])
def test_without_a_compiler_it_can_be_refused(tmp_path: Path, required: str) -> None:
    done = _wheel(tmp_path, QKV_REQUIRED=required)
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))
    assert "qkv: no C++20 compiler was found" in done.stdout + done.stderr
