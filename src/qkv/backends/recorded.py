"""What was measured on this machine: for which calls PyTorch's own kernel is faster than the native one.

`qkv doctor --tune` measures and writes a small JSON file; the first call of a process that has to choose between the
two reads it. Without a file the instruction set alone decides. A recording speaks for the machine, the instruction set,
the torch and the number of threads that it was made with, and for calls near those that were timed.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from qkv.backends.base import Advice
from qkv.backends.chip import cpu_name
from qkv.call.problem import Problem
from qkv.errors import RecordingWarning
from qkv.masks import causal

FORMAT = 1
VARIABLE = "QKV_TUNE"  # another path; empty: no file at all
_SURE = 1.05  # times as fast: below, nothing is said
_NEAR_KEYS, _NEAR_WIDTH = 4.0, 2.0  # a call further than so many times from what was timed is not spoken of
_FEW = 64  # queries from which on a call is prefill


class Machine(NamedTuple):
    """What a recording was made with. It speaks for nothing else."""

    isa: str
    cpu: str
    torch: str
    threads: int

    @classmethod
    def here(cls, isa: str) -> Machine:
        return cls(isa, cpu_name(), torch.__version__, torch.get_num_threads())


@dataclass(frozen=True)
class Kind:
    """Calls that are compared with one another only."""

    kind: Literal["prefill", "decode"]
    mask: Literal["full", "causal"]
    dtype: str

    @classmethod
    def of(cls, problem: Problem) -> Kind | None:
        """The kind of a call that PyTorch's own kernel can do; None for those that are not timed."""
        p = problem
        if p.needs_grad or not (p.mask is None or p.mask == causal()):
            return None
        dtype = str(p.dtype).removeprefix("torch.")
        if p.Lq == 1:  # at the end it sees all keys, causal or not
            return cls("decode", "full", dtype) if p.mask is None or p.positions == "end" else None
        if p.Lq < _FEW or _times(p.Lq, p.Lk) > _NEAR_KEYS:
            return None
        return cls("prefill", "full" if p.mask is None else "causal", dtype)


@dataclass(frozen=True)
class Point:
    """A call that was timed: the time of PyTorch's own kernel is `ratio` times that of the native one."""

    kind: Kind
    D: int
    group: int
    keys: int
    ratio: float

    def distance(self, problem: Problem) -> float:
        """How far a call of its kind is from it; infinity: too far to speak of."""
        far = [_times(self.D, problem.D), _times(self.keys, problem.Lk), _times(self.group, problem.group)]
        if far[0] > _NEAR_WIDTH or far[1] > _NEAR_KEYS:
            return math.inf
        return sum(map(math.log, far))

    def __str__(self) -> str:
        return f"{self.kind.kind}, {self.kind.mask}, {self.kind.dtype}, D {self.D}, {self.keys:,} keys"


@dataclass(frozen=True)
class Recording:
    """The points of one machine."""

    machine: Machine
    points: tuple[Point, ...]

    def advice(self, problem: Problem) -> Advice | None:
        """What the nearest point says; None where none is near, or the two are as fast as each other."""
        kind = Kind.of(problem)
        near = min(
            (point for point in self.points if point.kind == kind), key=lambda p: p.distance(problem), default=None
        )
        if near is None or math.isinf(near.distance(problem)):
            return None
        if near.ratio >= _SURE:
            return Advice("cpu", f"measured faster here: {near.ratio:.2f} times as fast ({near})")
        if near.ratio <= 1 / _SURE:
            return Advice("sdpa", f"measured faster here: {1 / near.ratio:.2f} times as fast ({near})")
        return None


def place() -> Path | None:
    """Where the file is, or would be; None where QKV_TUNE says that there is none."""
    if (named := os.environ.get(VARIABLE)) is not None:
        return Path(named) if named else None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "qkv" / "tune.json"


def read(path: Path) -> list[Recording]:
    """Everything in a file; none without one. ValueError for a file that is not one of these, OSError as usual."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    return [_recording(entry) for entry in _list(found, "recordings")]


def write(path: Path, recording: Recording) -> None:
    """Put a recording into a file, in the place of the one of its machine. A file that cannot be read is replaced."""
    try:
        others = [r for r in read(path) if r.machine != recording.machine]
    except ValueError:
        others = []
    entries = [
        {**r.machine._asdict(), "points": [{**asdict(p.kind), **_without_kind(p)} for p in r.points]}
        for r in (*others, recording)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps({"format": FORMAT, "recordings": entries}, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


@cache
def current(isa: str) -> Recording | None:
    """This machine's recording, read once; None without one. A file that cannot be read is warned of and left alone."""
    path = place()
    if path is None:
        return None
    try:
        found = read(path)
    except (ValueError, OSError, RecursionError) as error:
        told = f"qkv: {path} is no recording of qkv doctor --tune ({error}). It is ignored: write it anew, or remove it"
        warnings.warn(told, RecordingWarning, stacklevel=2)
        return None
    here = Machine.here(isa) if found else None
    return next((recording for recording in found if recording.machine == here), None)


def _times(a: int, b: int) -> float:
    return max(a, b) / max(1, min(a, b))


def _without_kind(point: Point) -> dict[str, Any]:
    return {name: value for name, value in asdict(point).items() if name != "kind"}


def _recording(entry: Any) -> Recording:
    machine = Machine(_text(entry, "isa"), _text(entry, "cpu"), _text(entry, "torch"), _count(entry, "threads"))
    return Recording(machine, tuple(map(_point, _list(entry, "points"))))


def _point(entry: Any) -> Point:
    kind, mask = _text(entry, "kind"), _text(entry, "mask")
    if kind not in ("prefill", "decode") or mask not in ("full", "causal"):
        raise ValueError(f"it has a point of kind {kind!r} and mask {mask!r}")
    ratio = _value(entry, "ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise ValueError(f"ratio is {ratio!r}")
    of = Kind(kind, mask, _text(entry, "dtype"))  # type: ignore[arg-type]
    return Point(of, _count(entry, "D"), _count(entry, "group"), _count(entry, "keys"), float(ratio))


def _value(entry: Any, name: str) -> Any:
    if not isinstance(entry, Mapping) or name not in entry:
        raise ValueError(f"an entry has no {name}")
    return entry[name]


def _text(entry: Any, name: str) -> str:
    value = _value(entry, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}")
    return value


def _count(entry: Any, name: str) -> int:
    value = _value(entry, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}")
    return value


def _list(entry: Any, name: str) -> list[Any]:
    value = _value(entry, name)
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    return value
