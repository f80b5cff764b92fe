"""Memory that a call takes beyond its inputs and output: the rise of the process's peak resident size.

For training it is what forward and backward take together beyond their inputs and the gradients; the output counts.

Each case runs in a process of its own (`python -m qkv.bench.memory CASE THREADS [BACKEND]`), after a small call
has loaded the code and started the threads, with the peak counter reset just before the call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from qkv.bench.budget import OUT_OF_TIME
from qkv.bench.cases import TOLERANCE, Case
from qkv.bench.inputs import build

PER_THREAD = 4 << 20
BACKWARD = 10**9
WRONG = "wrong result"
# Freed memory goes back to the system at once, so that a call cannot reuse what its inputs' construction allocated.
_ENV = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
CASES = {
    "causal 4096 f32": Case("f32", 4096, 4096, mask="causal"),
    "causal 4096 bf16": Case("bf16", 4096, 4096, mask="causal"),
    "causal 4096 f16": Case("f16", 4096, 4096, mask="causal"),
    "gqa 8/2 full 4096 bf16": Case("bf16", 4096, 4096, Hkv=2),
    "decode 8x32/8 bf16": Case("bf16", 1, 4096, B=8, Hq=32, Hkv=8),
    "mla 128 heads bf16": Case("bf16", 1, 4096, 576, Hq=128, Hkv=1, rank=512),
}
# Too long for PyTorch's attention, whose mask alone would take a gigabyte.
TRAINING = {
    f"window 1024 of 32768 d64 {dtype}": Case(dtype, 32768, 32768, 64, mask="window", size=1024, backward=True)
    for dtype in ("f32", "bf16")
}


@dataclass
class Memory:
    name: str
    extra_bytes: int
    allowed_bytes: int
    problem: str = ""

    @property
    def fits(self) -> bool:
        return not self.problem and self.extra_bytes <= self.allowed_bytes


def allowed(case: Case, threads: int) -> int:
    """Packed K and V (float16 packs as float32, which it is computed in) and 4 MB a thread; 1 GB for training."""
    if case.backward:
        return BACKWARD
    packed = 2 * case.kv_bytes if case.dtype == "f16" else case.kv_bytes
    return packed + PER_THREAD * threads


def measure_all(
    names: Iterable[str], threads: int, backend: str | None, seconds: float, say: Callable[[str], None]
) -> list[Memory]:
    """Run cases one after the other; those that have not ended after `seconds` together have a problem instead."""
    end = time.perf_counter() + seconds
    measured = []
    for name in names:
        say(f"memory, {name}")
        measured.append(measure(name, threads, backend, end - time.perf_counter()))
    return measured


def measure(name: str, threads: int, backend: str | None, seconds: float = 300.0) -> Memory:
    """Run one case in a fresh process, for so many seconds at most."""
    command = [sys.executable, "-m", "qkv.bench.memory", name, str(threads), *([backend] if backend else [])]
    bound = allowed({**CASES, **TRAINING}[name], threads)
    if seconds <= 0:
        return Memory(name, 0, bound, OUT_OF_TIME)
    try:
        done = subprocess.run(
            command, env=_ENV | os.environ, capture_output=True, text=True, timeout=seconds, check=False
        )
        if done.returncode == 0:
            return Memory(name, int(json.loads(done.stdout.splitlines()[-1])), bound)
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Memory(name, 0, bound, lines[-1][:160])
    except subprocess.TimeoutExpired:
        return Memory(name, 0, bound, OUT_OF_TIME)
    except (OSError, ValueError, IndexError) as error:
        return Memory(name, 0, bound, f"{type(error).__name__}: {error}"[:160])


def summary(results: list[Memory], *, training: bool = False) -> str:
    """A line a case, with the verdict."""
    lines = ["Memory beyond inputs and output (allowed: packed K and V + 4 MB a thread):"]
    if training:
        lines = ["Memory of forward + backward beyond inputs and gradients:"]
    for r in results:
        verdict = r.problem or ("pass" if r.fits else "miss")
        lines.append(f"  {r.name:<31} {r.extra_bytes / 1e6:8.1f} MB of {r.allowed_bytes / 1e6:6.1f} MB  {verdict}")
    return "\n".join(lines)


def as_data(results: list[Memory]) -> list[dict[str, object]]:
    return [{**asdict(r), "fits": r.fits} for r in results]


def status(field: str) -> int:
    """A size of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _extra(case: Case, backend: str | None) -> int:
    import torch

    from qkv.bench.peers.base import Setup
    from qkv.bench.peers.torch import Qkv

    ours = Qkv(Setup(torch.get_num_threads()), backend)
    with torch.no_grad():
        small = Case(**{**case.__dict__, "Lq": min(case.Lq, 64), "Lk": min(case.Lk, 64), "B": 1})
        ours.prepare(build(small)).calls[0]()
        inputs = build(case)
        ready = ours.prepare(inputs)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        result = ready.calls[0]()
        peak = status("VmHWM")
    error = inputs.error(ready.read(result))
    if error > TOLERANCE[case.dtype]:
        raise SystemExit(f"{WRONG}: relative error {error:.1e}")  # memory that was not used to compute says nothing
    returned: list[torch.Tensor] = list(result[1:]) if case.backward else [result]
    return max(0, peak - before - sum(t.nbytes for t in returned))


def main() -> int:
    import torch

    name, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    print(json.dumps(_extra({**CASES, **TRAINING}[name], sys.argv[3] if len(sys.argv) > 3 else None)))
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
