"""The backends that tests ask: those that this machine has to run, and those that qkv says it can."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

import qkv

ISAS = {  # of each instruction set, what a processor has to have
    words[0]: set(words[3:])
    for line in (Path(__file__).parents[2] / "csrc/isas.def").read_text().splitlines()
    if (words := line.partition("#")[0].split())
}


def required() -> tuple[str, ...]:
    """What has to run here, found without asking qkv: the Python ones, and the native ones this machine can execute."""
    names = ["reference", "tiled"]
    if importlib.util.find_spec("qkv._native") is not None:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        told = next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "")
        # Linux writes avx512_bf16 for avx512bf16, and asimd for simd.
        flags = set(told.replace("_", "").replace("asimd", "simd").split())
        names += [f"cpu:{isa}" for isa, needed in ISAS.items() if needed <= flags]
    return tuple(names)


@cache
def available() -> tuple[str, ...]:
    """The backends that qkv says it can run here. "cpu" alone is one of its instruction sets, so it is not listed."""
    x = torch.ones(1, 1, 2, 8)
    found = []
    for name in ("reference", "tiled", "sdpa", *(f"cpu:{isa}" for isa in ISAS)):
        try:
            qkv.attention(x, x, x, backend=name)
            found.append(name)
        except qkv.UnsupportedError:
            continue
    return tuple(found)


def for_mutants() -> tuple[str, ...]:
    """The instruction sets that the mutants are built for: the best that this machine runs, and the portable one."""
    native = [name.removeprefix("cpu:") for name in required() if name.startswith("cpu:")]
    return (*native[:1], *native[1:][-1:])


def promising() -> tuple[str, ...]:
    """All but PyTorch's own, which promises no bound, may read what is hidden, and has no lse."""
    return tuple(name for name in available() if name != "sdpa")


def mentions(spec: Any, kind: str) -> bool:
    """Whether a mask has a part of that kind."""
    if not isinstance(spec, tuple) or not spec:
        return False
    return spec[0] == kind or any(mentions(part, kind) for part in spec[1:])


def may_refuse(backend: str | None, config: Any) -> bool:
    """Which calls a backend is allowed to turn down. The Python ones take everything, and so does qkv's own choice."""
    if backend is None or not backend.startswith(("cpu", "sdpa")):
        return False
    needs_python = mentions(config.mask, "mask_mod") or any(term[0] == "score_mod" for term in config.bias)
    return backend == "sdpa" or needs_python


if __name__ == "__main__":
    print(";".join(for_mutants()))  # for CMake
