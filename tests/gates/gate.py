"""The command of the gates: random configurations on every backend, against the oracle under the error rule.

    python -m tests.gates.gate --configs 2000 --seed 17     # what `make gate` runs: calls on tensors, then on views
    python -m tests.gates.gate ranks --configs 200          # calls on 2 to 4 gloo processes, by every method
    python -m tests.gates.gate calls --replay 17004         # one configuration again, with every number

Every configuration is one integer, printed when it fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from tests.gates.calls import CALLS, SDPA_SLACK
from tests.gates.rank_calls import RANK_CALLS
from tests.gates.view_calls import VIEWS
from tests.kit import backends
from tests.kit.gate import Gate, Statistics

GATES: dict[str, Gate[Any, Any]] = {gate.name: gate for gate in (CALLS, VIEWS, RANK_CALLS)}


def fresh_seed() -> int:
    """A new seed each run; QKV_SEED fixes it, so that a run can be repeated as a whole."""
    return int(os.environ.get("QKV_SEED", int(time.time()) % 10_000_000 * 100))


def told(gate: Gate[Any, Any], statistics: Statistics) -> list[str]:
    """The faults, each with the command that shows it again."""
    faults = []
    for at, backend, fault in sorted(statistics.faults):
        only = "" if backend in ("process", "by itself") else f" --backends {backend}"
        faults.append(f"{backend}: {fault}   (python -m tests.gates.gate {gate.name} --replay {at}{only})")
    return faults + statistics.naive_faults()


def judge(gate: Gate[Any, Any], configs: int, seed: int, names: tuple[str, ...], processes: int) -> int:
    """Run a gate, print what it found; the exit code."""
    print(f"{gate.name}: {configs} configurations from seed {seed} on {', '.join(names)}")
    if "sdpa" in names:
        print(
            f"sdpa is PyTorch's own kernel, by a rule of its own: {SDPA_SLACK:g} times the bound of an output, "
            "zeros where nothing may be read, no gradients"
        )
    end = "\r" if sys.stdout.isatty() else "\n"
    statistics = gate.run(range(seed, seed + configs), names, processes, lambda line: print(line, end=end, flush=True))
    print()
    for line in statistics.table():
        print(line)
    faults = told(gate, statistics)
    for fault in faults[:60]:
        print(f"FAULT {fault}")
    print(f"{gate.name}: {'passed' if not faults else f'{len(faults)} faults'}; seed {seed}\n")
    return 1 if faults else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gates.gate", description="Judge qkv against its oracle.")
    parser.add_argument("only", nargs="?", choices=tuple(GATES), help="the gate to run; calls and views by default")
    parser.add_argument("--configs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None, help="the first configuration; a new one each run by default")
    parser.add_argument("--replay", type=int, default=None, metavar="SEED", help="one configuration, in full")
    parser.add_argument("--backends", nargs="+", default=None)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    missing = set(backends.required()) - set(backends.available())
    if missing and args.backends is None:
        print(f"missing backends: {', '.join(sorted(missing))}")
        return 1
    chosen = [GATES[args.only]] if args.only else [CALLS, VIEWS]
    if args.replay is not None and args.only is None:
        parser.error(f"--replay needs the gate: {', '.join(GATES)}")
    seed, code = fresh_seed() if args.seed is None else args.seed, 0
    for gate in chosen:
        names = tuple(name for name in args.backends or gate.backends() if gate is not VIEWS or name != "sdpa")
        if args.replay is not None:
            return gate.replay(args.replay, names)
        code |= judge(gate, args.configs, seed, names, args.processes)
    return code


if __name__ == "__main__":
    sys.exit(main())
