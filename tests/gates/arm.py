"""The kernels for ARM, where there is no such processor: `python -m tests.gates.arm`, or `make test-arm`.

A cross compiler makes the stress program (tests/native), which qemu runs as a processor with BF16 and as one without:
random calls with and without NaN in hidden places, gradients, statistics, malformed mask programs, threads. Then each
mistake of tests/kit/native_mutants.py is switched on, and the program has to notice. Clang compiles everything as well,
with warnings as errors, and the inner loops are counted (tests/house/test_arm_loops.py).

An emulator says nothing about speed, and neither does this.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tests.kit import native_mutants

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/arm"
CLANG_BUILD = ROOT / "build/arm-clang"
MUTATED = BUILD / "csrc"
PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "clang++": "clang",
}
MODELS = {"max": "neonbf16,neon,portable", "cortex-a72": "neon,portable"}  # what of ours each has to run
ISAS = ("neonbf16", "neon")  # that mistakes are looked for on
SEED = 20261126
# Cases of each mode of the stress program, on each model. Its mode `fork` is left out: qemu-user (7.2) stops with an
# assertion of its own where the child of a fork starts threads while its parent has some.
STRESS = {"calls": 2500, "gradients": 800, "looks": 800, "fuzz": 40, "mutate": 300, "nest": 60, "threads": 6}
# Those that look at results, and cases of each that a mistake may take to show.
ASKED = {"calls": 1000, "gradients": 500, "looks": 1000}
# Mistakes that the stress program does not see, and why. The gate sees them, on the processor that it runs on.
_SATURATED = "it shows where softmax is saturated, and the random scores here are ordinary"
_SHARED = "it shows where sequences share chunks of 512 keys: too long for as many random calls as it takes here"
UNSEEN = {
    "cascade_rows": _SHARED,
    "cascade_pages": _SHARED,
    "back_lse_rounded": _SATURATED,
    "back_score_order": _SATURATED,
    "back_poison": "gradients of calls with NaN in them are run here, for the harm they could do, but not compared",
    "look_state": _SATURATED,
    "look_live": "statistics of calls with NaN in them are run here, for the harm they could do, but not compared",
    "look_nan_keys": "the same",
}


class Finding(NamedTuple):
    """One part of the gate: whether it passed, and what it said."""

    name: str
    passed: bool
    text: str


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gates.arm", description=__doc__)
    parser.add_argument("--share", type=float, default=1, help="of the cases of the stress program (default 1)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--reduced", action="store_true", help="no mutants and no clang")
    given = parser.parse_args(arguments)
    if not tools():
        return 2
    start = time.perf_counter()
    parts: list[Callable[[], Iterable[Finding]]] = [
        lambda: built(given.jobs, mutants=not given.reduced),
        lambda: stressed(given.share, given.jobs),
        loops,
    ]
    if not given.reduced:
        parts += [lambda: mutants(given.jobs), lambda: compiled_by_clang(given.jobs)]
    for part in parts:
        for finding in part():
            print(f"[{time.perf_counter() - start:4.0f} s] {finding.name}: {finding.text}", flush=True)
            if not finding.passed:
                print("test-arm: FAILED")
                return 1
    print(f"test-arm: passed in {time.perf_counter() - start:.0f} s, under emulation; nothing here was timed on ARM")
    return 0


def tools() -> bool:
    """Whether everything is installed. As root on Debian and its kin what is missing is installed, else it is named."""
    missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
    if not missing:
        return True
    if os.geteuid() == 0 and shutil.which("apt-get") is not None:
        print(f"installing {' '.join(missing)}", flush=True)
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
            subprocess.run(
                ["apt-get", *command], check=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, stdout=2
            )
        return True
    print(f"test-arm needs what is not here: apt-get install {' '.join(missing)}")
    return False


def run(command: list[str], limit: float = 1500) -> tuple[int, str]:
    """The command's exit code and all that it said."""
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit, check=False
    )
    return done.returncode, done.stdout


def configured(build: Path, *options: str) -> tuple[int, str]:
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake/aarch64.cmake'}"
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return run([
        "cmake", "-G", "Ninja", "-S", "tests/native", "-B", str(build), f"-DCMAKE_MAKE_PROGRAM={ninja}", toolchain,
        "-DQKV_STRESS_SANITIZER=none", *options,
    ])  # fmt: skip


