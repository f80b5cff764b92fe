"""The lock, requirements.lock: the exact versions that `make demo`, `make test` and CI install.

    python tools/lock.py make [TORCH]          # writes it anew: the newest of everything, but the torch that it names
    python tools/lock.py constraints [TORCH]   # what `pip -c` is given for this Python and this torch

A line is `name==version` and nothing else: no host, no path, no hash (one version of torch has builds of different
content: for the CPU, for CUDA). It is used as constraints, so a package that nothing asks for is not installed.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:  # a bare venv: pip is wherever this runs; setuptools warns where it comes after distutils
    from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
_LINE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.!]*")
# What a torch for CUDA brings along on Linux; it depends on the build of torch, and nothing here uses it.
_CUDA = re.compile(r"(nvidia|cuda)-|triton$")


def plain(name: str) -> str:
    """A package's name as it is compared: `Foo_Bar` and `foo-bar` are one.

    >>> plain("typing_Extensions")
    'typing-extensions'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def read(path: Path = LOCK) -> tuple[str, dict[str, str]]:
    """The Python version (3.11) that a lock was made with, and the locked version of each package."""
    lines = path.read_text(encoding="utf-8").splitlines()
    python = next(found[1] for line in lines if (found := re.search(r"Python (3\.\d+)", line)))
    versions = {}
    for line in lines:
        if line and not line.startswith("#"):
            if not _LINE.fullmatch(line):
                raise ValueError(f"{path.name}: a line is name==version. Got {line!r}. Run make lock.")
            name, _, version = line.partition("==")
            versions[name] = version
    return python, versions


def requirements() -> list[str]:
    """What is asked for: the tools that build, the demo's packages, and those of the dependency groups."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = ["pip", *project["build-system"]["requires"], *project["project"]["optional-dependencies"]["demo"]]
    for group in project["dependency-groups"].values():
        asked += [item for item in group if isinstance(item, str)]
    return list(dict.fromkeys(asked))


def make(torch: str) -> None:
    """Resolve all requirements beside `torch` with the newest pip, in a venv of its own, and write the lock."""
    folder = ROOT / "build" / "lock"
    venv.create(folder, with_pip=True, clear=True)
    python, found = folder / "bin" / "python", folder / "found.json"
    pip = [str(python), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "-U", "pip"], check=True)
    resolve = [*pip, "--dry-run", "--ignore-installed", "--report", str(found)]
    subprocess.run([*resolve, torch, *requirements()], check=True)
    installs: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))["install"]
    versions = {plain(i["metadata"]["name"]): i["metadata"]["version"].partition("+")[0] for i in installs}
    before = read()[1] if LOCK.exists() else {}
    kept = {name: version for name, version in sorted(versions.items()) if not of_cuda(name)}
    lines = [
        f"# Made by `make lock` with Python {platform.python_version().rpartition('.')[0]}; "
        "another Python gets the newest that pyproject.toml allows.",
        *(f"{name}=={version}" for name, version in kept.items()),
    ]
    LOCK.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in sorted(kept.keys() | before.keys()):
        if before.get(name) != kept.get(name):
            print(f"{name}: {before.get(name, 'absent')} -> {kept.get(name, 'absent')}")
    print(f"{LOCK.name}: {len(kept)} packages")


def constraints(torch: str) -> list[str]:
    """The lines for `pip -c` in the environment that runs this.

    Another torch than the locked one comes first and picks what it needs itself; the rest is locked around it.
    """
    python, versions = read()
    locked = [f"{name}=={version}" for name, version in versions.items()]
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != python:
        told = f"{LOCK.name} is for Python {python}, this is {here}: pip takes the newest that pyproject.toml allows."
        print(told, file=sys.stderr)
        locked = []
    elif torch in ("", f"torch=={versions['torch']}"):
        return locked
    brought = closure("torch")
    if not brought:
        return [line for line in locked if line.startswith("pip==")]
    return [*(line for line in locked if line.partition("==")[0] not in brought), f"torch=={brought['torch']}"]


def of_cuda(name: str) -> bool:
    """Whether a package is one that a torch for CUDA brings along: the lock leaves them out."""
    return bool(_CUDA.match(name))


def closure(root: str) -> dict[str, str]:
    """The installed packages that one needs, itself included, with their versions; empty if it is not installed."""
    found: dict[str, str] = {}
    todo = [root]
    while todo:
        name = plain(todo.pop())
        if name in found:
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform, or of an extra
            continue
        found[name] = package.version.partition("+")[0]
        needs = [Requirement(need) for need in package.requires or ()]
        # By their markers, not by what is found: a library may put packages of its own on the path, as setuptools does.
        todo += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


if __name__ == "__main__":
    command, torch = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    if command == "make":
        make(torch or f"torch=={read()[1]['torch']}")
    else:
        print("\n".join(constraints(torch)))
