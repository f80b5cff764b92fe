"""What a peer is: it turns a case into ready calls, one for each set of K and V.

Each call is made the way the library's users would: in the layout it likes, its inputs already converted, its graph
already compiled. What a peer cannot do it refuses with a reason.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qkv.bench.inputs import Inputs


class Unavailable(Exception):
    """This peer cannot run this case here; the text says why."""


@dataclass
class Prepared:
    """Calls that are ready to be timed, and how to see a call's result as out (B, Hq, Lq, Dv), or out, dq, dk, dv."""

    calls: Sequence[Callable[[], Any]]
    read: Callable[[Any], Any]
    note: str = ""


@dataclass(frozen=True)
class Setup:
    threads: int
    isa: str | None = None  # isas.SHARED when everybody is held to it


class Peer(Protocol):
    def __init__(self, setup: Setup) -> None: ...

    def prepare(self, inputs: Inputs) -> Prepared: ...


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"{distribution} is not installed (pip install {distribution})") from None


def first_line(error: BaseException) -> str:
    """The telling line of a message: the first, but OpenVINO begins with where in its source it was thrown."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if lines[0].startswith("Exception from") else lines[0])[:160]


def as_numpy(t: Tensor) -> Any:
    """The tensor as a contiguous array; bfloat16 as its 16 bits, since NumPy has no such type."""
    t = t.contiguous()
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()


def refuse_unless(condition: bool, reason: str) -> None:
    if not condition:
        raise Unavailable(reason)
