"""A million operations on caches in two processes: `python -m tests.gates.soak`, or `make soak`."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from tests.gates import cache_model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}", flush=True)
    try:
        cache_model.run_in(given.processes, given.operations, given.seed)
    except cache_model.Failed as error:
        print(f"\n{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
