"""The tensors that a trace was made from, kept by reference and looked at again on demand."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from qkv.errors import ArgumentError
from qkv.masks import Sizes
from qkv.observation import Part


@dataclass(frozen=True, eq=False)
class Held:
    """The parts of a call, and in which state their tensors were when they were looked at."""

    parts: tuple[Part, ...]
    out: Tensor
    versions: tuple[tuple[str, Tensor, int | None], ...] = field(default=())

    @classmethod
    def of(cls, parts: tuple[Part, ...], out: Tensor) -> Held:
        named = {id(t): (name, t) for part in parts for name, t in zip("qkv", part.inputs[:3], strict=True)}
        return cls(parts, out, tuple((name, t, _version(t)) for name, t in named.values()))

    def part_of(self, call: str, b: int) -> Part:
        """The part that batch row b is in; raises where a tensor was changed since."""
        for name, t, version in self.versions:
            if version is not None and _version(t) != version:
                rule = f"{name} must not be changed in place between qkv.see() and {call}"
                given = f"{name} {tuple(t.shape)} changed {t._version - version} time(s)"
                raise ArgumentError.of(call, rule, given, "Call qkv.see() again, or give it copies")
        part = next(part for part in self.parts if b in part.sequences)
        if part.problem.mask is not None:
            p = part.problem
            p.mask.check(call, Sizes(p.B, p.Hq, p.Lq, p.Lk, p.dtype, part.inputs.q.device))  # type: ignore[union-attr]
        return part


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version
