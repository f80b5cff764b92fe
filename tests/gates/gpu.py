"""qkv on a GPU: named and generated calls on every backend that takes its tensors, and the rest of the library there.

    python -m tests.gates.gpu                       # what `make gpu-test` runs: cuda, 300 seconds
    python -m tests.gates.gpu --large               # with 9 GiB of keys and values past the 2**31st element
    python -m tests.gates.gpu --device cpu --seconds 30
    python -m tests.gates.gpu --replay 17004        # one generated call again, with every number; --case NAME likewise

It needs PyTorch, NumPy and the sources on the path, no native extension. One line a group; the exit code is 1 where
something failed. Float32 products are computed as PyTorch does by default, without TF32: --tf32 asks what that breaks.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator

import torch

import qkv
from tests.gates import gpu_parts
from tests.gates.gate import fresh_seed
from tests.gates.gpu_calls import BACKENDS, DeviceCalls, DeviceCases
from tests.kit.cases import CASES
from tests.kit.gate import Gate, Outcome, Statistics

Line = Callable[[str], None]


def judged(gate: Gate, seeds: Iterator[int], processes: int) -> Iterator[list[Outcome]]:
    """The outcomes of each seed; in this process where there are to be no others."""
    if processes:
        yield from gate.judged(seeds, BACKENDS, processes)
    else:
        for seed in seeds:
            yield gate.ask_all(gate.random(seed), BACKENDS)


def ask(gate: DeviceCalls, seeds: Iterator[int], processes: int, replay: Callable[[int], str], say: Line) -> int:
    """One group of calls; how many faults."""
    statistics, done, begin = Statistics(), 0, time.monotonic()
    for outcomes in judged(gate, seeds, processes):
        done += 1
        for outcome in outcomes:
            statistics.add(outcome)
    faults = len(statistics.faults)
    say(
        f"{gate.name:<16} {done} on {', '.join(BACKENDS)}: worst error {statistics.worst:.2f} of its bound, "
        f"{faults} faults, {time.monotonic() - begin:.0f} s"
    )
    for seed, backend, fault in sorted(statistics.faults)[:40]:
        say(f"    FAULT {backend}: {fault}   ({replay(seed)})")
    for backend, count in sorted(statistics.refused.items()):
        say(f"    {backend} took {done - count} of {done}")
    return faults


def part(name: str, function: Callable[[str], Iterator[tuple[str, str]]], device: str, say: Line) -> int:
    """One group of the rest; how many faults."""
    begin, tried, faults, notes = time.monotonic(), 0, [], []
    try:
        for what, fault in function(device):
            tried += 1
            if fault:
                faults.append(f"{what}: {fault}")
            elif "NOT TRIED" in what:
                notes.append(what)
    except Exception as error:  # an error ends the part, and is its finding
        faults.append(f"after {tried}: {type(error).__name__}: {error}")
    say(f"{name:<16} {tried} checks, {len(faults)} faults, {time.monotonic() - begin:.0f} s")
    for fault in faults:
        say(f"    FAULT {fault}   (python -m tests.gates.gpu --device {device} --only {name})")
    for note in notes:
        say(f"    {note}")
    return len(faults)


def run(args: argparse.Namespace, say: Line) -> int:
    """All groups, or those named; how many faults."""
    device, deadline = args.device, time.monotonic() + args.seconds
    command = f"python -m tests.gates.gpu --device {device}"
    parts = gpu_parts.PARTS | ({"large": gpu_parts.large} if args.large else {})
    only, faults = args.only or (*parts, "cases", "calls"), 0
    for name in parts:
        if name in only:
            faults += part(name, parts[name], device, say)
    if "cases" in only:
        numbers = itertools.takewhile(lambda _: time.monotonic() < deadline, range(args.cases or len(CASES)))
        faults += ask(
            DeviceCases(device, args.tf32),
            numbers,
            args.processes,
            lambda n: f'{command} --case "{CASES[n].name}"',
            say,
        )
    if "calls" in only:
        seeds = itertools.takewhile(lambda _: time.monotonic() < deadline, range(args.seed, args.seed + args.calls))
        faults += ask(
            DeviceCalls(device, args.tf32), seeds, args.processes, lambda seed: f"{command} --replay {seed}", say
        )
    return faults


def main(arguments: list[str] | None = None, say: Line = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gates.gpu", description="Judge qkv on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=300, help="no call is begun after so many")
    parser.add_argument(
        "--seed", type=int, default=None, help="the first generated call; a new one each run by default"
    )
    parser.add_argument("--calls", type=int, default=4000, help="generated calls at most")
    parser.add_argument("--cases", type=int, default=None, help="named cases at most")
    parser.add_argument("--processes", type=int, default=8, help="0: all in this process")
    parser.add_argument("--only", nargs="+", default=None, metavar="GROUP")
    parser.add_argument("--large", action="store_true", help="tensors past 2**31 elements")
    parser.add_argument("--tf32", action="store_true", help="let float32 products round their factors to 10 bits")
    parser.add_argument("--replay", type=int, default=None, metavar="SEED")
    parser.add_argument("--case", default=None, metavar="NAME")
    args = parser.parse_args(arguments)
    args.seed = fresh_seed() if args.seed is None else args.seed
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        say(f"no {args.device} here: PyTorch {torch.__version__} sees no GPU")
        return 1
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    if args.case is not None:
        return DeviceCases(args.device).replay([c.name for c in CASES].index(args.case), BACKENDS)
    if args.replay is not None:
        return DeviceCalls(args.device).replay(args.replay, BACKENDS)
    name = torch.cuda.get_device_name(args.device) if on_gpu else "the CPU"
    tf32 = "on" if args.tf32 else "off"
    say(f"qkv {qkv.__version__}, PyTorch {torch.__version__}, {name}, TF32 {tf32}, seed {args.seed}")
    begin = time.monotonic()
    faults = run(args, say)
    say(f"{'passed' if not faults else f'{faults} faults'} in {time.monotonic() - begin:.0f} s; seed {args.seed}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
