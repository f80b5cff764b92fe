"""The inner loops of compiled kernels, from their disassembly: how many products they make for each load, and spills.

What a loop needs no machine for: how fast it runs is for `qkv bench` to say.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LABEL = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$")
_BRANCH = re.compile(r"^(?:b|b\.\w+|cbn?z|tbn?z)$")
_TARGET = re.compile(r"\b([0-9a-f]+) <")
_PRODUCTS = frozenset(("fmla", "bfdot"))


@dataclass(frozen=True)
class Instruction:
    at: int
    name: str
    operands: str


@dataclass(frozen=True)
class Loop:
    """A loop that has no other inside."""

    function: str
    body: tuple[Instruction, ...]

    @property
    def products(self) -> int:
        """Vector products; products of single numbers are not what a loop is for."""
        return sum(i.name in _PRODUCTS and i.operands.startswith("v") for i in self.body)

    @property
    def loads(self) -> int:
        """Registers loaded: a pair counts twice."""
        return sum(2 if i.name.startswith("ldp") else 1 for i in self.body if i.name.startswith("ld"))

    @property
    def spills(self) -> list[Instruction]:
        """What is kept on the stack because registers were too few."""
        return [i for i in self.body if i.name.startswith("st") and re.search(r"\[(?:sp|x29)\b", i.operands)]

    def __str__(self) -> str:
        lines = "\n".join(f"    {i.name} {i.operands}" for i in self.body)
        return f"{self.function}: {self.products} products, {self.loads} loads, {len(self.spills)} spills\n{lines}"


def functions(path: Path, objdump: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The functions of an object, by their names without namespaces."""
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name, body = "", list[Instruction]()
    for line in text.splitlines():
        if found := _LABEL.match(line):
            if name:
                yield name, body
            name, body = re.sub(r"\b(?:qkv|neonbf16|neon|\(anonymous namespace\))::", "", found[1]), []
        elif found := _INSTRUCTION.match(line):
            body.append(Instruction(int(found[1], 16), found[2], found[3]))
    if name:
        yield name, body


def innermost(name: str, body: list[Instruction]) -> Iterator[Loop]:
    """The function's loops that have no other inside."""
    places = {instruction.at: i for i, instruction in enumerate(body)}
    spans = set()
    for i, instruction in enumerate(body):
        target = _TARGET.search(instruction.operands) if _BRANCH.match(instruction.name) else None
        start = places.get(int(target[1], 16)) if target else None
        if start is not None and start <= i:
            spans.add((start, i))
    for first, last in sorted(spans):
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            yield Loop(name, tuple(body[first : last + 1]))


def widest(loops: list[Loop]) -> list[Loop]:
    """Those with the most products."""
    most = max((loop.products for loop in loops), default=0)
    return [loop for loop in loops if loop.products == most]
