"""A million operations on caches in two processes: `python -m tests.gates.soak`, or `make soak`."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence

import torch

from tests.gates import cache_model

CHUNK = 10 * cache_model.EPISODE


def chunk(given: tuple[int, int]) -> tuple[Counter[str], str]:
    """Some episodes of one process: their counts, or what was broken."""
    seed, operations = given
    torch.set_num_threads(1)
    try:
        return cache_model.run(operations, seed, lambda line: None), ""
    except cache_model.Failed as error:
        return Counter(), str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}", flush=True)
    sizes = [min(CHUNK, given.operations - at) for at in range(0, given.operations, CHUNK)]
    work = [(given.seed + n * CHUNK // cache_model.EPISODE, size) for n, size in enumerate(sizes)]
    total: Counter[str] = Counter()
    done, start = 0, time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for counts, fault in pool.imap_unordered(chunk, work):
            if fault:
                print(f"\n{fault}")
                return 1
            total += counts
            done += 1
            at = sum(sizes[:done])
            line = f"{at:,} of {given.operations:,} operations, {time.perf_counter() - start:.0f} s"
            print(f"\r{line}  ", end="" if sys.stdout.isatty() else "\n", flush=True)
    print("\n" + ", ".join(f"{name} {n:,}" for name, n in sorted(total.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
