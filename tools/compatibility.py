"""The tests on the oldest and newest torch and transformers that the package allows, and on the newest of everything.

    python tools/compatibility.py [--only torch-floor,...] [--tests PATH ...] [--keep] [--workers N]

Each environment is made in build/compatibility/ and thrown away after its run. What an environment is about is
installed first and picks what it needs itself; the rest has the versions of requirements.lock. An environment that
cannot be made is "not run", which is not a success: it says nothing of the version.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import lock

ROOT = lock.ROOT
FOLDER = ROOT / "build" / "compatibility"
_NEED = re.compile(r'"(torch|transformers)>=([\d.]+)"')


class NotRun(Exception):
    """An environment that could not be made; the text says at which step."""


@dataclass(frozen=True)
class Environment:
    name: str
    asked: tuple[str, ...]  # what it is about, as pip is asked for it; empty: the newest of everything
    tests: tuple[str, ...]


@dataclass
class Outcome:
    environment: Environment
    torch: str = "–"
    transformers: str = "–"
    gigabytes: float = 0.0
    counts: str = ""
    verdict: str = "not run"


def floors() -> dict[str, str]:
    """The oldest torch and transformers that pyproject.toml allows: 2.9 means any patch of it."""
    return dict(_NEED.findall((ROOT / "pyproject.toml").read_text(encoding="utf-8")))


def environments() -> list[Environment]:
    """What is tried. Tests that know transformers run on its versions, all but those of the lock on the others."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    every = tuple(str(path.relative_to(ROOT)) for path in tests if path.name != "test_versions.py")
    about = tuple(name for name in every if "transformers" in (ROOT / name).read_text(encoding="utf-8"))
    oldest = floors()
    return [
        Environment("torch-floor", (f"torch=={oldest['torch']}.*",), every),
        Environment("torch-newest", ("torch",), every),
        Environment("transformers-floor", (f"transformers=={oldest['transformers']}.*",), about),
        Environment("transformers-newest", ("transformers",), about),
        Environment("everything-newest", (), every),
    ]


def run(environment: Environment, tests: Sequence[str], workers: int, keep: bool) -> Outcome:
    """Make the environment, run the tests in it, and throw it away."""
    outcome = Outcome(environment)
    folder = FOLDER / environment.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        python = _made(environment, folder)
        outcome.torch, outcome.transformers = (_version(python, name) for name in ("torch", "transformers"))
        outcome.gigabytes = _gigabytes(folder)
        _tested(outcome, python, tests or environment.tests, workers)
    except NotRun as reason:
        outcome.counts = str(reason)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _made(environment: Environment, folder: Path) -> Path:
    """The environment's Python, with everything installed."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    _, locked = lock.read()
    newest = not environment.asked
    _pip(python, "pip", [] if newest else [f"pip=={locked['pip']}"])
    about_torch = newest or environment.asked[0].startswith("torch")
    if not about_torch:
        _pip(python, f"torch=={locked['torch']}", [])
    for asked in environment.asked or ("torch", "transformers"):
        _pip(python, asked, [] if about_torch else [f"torch=={locked['torch']}"])
    rest: list[str] = []
    if not newest:
        brought = _brought(python, "torch" if about_torch else "transformers")
        rest = [f"{name}=={brought.get(name, version)}" for name, version in locked.items()]
    _pip(python, ["--group", "dev"], rest)
    # The kernels know nothing of torch: built once. The newest of everything means what builds, too.
    _pip(python, ["--no-deps", "." if newest else str(_wheel())], rest)
    return python


@cache
def _wheel() -> Path:
    """qkv, built by the environment that runs this."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(FOLDER), "."]
    for old in FOLDER.glob("qkv-*.whl"):
        old.unlink()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "QKV_REQUIRED": "1"}, check=False)
    if done.returncode:
        raise NotRun("qkv could not be built")
    (found,) = FOLDER.glob("qkv-*.whl")
    return found


def _pip(python: Path, asked: str | Sequence[str], constraints: Sequence[str]) -> None:
    words = [asked] if isinstance(asked, str) else list(asked)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(constraints))
        file.flush()
        command = [str(python), "-m", "pip", "install", "-q", "-U", "-c", file.name, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotRun(f"pip install {' '.join(words)}: {lines[-1] if lines else 'failed'}")


def _brought(python: Path, package: str) -> dict[str, str]:
    """The versions of a package in an environment, and of all that it needs."""
    code = "import json, lock, sys; print(json.dumps(lock.closure(sys.argv[1])))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([str(python), "-c", code, package], env=env, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _version(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _gigabytes(folder: Path) -> float:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files) / 1e9


def _tested(outcome: Outcome, python: Path, tests: Sequence[str], workers: int) -> None:
    """Run pytest and count from its own report: a run that broke off, or that ran nothing, is a failure."""
    report = FOLDER / f"{outcome.environment.name}.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-n", str(workers), "-p", "no:cacheprovider", f"--junitxml={report}"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (FOLDER / f"{outcome.environment.name}.log").open("w", encoding="utf-8") as log:
        code = subprocess.run([*command, *tests], cwd=ROOT, env=env, stdout=log, stderr=log, check=False).returncode
    outcome.verdict = "failed"
    if not report.exists():
        outcome.counts = f"pytest ended with {code}: {log.name}"
        return
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, failed, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    outcome.counts = f"{total - failed - errors - skipped} passed, {failed + errors} failed, {skipped} skipped"
    if code == 0 and total > skipped and not failed + errors:
        outcome.verdict = "passed"


def table(outcomes: Sequence[Outcome]) -> str:
    """A line an environment."""
    rows = [("environment", "torch", "transformers", "GB", "verdict", "tests")]
    for o in outcomes:
        size = f"{o.gigabytes:.1f}" if o.gigabytes else "–"
        rows.append((o.environment.name, o.torch, o.transformers, size, o.verdict, o.counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """1 if the tests failed in an environment that could be made, or none could be made; else 0."""
    known = environments()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help=f"some of {', '.join(e.name for e in known)}")
    parser.add_argument("--tests", nargs="*", default=[], help="these tests instead of each environment's own")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the environments in build/compatibility")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else [e.name for e in known]
    if unknown := set(names) - {e.name for e in known}:
        parser.error(f"no such environment: {', '.join(sorted(unknown))}")
    print(
        "Another torch than the locked one may be a CUDA build: it runs on the CPU here, but takes 5 to 9 GB of disk, "
        f"{'each' if args.keep else 'one at a time'}, and 3 to 5 GB of downloads.",
        flush=True,
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for environment in known:
        if environment.name in names:
            print(f"{environment.name} ...", flush=True)
            outcomes.append(run(environment, args.tests, args.workers, args.keep))
            print(table(outcomes[-1:]).splitlines()[1], flush=True)
    told = table(outcomes)
    (FOLDER / "table.txt").write_text(told + "\n", encoding="utf-8")
    print(f"\n{told}")
    return int(any(o.verdict == "failed" for o in outcomes) or all(o.verdict == "not run" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
