"""What a contributor is given: hooks that run what `make check` runs, forms that ask for what is needed."""

from __future__ import annotations

import re
from pathlib import Path

import qkv

ROOT = Path(__file__).resolve().parents[2]


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_hooks_run_what_make_check_runs() -> None:
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", _text("Makefile"), re.MULTILINE)
    assert check is not None
    hooks = _text(".pre-commit-config.yaml")
    for tool in re.findall(r"\$\(BIN\)/([\w-]+)", check[1]):
        assert f".venv/bin/{tool}" in hooks, tool


def test_the_forms_ask_for_the_doctor_and_the_seed() -> None:
    for form in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        assert "qkv doctor" in form.read_text(encoding="utf-8"), form.name
    assert re.search(r"`make gate`, its seed", _text(".github/PULL_REQUEST_TEMPLATE.md"))


def test_a_release_runs_commands_that_there_are() -> None:
    made = set(re.findall(r"^([\w-]+):", _text("Makefile"), re.MULTILINE))
    for page in ("RELEASE.md", "SECURITY.md", "CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"):
        assert set(re.findall(r"`make ([\w-]+)", _text(page))) <= made, page


def test_the_version_is_written_once() -> None:
    project = _text("pyproject.toml")
    assert re.search(r'^dynamic = \["version"\]', project, re.MULTILINE)
    assert not re.search(r"^version =", project, re.MULTILINE)
    assert f'__version__ = "{qkv.__version__}"' in _text("src/qkv/__init__.py")
    assert qkv.__version__ in _text("CHANGELOG.md").partition("\n## ")[2].partition("\n")[0]


def test_pages_name_files_that_there_are() -> None:
    pages = ["README.md", "SECURITY.md", "RELEASE.md", "CONTRIBUTING.md", "benchmarks/README.md"]
    pages += [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem != "foreign_tests"]
    for page in pages:  # foreign_tests names files of PyTorch
        for name in re.findall(r"`((?:csrc|src|tests|tools|docs|benchmarks|examples)/[\w./-]+)`", _text(page)):
            assert (ROOT / name).exists(), f"{page}: {name}"


def _sources() -> list[Path]:
    rooms = ("src", "tests", "tools", "benchmarks", "examples", "docs")
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py")) if "build" not in path.parts]


def test_sources_name_files_that_there_are() -> None:
    for path in _sources():
        for name in re.findall(r"`((?:csrc|src|tests|tools|docs|benchmarks)/[\w./-]+\.\w+)`", path.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name}"


def test_sources_count_the_folders_up_to_the_project() -> None:
    for path in _sources():
        for n in re.findall(r"Path\(__file__\)(?:\.resolve\(\))?\.parents\[(\d+)\]", path.read_text("utf-8")):
            assert path.parents[int(n)] == ROOT, path.relative_to(ROOT)
