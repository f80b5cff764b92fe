"""What was measured on this machine: for which calls PyTorch's own kernel is faster than the native one.

`qkv doctor --tune` measures and writes a small JSON file; the first call of a process that has to choose between the
two reads it. Without a file the instruction set alone decides. A recording speaks for the machine, the instruction set,
the torch and the number of threads that it was made with, and for calls near those that were timed.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from qkv.backends.base import Advice, Speed
from qkv.backends.chip import cpu_name
from qkv.call.problem import Problem
from qkv.errors import RecordingWarning
from qkv.masks import causal

FORMAT = 1
VARIABLE = "QKV_TUNE"  # another path; empty: no file at all
_SURE = 1.05  # times as fast: below, nothing is said
_NEAR_KEYS, _NEAR_WIDTH = 4.0, 2.0  # a call further than so many times from what was timed is not spoken of
_FEW = 64  # queries from which on a call is prefill
_LARGEST = 1 << 20  # bytes of a file
_MOST = 1 << 40  # of a size


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
    """The points of one machine, and its speeds."""

    machine: Machine
    points: tuple[Point, ...]
    speeds: tuple[Speed, ...] = ()

    def speed(self, dtype: torch.dtype, D: int, backward: bool) -> Speed | None:
        """What was recorded of calls of that kind."""
        kind = (str(dtype).removeprefix("torch."), D, backward)
        return next((s for s in self.speeds if (s.dtype, s.D, s.backward) == kind), None)

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
    """Where the file is, or would be; None where QKV_TUNE says that there is none, or there is no home."""
    if (named := os.environ.get(VARIABLE)) is not None:
        return Path(named) if named else None
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"))
    return home / "qkv" / "tune.json" if home.is_absolute() else None


def read(path: Path) -> list[Recording]:
    """Everything in a file; none without one. ValueError for a file that is not one of these, OSError as usual."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return []
    if len(text) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST:,} bytes")
    try:
        found = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    return [_recording(entry) for entry in _list(found, "recordings")]


def write(path: Path, recording: Recording) -> None:
    """Put a recording into a file, in the place of the one of its machine. A file that is none of these is replaced.

    Of two processes that write at once, the last one's recording is in the file.
    """
    try:
        others = [r for r in read(path) if r.machine != recording.machine]
    except ValueError:
        others = []
    entries = [
        {
            **r.machine._asdict(),
            "points": [{**asdict(p.kind), **_without_kind(p)} for p in r.points],
            "speeds": [s._asdict() for s in r.speeds],
        }
        for r in (*others, recording)
    ]
    replace(path, json.dumps({"format": FORMAT, "recordings": entries}, indent=1) + "\n")


def replace(path: Path, text: str | None) -> None:
    """Write a file whole or not at all. None: only find out whether it could be written; OSError if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, new = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text or "")
        if text is not None:
            os.chmod(new, 0o644)
            os.replace(new, path)
    finally:
        Path(new).unlink(missing_ok=True)


@cache
def kept() -> tuple[Recording, ...]:
    """All recordings, read once a process. A file that cannot be read is warned of and left alone."""
    path = place()
    if path is None:
        return ()
    try:
        return tuple(read(path))
    except (ValueError, OSError) as error:
        # Nobody asked for the default place: where it is out of reach (another user's home), there is no file.
        if isinstance(error, OSError) and VARIABLE not in os.environ:
            return ()
        told = f"qkv: {path} is no recording of qkv doctor --tune ({error}). It is ignored: write it anew, or remove it"
        warnings.warn(told, RecordingWarning, stacklevel=2)
        return ()


@cache
def current(isa: str, threads: int) -> Recording | None:
    """This machine's recording for a number of threads: PyTorch's when a kind of call is first planned."""
    found = kept()
    here = Machine.here(isa)._replace(threads=threads) if found else None
    return next((recording for recording in found if recording.machine == here), None)


def forget() -> None:
    """Read the file anew when it is next asked for."""
    kept.cache_clear()
    current.cache_clear()


def _times(a: int, b: int) -> float:
    return max(a, b) / max(1, min(a, b))


def _without_kind(point: Point) -> dict[str, Any]:
    return {name: value for name, value in asdict(point).items() if name != "kind"}


def _recording(entry: Any) -> Recording:
    machine = Machine(_text(entry, "isa"), _text(entry, "cpu"), _text(entry, "torch"), _count(entry, "threads"))
    speeds = _list(entry, "speeds") if "speeds" in entry else []  # files of before have none
    return Recording(machine, tuple(map(_point, _list(entry, "points"))), tuple(map(_speed, speeds)))


def _speed(entry: Any) -> Speed:
    backward, taken = _value(entry, "backward"), [_value(entry, name) for name in ("pair", "row", "byte")]
    if not isinstance(backward, bool):
        raise ValueError(f"backward is {_short(backward)}")
    for value in taken:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"a speed is {_short(value)}")
    return Speed(_text(entry, "dtype"), _count(entry, "D"), backward, *map(float, taken))


def _point(entry: Any) -> Point:
    kind, mask = _text(entry, "kind"), _text(entry, "mask")
    if kind not in ("prefill", "decode") or mask not in ("full", "causal"):
        raise ValueError(f"it has a point of kind {kind!r} and mask {mask!r}")
    ratio = _value(entry, "ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1 / _MOST < ratio < _MOST:
        raise ValueError(f"ratio is {_short(ratio)}")
    of = Kind(kind, mask, _text(entry, "dtype"))  # type: ignore[arg-type]
    return Point(of, _count(entry, "D"), _count(entry, "group"), _count(entry, "keys"), float(ratio))


def _value(entry: Any, name: str) -> Any:
    if not isinstance(entry, Mapping) or name not in entry:
        raise ValueError(f"an entry has no {name}")
    return entry[name]


def _text(entry: Any, name: str) -> str:
    value = _value(entry, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_short(value)}")
    return value


def _count(entry: Any, name: str) -> int:
    value = _value(entry, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MOST:
        raise ValueError(f"{name} is {_short(value)}")
    return value


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than 4,300 digits
        text = f"an int of {value.bit_length()} bits"
    return text if len(text) < 40 else text[:40] + "…"


def _list(entry: Any, name: str) -> list[Any]:
    value = _value(entry, name)
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    return value
