"""`qkv demo --long`: a million tokens of a sparse call on this machine, beside PyTorch as long as that fits."""

from __future__ import annotations

import sys
from pathlib import Path

from qkv.backends.amounts import duration
from qkv.cli.demo import contenders, lengths, plot
from qkv.cli.demo.screen import WIDTH
from qkv.cli.progress import Progress
from qkv.errors import ArgumentError
from qkv.insight.terminal import amount, bar, columns, fit, is_terminal, paint

TOKENS, LEAST = 1_000_000, 512
_BOTH = "{}"  # in --svg: a file for each theme of a page


def run(tokens: int, svg: str | None) -> int:
    """Measure, print and draw; return the exit code."""
    if tokens < LEAST:
        rule = f"--tokens must be at least {LEAST}"
        raise ArgumentError.of("qkv demo --long", rule, str(tokens), "Leave it out for 1,000,000")
    wide = min(WIDTH, columns())
    print(paint(fit(f"qkv demo --long · {contenders.MASK!r}", wide), "bold"))
    print(f"{contenders.HEADS} heads, D {contenders.SIZE}, bfloat16; {_expected(tokens)}")
    found = lengths.Found([])
    with Progress("qkv demo --long") as progress:
        progress.say("drawing queries, keys and values at random")
        last = ("", 0)

        def show(name: str, L: int, done: int) -> None:
            nonlocal last
            if is_terminal(sys.stderr) or last != (name, L):  # elsewhere a line for each call is enough
                progress.say(f"{name}, {L:,} tokens {bar(done / L, 20)} {done / L:4.0%}")
            last = (name, L)

        for found in lengths.run(tokens, show):
            progress.show(_row(found))
    print("\n".join(_summary(found, wide)))
    if svg is not None:
        print(f"written: {', '.join(map(str, _written(found, svg)))}")
    return 0


def _expected(tokens: int) -> str:
    each = [lengths.predicted(L) for L in lengths.lengths(tokens)]
    known = [seconds for seconds in each if seconds is not None]
    if len(known) < len(each):
        return "how long that takes is not known here"
    return f"{tokens:,} tokens: about {duration(known[-1])}, all lengths {duration(sum(known))}"


def _row(found: lengths.Found) -> str:
    L = max(found.lines[0].times)
    parts = [f"{L:>9,} tokens"]
    for line in found.lines:
        if L in line.times:
            parts.append(f"{line.name} {duration(line.times[L])}, {amount(line.bytes[L], 'B', 1024)}")
    return " · ".join(parts)


def _summary(found: lengths.Found, wide: int) -> list[str]:
    lines = ["", *plot.drawn(found, wide), ""]
    for line in found.lines:
        if line.stopped:
            lines.append(fit(f"{line.name} stops: {line.stopped}", wide))
    first, last = min(found.lines[0].times), max(found.lines[0].times)
    times, sizes = found.lines[0].times, found.lines[0].bytes
    grown = f"{last / first:.0f} times the tokens: {times[last] / times[first]:.0f} times the time"
    lines.append(fit(f"{grown}, {sizes[last] / sizes[first]:.0f} times the memory", wide))
    checks = f"rows against float64: {found.rows:.1e} of {found.largest:.2f}"
    lines.append(fit(f"{checks}; against PyTorch, where both ran: {found.agreed:.1e}", wide))
    lines.append(paint(fit("the plan of the longest: qkv plan --shape " + _shape(last), wide), "dim"))
    return lines


def _shape(tokens: int) -> str:
    return f"hq={contenders.HEADS},lq={tokens},d={contenders.SIZE}"


def _written(found: lengths.Found, name: str) -> list[Path]:
    themes = ("light", "dark") if _BOTH in name else ("",)
    paths = []
    for theme in themes:
        path = Path(name.replace(_BOTH, theme))
        path.write_text(plot.svg(found, theme), encoding="utf-8")
        paths.append(path)
    return paths
