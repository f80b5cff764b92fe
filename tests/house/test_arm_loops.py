"""What the inner loops for ARM come to in instructions: nothing here can time them, so counts are held instead."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kit import loops, skips
from tests.kit.loops import Loop

ROOT = Path(__file__).parents[2]
SOURCES = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
OBJDUMP = "aarch64-linux-gnu-objdump"


class Hot(NamedTuple):
    """The loop with the most products among the functions that match, and what it has to come to."""

    isa: str
    source: str
    function: str
    products: int
    loads: int  # for so many products, at most


FLOAT, PAIRS, HALVES = r"<Plain<float, float> >::", r"<Paired<Pairs> >::", r"<Halves<VF> >::"
HOT = [
    # Many rows: 8 keys, or columns, by 3 vectors of queries. Gradients: 4 rows by 4 vectors.
    *(
        hot
        for isa, elements in (("neon", FLOAT), ("neonbf16", PAIRS), ("neonbf16", FLOAT))
        for hot in (
            Hot(isa, "forward", f"Lanes{elements}all_scores<3, false, false>", 24, 11),
            Hot(isa, "forward", f"Lanes{elements}all_scores<3, false, true>", 24, 11),
            Hot(isa, "forward", f"Lanes{elements}all_scores<3, true, true>", 24, 11),
            Hot(isa, "forward", f"Lanes{elements}all_values<3, false>", 24, 13),
            Hot(isa, "backward", f"Product{elements}columns<4>", 16, 8),
        )
    ),
    # Few rows: as many keys by rows as there are sums in a vector, and 16 sums of values.
    Hot("neon", "forward", f"Dots{FLOAT}all_scores", 4, 5),
    Hot("neon", "forward", f"Dots{HALVES}all_scores", 8, 9),
    Hot("neonbf16", "forward", f"Dots{PAIRS}all_scores", 4, 5),
    Hot("neon", "forward", f"Dots{FLOAT}all_values<4, 4, false>", 16, 8),
    Hot("neon", "forward", f"Dots{HALVES}all_values<4, 4, false>", 16, 6),
    Hot("neonbf16", "forward", f"Dots{PAIRS}all_values<4, 4, false>", 16, 8),
]


@cache
def found(isa: str, source: str) -> list[Loop]:
    """The loops of an object of make test-arm that was compiled after the last change of the sources."""
    changed = max(path.stat().st_mtime for path in SOURCES)
    folder = ROOT / f"build/arm/CMakeFiles/stress_{isa}.dir"
    objects = [path for path in folder.glob(f"**/{source}.cpp.o") if path.stat().st_mtime >= changed]
    if not objects or shutil.which(OBJDUMP) is None:
        pytest.skip(skips.NO_ARM_OBJECTS)
    (path,) = objects
    return [loop for name, body in loops.functions(path, OBJDUMP) for loop in loops.innermost(name, body)]


@pytest.mark.parametrize("hot", HOT, ids=lambda hot: f"{hot.isa}-{hot.function}")
def test_inner_loops_load_little_and_spill_nothing(hot: Hot) -> None:
    matching = [loop for loop in found(hot.isa, hot.source) if re.search(hot.function, loop.function)]
    widest = [x for x in loops.widest(matching) if x.loads * hot.products <= hot.loads * x.products]
    assert widest, f"no loop of {hot.function} is as it was: {[(x.products, x.loads) for x in matching]}"
    for loop in widest:
        assert loop.products >= hot.products, loop
        assert not loop.spills, loop


def test_loops_are_read_as_they_are() -> None:
    def body(*lines: str) -> list[loops.Instruction]:
        return [loops.Instruction(4 * i, *line.split(" ", 1)) for i, line in enumerate(lines)]

    (loop,) = loops.innermost("f", body(
        "mov x0, x1",
        "ldp q1, q2, [x0], #32",  # 4: of the outer loop alone
        "ldp q3, q4, [x2]",  # 8: the inner one begins
        "ld1r {v5.4s}, [x3]",
        "fmla v0.4s, v3.4s, v5.4s",
        "fmla v6.4s, v4.4s, v7.s[0]",
        "bfdot v8.4s, v3.8h, v5.8h",
        "fmla s9, s3, v5.s[0]",
        "str q8, [sp, #16]",
        "b.ne 8 <f+0x8>",
        "cbnz x5, 4 <f+0x4>",
        "ret x30",
    ))  # fmt: skip
    assert (loop.products, loop.loads, len(loop.spills), len(loop.body)) == (3, 3, 1, 8)
