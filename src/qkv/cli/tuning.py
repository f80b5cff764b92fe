"""`qkv doctor --tune`, and what `qkv doctor` says of it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from qkv.backends import recorded
from qkv.backends.cpu import instruction_sets

HELP = (
    "time the native kernel against PyTorch's own here, for a minute, and let plans know (the file that "
    f"{recorded.VARIABLE} names, else qkv/tune.json of the cache folder)"
)


def tune(native: str) -> int:
    """Time the kernels, print and write what was found; return the exit code. `native`: what is told of our kernels."""
    from qkv.bench import tuning

    path, sets = recorded.place(), instruction_sets()
    if path is None or not sets:
        why = f"{recorded.VARIABLE} is empty" if path is None else f"native kernels: {native}"
        print(f"qkv doctor --tune: nothing to write: {why}", file=sys.stderr)
        return 1
    try:
        recorded.replace(path, None)
    except OSError as error:
        return _unwritable(path, error)
    print(f"timing {len(tuning.CASES)} calls, native kernel ({sets[0]}) and PyTorch's own in turn ...", flush=True)
    found = tuning.measure(sets[0], lambda point: print(f"{point.ratio:6.2f} ×  {point}", flush=True))
    try:
        recorded.write(path, found)
    except OSError as error:
        return _unwritable(path, error)
    recorded.forget()
    slower = sum(point.ratio < 1 for point in found.points)
    print(f"the native kernel is slower in {slower} of {len(found.points)}; written to {path}")
    return 0


def _unwritable(path: Path, error: OSError) -> int:
    print(f"qkv doctor --tune: {path} cannot be written ({error})", file=sys.stderr)
    return 1


def known() -> str:
    """Return what plans know of measurements on this machine."""
    path, sets = recorded.place(), instruction_sets()
    found = recorded.current(sets[0], torch.get_num_threads()) if path is not None and sets else None
    if found is None:
        return "none of this machine, instruction set, torch and number of threads (qkv doctor --tune makes one)"
    return f"{len(found.points)} calls timed, in {path}"