def built(jobs: int, *, mutants: bool) -> Iterable[Finding]:
    """The stress program by the cross compiler, and the one with all mistakes."""
    if mutants:
        native_mutants.write(ROOT / "csrc", MUTATED)
    code, said = configured(BUILD, f"-DQKV_STRESS_MUTATED={MUTATED if mutants else ''}")
    if code == 0:
        code, said = run(["cmake", "--build", str(BUILD), "-j", str(jobs)])
    yield Finding("compiled", code == 0, said[-3000:] if code else "stress" + ", stress_mutants" * mutants)


def emulated(model: str, program: str, *options: object) -> tuple[int, str]:
    return run(["qemu-aarch64", "-cpu", model, str(BUILD / program), *map(str, options)])


def stressed(share: float, jobs: int) -> Iterable[Finding]:
    """The modes of the stress program, as each model of processor."""

    def one(model: str) -> Finding:
        told = []
        for mode, cases in STRESS.items():
            count = max(2, round(share * cases))
            options = ("--seed", SEED, "--mode", mode, "--cases", count, "--budget", 4e5)
            code, said = emulated(model, "stress", *options)
            if code != 0 or f"instruction sets {MODELS[model]}\n" not in said:
                return Finding(f"stress on {model}", False, said)
            told.append(f"{count} {mode}")
        return Finding(f"stress on {model}", True, f"{MODELS[model]}: {', '.join(told)}")

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, MODELS)


def loops() -> Iterable[Finding]:
    """The test that counts the inner loops; here it may not be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/house/test_arm_loops.py"]
    code, said = run(command)
    yield Finding("loops", code == 0 and "skipped" not in said, said.strip().splitlines()[-1] if not code else said)


def mutants(jobs: int) -> Iterable[Finding]:
    """Whether the stress program notices each mistake, and none where there is none."""

    def one(item: tuple[int, str]) -> Finding:
        number, name = item
        own = {"back_": "gradients", native_mutants.LOOKS: "looks"}
        modes = [mode for begin, mode in own.items() if name.startswith(begin)] or (["calls"] if name else list(ASKED))
        for mode, isa in product(modes, ISAS):
            options = ("--seed", SEED, "--mode", mode, "--cases", ASKED[mode], "--budget", 2e5, "--isa", isa)
            code, said = emulated("max", "stress_mutants", "--mutant", number, "--failures", 1, *options)
            if code != 0:
                fault = said.strip().splitlines()[1]
                return Finding(name, bool(name) and name not in UNSEEN, f"dies on {isa}: {fault[:100]}")
        return Finding(name, not name or name in UNSEEN, f"lives: {UNSEEN.get(name, 'and nothing says why')}")

    names = ("", *(mutant.name for mutant in native_mutants.MUTANTS))
    found = []
    with ThreadPoolExecutor(jobs) as pool:
        for finding in pool.map(one, enumerate(names)):
            print(f"  {finding.name or '(no mistake)':<20} {finding.text}", flush=True)
            found.append(finding)
    wrong = [finding.name or "(no mistake)" for finding in found if not finding.passed]
    dead = sum(finding.text.startswith("dies") for finding in found)
    said = (
        f"wrong verdicts on {', '.join(wrong)}"
        if wrong
        else f"{dead} die, {len(UNSEEN)} are not seen here: {', '.join(UNSEEN)}"
    )
    yield Finding("mutants", not wrong, said)


def compiled_by_clang(jobs: int) -> Iterable[Finding]:
    """All kernels by Clang, with warnings as errors; nothing is linked."""
    code, said = configured(
        CLANG_BUILD, "-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu"
    )
    targets = [f"stress_{isa}" for isa in MODELS["max"].split(",")]
    if code == 0:
        code, said = run(["cmake", "--build", str(CLANG_BUILD), "-j", str(jobs), "--target", *targets])
    yield Finding("compiled by clang", code == 0, said[-3000:] if code else ", ".join(targets))


if __name__ == "__main__":
    sys.exit(main())
