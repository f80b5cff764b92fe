"""A docstring in numpydoc, read: its sections, the entries of Parameters and Returns, and the shapes they name.

    Parameters
    ----------
    q : Tensor, shape (B, Hq, Lq, D)
        Queries.

A shape is bound against the tensors of a real call by `Shapes`: each symbol means one number throughout a call.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

SECTIONS = ("Parameters", "Attributes", "Returns", "Yields", "Raises", "See Also", "Notes", "References", "Examples")
_RULE = re.compile(r"^(.+)\n(-{3,})$", re.MULTILINE)
_SYMBOL = re.compile(r"[A-Za-z]\w*'?")
_FACTOR = re.compile(r"\d+|[A-Za-z]\w*'?")


@dataclass(frozen=True)
class Entry:
    """One entry of a section: the names it is about, what stands behind the colon, and what is said of them."""

    names: tuple[str, ...]
    kind: str
    text: str


@dataclass
class Docstring:
    summary: str
    sections: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def entries(self, section: str) -> list[Entry]:
        found = []
        for head, text in _blocks(self.sections.get(section, "")):
            names, colon, kind = head.partition(" : ")
            if not colon and section != "Parameters":  # a result without a name
                names, kind = "", head
            found.append(Entry(tuple(name.strip(" *()") for name in names.split(",")), kind.strip(), text))
        return found


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Lines without indentation, each with the indented lines below it."""
    for block in re.split(r"\n(?=\S)", text.strip("\n")):
        if block.strip():
            head, _, rest = block.partition("\n")
            yield head, inspect.cleandoc(rest)


def parse(text: str) -> Docstring:
    """Read a docstring; what is no numpydoc stands in `faults`."""
    found = [m for m in _RULE.finditer(text) if m[1].strip() and not m[1].startswith((" ", ">>>"))]
    doc = Docstring(text[: found[0].start()] if found else text)
    if not text.split("\n")[0].strip():
        doc.faults.append("the first line is empty")
    for n, m in enumerate(found):
        after = found[n + 1] if n + 1 < len(found) else None
        name = m[1]
        if name not in SECTIONS:
            doc.faults.append(f"no section is called {name!r}")
        if len(m[2]) != len(name):
            doc.faults.append(f"the line below {name} is not as long as it")
        doc.sections[name] = text[m.end() + 1 : after.start() if after else len(text)]
    known = [name for name in doc.sections if name in SECTIONS]
    if known != sorted(known, key=SECTIONS.index):
        doc.faults.append(f"the sections stand in another order than {', '.join(SECTIONS)}: {', '.join(known)}")
    for name, body in [("the summary", doc.summary), *doc.sections.items()]:
        if ">>>" in body and name != "Examples":
            doc.faults.append(f"an example stands in {name}, not in Examples")
        if name != "Raises" and re.search(r"^Raises? [A-Z]", body, re.MULTILINE):
            doc.faults.append(f"{name} says in prose what belongs into Raises")
    return doc


def check(text: str | None, parameters: Sequence[str], returns: bool) -> list[str]:
    """The faults of a function's docstring, whose signature has these parameters and returns something or nothing.

    What takes no parameters may say in one paragraph what it returns.
    """
    if not text:
        return ["it has no docstring"]
    doc = parse(text)
    told = [name for entry in doc.entries("Parameters") for name in entry.names]
    faults = list(doc.faults)
    faults += [f"Parameters has {name!r}, the signature does not" for name in told if name not in parameters]
    faults += [f"{name!r} of the signature is not in Parameters" for name in parameters if name not in told]
    faults += [f"Parameters has {name!r} twice" for name in sorted(set(told)) if told.count(name) > 1]
    if returns and (parameters or "\n\n" in text) and not {"Returns", "Yields"} & set(doc.sections):
        faults.append("it returns something, and has no section Returns")
    return faults


# --------------------------------------------------------------------------------------------------------- shapes
def shapes_of(kind: str) -> list[tuple[str, ...]]:
    """The alternatives of "Tensor, shape (B, L), or (L,) without a batch": the symbols of each dimension."""
    _, word, rest = kind.partition("shape " if "shape " in kind else "Tensor ")
    groups = re.findall(r"\(([^()]*)\)", rest) if word else []
    return [tuple(part.strip() for part in group.split(",") if part.strip()) for group in groups]


class Shapes:
    """What the symbols of a call's shapes mean, from the tensors seen so far."""

    def __init__(self, **known: int) -> None:
        self.ways: list[dict[str, Any]] = [dict(known)]  # as alternatives may fit, there may be several

    def fit(self, name: str, alternatives: Sequence[tuple[str, ...]], shape: Sequence[int]) -> str:
        """Add a tensor; what is wrong where no alternative fits, else the empty string."""
        ways = [w for way in self.ways for dims in alternatives if (w := _bound(dims, tuple(shape), way)) is not None]
        if not ways:
            wanted = " or ".join(f"({', '.join(dims)})" for dims in alternatives)
            return f"{name} has shape {tuple(shape)}, its docstring says {wanted}, where {self.ways}"
        self.ways = ways
        return ""


def _bound(dims: tuple[str, ...], shape: tuple[int, ...], way: dict[str, Any]) -> dict[str, Any] | None:
    way = dict(way)
    if dims[:1] == ("...",):
        lead = shape[: len(shape) - len(dims) + 1]
        if len(shape) < len(dims) - 1:
            return None
        way["..."] = way.get("...", lead)
        # leading dimensions broadcast
        if any(a != b and 1 not in (a, b) for a, b in zip(reversed(way["..."]), reversed(lead), strict=False)):
            return None
        dims, shape = dims[1:], shape[len(lead) :]
    if len(dims) != len(shape):
        return None
    for dim, size in zip(dims, shape, strict=True):
        if _SYMBOL.fullmatch(dim):
            if way.setdefault(dim, size) != size:
                return None
        elif (number := _value(dim, way)) is not None and size not in number:
            return None
    return way


def _value(dim: str, way: dict[str, Any]) -> tuple[int, ...] | None:
    """What "2", "1 or B", "N H", "R + dr" and "2R + 1" may be; None where a symbol is not known."""
    numbers: list[int] = []
    for choice in dim.split(" or "):
        total = 0
        for term in choice.split(" + "):
            factors = [int(x) if x.isdigit() else way.get(x) for x in _FACTOR.findall(term)]
            if None in factors:
                return None
            total += math.prod(factors)
        numbers.append(total)
    return tuple(numbers)
