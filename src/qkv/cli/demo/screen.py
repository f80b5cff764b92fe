"""How the demo's findings are drawn: 24 lines of 80 columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from qkv.cli.demo.lookup import Found
from qkv.cli.demo.measure import HEADS, KEYS, KV_HEADS, Agreement, Timing
from qkv.cli.demo.passages import Text
from qkv.cli.demo.words import stem
from qkv.insight.terminal import bar, cells, fit, pad, paint, table

WIDTH, LINES = 80, 24  # the first screen fits the smallest terminal in use
NO_KERNELS = "no native kernels here, so qkv is slow: qkv doctor says how to get them"
HIT_LINES = (3, 2, 1, 1, 1)  # lines quoted of each passage

_WORD = re.compile(r"[^\W_]+")
_EMPHASIS = re.compile(r"\*{1,2}(?=\S)([^*]+)(?<=\S)\*{1,2}")


def first(
    text: Text,
    found: Found,
    agreed: Agreement,
    timings: list[Timing],
    said: str = "",
    absent: Sequence[str] = (),
    last: bool = True,
) -> str:
    """Return the first screen.

    `said`: a prompt and what a model trained on the text makes of it. `absent`: what is missing here and the cure, a
    line each, never cut. `last`: whether nothing but details follow.
    """
    lines = [
        paint(fit(f"qkv demo · {text.name}, {len(text.passages):,} passages", WIDTH), "dim"),
        paint(fit(f"? {found.question}", WIDTH), "bold"),
        *_hits(found),
        paint(fit(_remark(text, found), WIDTH), "dim"),
        "",
        *_ways(found),
        *_shapes(found),
        *_agreed(agreed),
        *_timed(timings),
    ]
    lines += [*_spoken(said, LINES - len(lines) - len(absent) - 1), *absent] or [""]
    lines += [hint()] if last else []
    return "\n".join(line.rstrip() for line in lines)


def hint() -> str:
    """What to try next."""
    return paint("next: ", "dim") + 'qkv why scale · qkv demo FILE --ask "…" --full · qkv doctor'


def _hits(found: Found) -> list[str]:
    where = min(14, max(cells(hit.passage.where) for hit in found.hits))
    left = 6 + 9 + where + 2
    lines: list[str] = []
    for hit, most in zip(found.hits, HIT_LINES, strict=False):
        start = f"{hit.weight:5.3f} {bar(hit.weight, 8)} {pad(fit(hit.passage.where, where), where)}  "
        for row, line in enumerate(_quoted(hit.quote, found.words, WIDTH - left, most)):
            lines.append((" " * left if row else start) + _marked(line, found.words))
    return lines


def _quoted(quote: str, stems: frozenset[str], width: int, lines: int) -> list[str]:
    """Break a quote into at most so many lines, from a little before the first word that was asked for."""
    quote = _EMPHASIS.sub(r"\1", quote)
    words = quote.split()
    asked = [n for n, word in enumerate(words) if any(stem(w.lower()) in stems for w in _WORD.findall(word))]
    if asked and len(" ".join(words[: asked[0] + 2])) > width * lines - 2:
        quote = "…" + " ".join(words[asked[0] - 2 :])
    if cells(quote) != len(quote):  # wide letters, which textwrap counts as one cell
        return [fit(quote, width)]
    return textwrap.wrap(quote, width, max_lines=lines, placeholder="…") or [""]


def _marked(line: str, stems: frozenset[str]) -> str:
    """Set the words that the question asked for in bold."""
    return _WORD.sub(lambda m: paint(m[0], "bold") if stem(m[0].lower()) in stems else m[0], line)


def _remark(text: Text, found: Found) -> str:
    if not found.known:
        return "no word of the question occurs in the text: every weight is the same"
    rest = max(0.0, 1.0 - sum(hit.weight for hit in found.hits))
    others = found.weights.shape[3] - len(found.hits)
    remark = f"{rest:5.3f} on the other {others:,} passages together" if others else "that is the whole text"
    return f"{remark} ({text.note})" if text.note else remark


def _ways(found: Found) -> list[str]:
    rows = [["same lookup, 3 ways", "top weight", "passages", "words nearest to what comes back"]]
    rows += [[f"{way.name}: {way.how}", f"{way.largest:.3f}", f"{way.passages:,.1f}", ""] for way in found.ways]
    lines = table(rows, "<>>").split("\n")
    left = cells(lines[0].partition("words nearest")[0])
    for index, way in enumerate(found.ways, 1):
        words = list(way.words)
        while words and left + cells(", ".join(words)) > WIDTH:
            words.pop()
        lines[index] = pad(lines[index], left) + ", ".join(words)
    return [fit(line, WIDTH) for line in lines]


def _shapes(found: Found) -> list[str]:
    f = found.features
    n, d, dv = f.k.shape[2], f.k.shape[3], f.v.shape[3]
    lines = [
        f"x (1, {f.size}) question, ({n}, {f.size}) passages: word counts, nothing trained",
        f"q = x W_Q (1, {d}) · k = x W_K ({n}, {d}) · v = x W_V ({n}, {dv}), W random",
        f"q kᵀ/√{d} = scores (1, {n}) → softmax (1, {n}) · v = out (1, {dv})",
    ]
    return [fit(line, WIDTH) for line in lines]


def _agreed(agreed: Agreement) -> list[str]:
    count = len(agreed.errors)
    verb = "backends agree" if count > 1 else "backend agrees"
    return [fit(f"{count} {verb} with float64 to {agreed.worst:.1e} ({', '.join(agreed.errors)})", WIDTH)]


def _spoken(said: str, room: int) -> list[str]:
    if not said:
        return []
    spoken = " ".join(f"a model of 1.2 M weights, trained on this text by qkv train: {said}".split())
    return textwrap.wrap(spoken, WIDTH, max_lines=max(1, min(2, room)), placeholder="…")


def _timed(timings: list[Timing]) -> list[str]:
    lines = []
    for timing in timings:
        theirs, ours = timing.medians
        lines.append(
            fit(
                f"decode over {KEYS:,} keys, {HEADS}/{KV_HEADS} heads, {timing.dtype + ':':<9} "
                f"PyTorch {milliseconds(theirs)}, qkv {milliseconds(ours)} ms, {theirs / ours:.1f}×",
                WIDTH,
            )
        )
    return lines


def milliseconds(value: float) -> str:
    """A time as the screen shows it."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
