"""Run PyTorch's own test files on qkv: `make foreign DIR=...`, the folder that holds them.

The files are PyTorch's and no part of this project; docs/foreign_tests.md says which ones, how many tests each must
have at least, and which tests differ on purpose and why. This script reads both tables there, so that they are what is
judged by. It is red where a file is missing or has fewer tests, and where a test fails that is not listed. What fails
without qkv as well is PyTorch's own affair, and is printed; so is a listed test that passes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "foreign_tests.md"


class Run(NamedTuple):
    """One row of the first table: a file, the tests of it by pytest's -k, what is replaced, and how many at least."""

    file: str
    chosen: str
    replaced: str
    at_least: int


class Listed(NamedTuple):
    """One row of the second table: a test that differs on purpose."""

    file: str
    replaced: str
    test: str


class Found(NamedTuple):
    """What a run of pytest left behind."""

    collected: int
    outcomes: dict[str, str]
    said: dict[str, str]
    calls: str
    log: str


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with `first`, without code marks."""
    found: list[list[str]] = []
    inside = False
    for line in page.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if line.startswith(f"| {first} |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|-: "):
            found.append(cells)
    return found


def tables(page: str) -> tuple[list[Run], list[Listed]]:
    """What docs/foreign_tests.md promises."""
    runs = [Run(file, chosen, replaced, int(n.replace(",", ""))) for file, chosen, replaced, n in rows(page, "file")]
    named = [(names, file, replaced) for names, file, replaced, _ in rows(page, "test")]
    return runs, [Listed(file, replaced, name) for names, file, replaced in named for name in expanded(names)]


def expanded(name: str) -> list[str]:
    """The names that a{b,c}d stands for, as in a shell."""
    found = re.search(r"\{([^{}]*)\}", name)
    if found is None:
        return [name]
    start, end = name[: found.start()], name[found.end() :]
    return [each for part in found[1].split(",") for each in expanded(f"{start}{part}{end}")]


def run(folder: Path, replaced: str, chosen: list[str], every: int = 1) -> Found:
    """pytest on some files or tests in a process of its own, with qkv in PyTorch's place."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.jsonl"
        results.touch()
        root = Path(__file__).parents[2]
        paths = [str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "FOREIGN_WITH": replaced,
            "FOREIGN_RESULTS": str(results),
            "FOREIGN_EVERY": str(every),
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "PYTORCH_PRINT_REPRO_ON_FAILURE": "0",
        }
        command = [
            sys.executable, "-m", "pytest", "-p", "tests.kit.foreign_plugin", "-p", "no:cacheprovider", "-q",
            "--rootdir", ".", "-c", os.devnull, "-W", "ignore", *chosen,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    outcomes: dict[str, str] = {}
    said: dict[str, str] = {}
    for line in lines:
        if "test" in line and outcomes.get(line["test"]) != "failed":  # subtests report under one name
            outcomes[line["test"]], said[line["test"]] = line["outcome"], line["said"]
    collected = max((line["collected"] for line in lines if "collected" in line), default=0)
    calls = next((line["calls"] for line in lines if "calls" in line), "")
    return Found(collected, outcomes, said, calls, done.stdout[-2000:] + done.stderr[-2000:])


def judge(one: Run, found: Found, listed: set[str], plainly_failing: set[str]) -> tuple[list[str], list[str]]:
    """(what is red, what is worth a line) about one run."""
    red, notes = [], []
    if found.collected < one.at_least:
        red.append(f"{found.collected:,} tests collected, {one.at_least:,} are to be: {found.log[-600:]}")
    failing = {test for test, outcome in found.outcomes.items() if outcome == "failed"}
    for test in sorted(failing - listed - plainly_failing):
        red.append(f"fails: {test}: {found.said[test]}")
    notes += [f"fails without qkv as well: {test}" for test in sorted(failing & plainly_failing)]
    passing = {test for test, outcome in found.outcomes.items() if outcome == "passed"}
    notes += [f"is listed and passes: {test}" for test in sorted(listed & passing)]
    notes += [f"is listed and was not run: {test}" for test in sorted(listed - set(found.outcomes))]
    return red, notes


def main(arguments: list[str] | None = None) -> int:
    """Run every row of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where PyTorch's test files are")
    parser.add_argument("--only", default="", help="rows whose file, choice and replacement match this expression")
    parser.add_argument("--every", type=int, default=1, help="run every n-th test only (the page's counts still hold)")
    given = parser.parse_args(arguments)
    runs, all_listed = tables(PAGE.read_text())
    bad = 0
    for one in runs:
        title = f"{one.file} {one.chosen} with {one.replaced}"
        if not re.search(given.only, title):
            continue
        print(f"\n{title}", flush=True)
        if not (given.folder / one.file).is_file():
            print(f"  RED  {one.file} is not in {given.folder}")
            bad += 1
            continue
        found = run(given.folder, one.replaced, [one.file, *(["-k", one.chosen] if one.chosen else [])], given.every)
        listed = {row.test for row in all_listed if (row.file, row.replaced) == (one.file, one.replaced)}
        failing = [test for test, outcome in found.outcomes.items() if outcome == "failed" and test not in listed]
        plainly: set[str] = set()
        if failing:
            again = run(given.folder, "", [f"{one.file}::{test}" for test in failing])
            plainly = {test for test, outcome in again.outcomes.items() if outcome == "failed"}
        red, notes = judge(one, found, listed, plainly)
        counts = {kind: list(found.outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print("  " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items()) + f" of {found.collected:,}")
        print("\n".join(f"  {line}" for line in found.calls.splitlines()))
        print("\n".join([*(f"  RED  {line}" for line in red), *(f"  note {line}" for line in notes)]), flush=True)
        bad += len(red)
    print(f"\n{'RED: ' + str(bad) if bad else 'green'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
