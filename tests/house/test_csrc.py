"""The shape of the kernels' sources: where intrinsics stand, how long functions are, and what each object defines."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qkv.backends.cpu import instruction_sets
from qkv.backends.isas import ISAS, TUNED
from tests.kit import skips

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp"))
OF_TESTS = sorted(path for path in (ROOT / "tests" / "native").iterdir() if path.suffix in (".h", ".cpp"))
LONGEST = 60  # code lines of a function


def table() -> list[list[str]]:
    """The lines of isas.def, in words: name, file, processors, features."""
    lines = (CSRC / "isas.def").read_text().splitlines()
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]


def test_python_knows_the_same_instruction_sets() -> None:
    assert list(ISAS.items()) == [(name, tuple(features)) for name, _, _, *features in table()]


def test_instruction_sets_have_a_file_each() -> None:
    assert {f"{file}" for _, file, *_ in table()} <= {path.name for path in (CSRC / "simd").iterdir()}


def test_intrinsics_stand_under_simd_only() -> None:
    intrinsic = re.compile(
        r"\b_mm\w*|\b__m\d|immintrin|__AVX|__F16C|arm_neon|__ARM_FEATURE|"
        r"\bv\w+_[fsu](?:8|16|32|64)\b|\b(?:u?int|float)\d+x\d+_t\b"
    )
    assert len(SOURCES) > 20
    found = [path.name for path in SOURCES if path.parent.name != "simd" and intrinsic.search(path.read_text())]
    assert not found


def code(text: str) -> str:
    """Without comments, strings and characters; lines stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\''
    return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.S)


def functions(text: str) -> list[tuple[str, int]]:
    """The first line of each function, and its code lines. Namespaces, types and tables are not functions."""
    text, found, open_at = code(text), [], []
    for i, letter in enumerate(text):
        if letter == "{":
            head = re.split(r"[;{}]|\n#[^\n]*", text[:i])[-1]
            inside = any(name for name, _ in open_at)
            named = "(" in head and not re.search(
                r"\bnamespace\b|^\s*(?:struct|class|enum|extern)\b|=\s*$|\[\s*\]\s*$", head
            )
            open_at.append((" ".join(head.split()) if named and not inside else "", i))
        elif letter == "}" and open_at:
            name, start = open_at.pop()
            if name:
                lines = text[text.rfind("\n", 0, start) : i + 1].splitlines()
                found.append((name, sum(bool(line.strip()) for line in lines)))
    return found


@pytest.mark.parametrize("path", [*SOURCES, *OF_TESTS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_functions_are_short(path: Path) -> None:
    assert not [(name, lines) for name, lines in functions(path.read_text()) if lines > LONGEST]


def objects() -> dict[str, list[Path]]:
    """The newest objects of each instruction set that were compiled after the last change of the sources."""
    changed = max(path.stat().st_mtime for path in SOURCES)
    found: dict[str, dict[str, Path]] = {}
    for path in sorted((ROOT / "build").glob("**/_native_*.dir/**/kernel/*.o"), key=lambda path: path.stat().st_mtime):
        isa = next(part for part in path.parts if part.startswith("_native_"))[len("_native_") : -len(".dir")]
        if isa in ISAS and path.stat().st_mtime >= changed:
            found.setdefault(isa, {})[path.name] = path
    return {isa: list(paths.values()) for isa, paths in found.items()}


def test_objects_of_an_instruction_set_define_nothing_outside_its_namespace() -> None:
    """The linker keeps one copy of a weak function: it could be AVX-512's, for a machine without it."""
    built = objects()
    if not built or shutil.which("nm") is None:
        pytest.skip(skips.NO_OBJECTS)
    for isa, paths in built.items():
        for path in paths:
            listed = subprocess.run(
                ["nm", "--defined-only", "--extern-only", "--demangle", path],
                capture_output=True,
                text=True,
                check=True,
            )
            names = [line.split(" ", 2)[2] for line in listed.stdout.splitlines() if line.count(" ") >= 2]
            assert names, path
            assert not [name for name in names if f"qkv::{isa}::" not in name], path


def test_the_names_of_instruction_sets_stand_in_few_files_of_python() -> None:
    """A new one is its line in isas.def and in backends/isas.py; the others ask a processor, and another library."""
    name = re.compile("|".join(TUNED))
    python = (ROOT / "src/qkv").rglob("*.py")
    found = {str(path.relative_to(ROOT / "src/qkv")) for path in python if name.search(path.read_text())}
    assert found == {"backends/isas.py", "bench/machine.py", "bench/peers/ggml.py"}


def test_the_best_instruction_set_goes_first() -> None:
    """As in isas.def; but Intel's pair products of bfloat16 are slow: there the set without them goes first."""
    order = list(ISAS)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text():
        at = order.index("avx512bf16")
        assert order[at + 1] == "avx512"
        order[at : at + 2] = reversed(order[at : at + 2])
    found = instruction_sets()
    assert list(found) == [name for name in order if name in found]
