"""A trace for a terminal: the call, the mask, the heads, and one pooled map."""

from __future__ import annotations

import math
import textwrap

import torch
from torch import Tensor

from qkv.insight.record import Head, Record
from qkv.insight.terminal import amount, cells, columns, fit, number, paint, table

_SHADES = " ░▒▓█"
_ASCII = " .:*#"
_ROWS = 16
_MOST_HEADS = 16


def text_of(trace: Record, *, width: int | None = None, ascii: bool = False) -> str:
    """The trace, `width` columns wide."""
    width = columns() if width is None else max(40, width)
    s = trace.shapes
    kv = "" if s.Hkv == s.Hq else f", {s.Hkv} of keys and values"
    batch = f"{s.B} x " if s.B != 1 else ""
    lines = [
        f"call     {batch}{s.Hq} head{'s' if s.Hq != 1 else ''}{kv}, {s.Lq:,} queries, {s.Lk:,} keys, "
        f"D {s.D}, Dv {s.Dv}",
        f"         {trace.dtype} on {trace.device}, backend {trace.backend}, scale {number(trace.scale)}"
        + (f", softcap {number(trace.softcap)}" if trace.softcap is not None else "")
        + (f", bias {', '.join(trace.bias)}" if trace.bias else "")
        + (", learned sinks" if trace.sinks is not None else ""),
        f"cost     {amount(trace.flops, 'FLOP')}, {amount(trace.bytes, 'B', 1024)} of inputs and output",
        f"mask     {trace.mask}",
    ]
    lines += [f"         {line}" for line in textwrap.wrap(trace.mask_words, width - 9)]
    if trace.pages is not None:
        used = {p for t in trace.pages.tables for p in t if p >= 0}
        total = sum(p >= 0 for t in trace.pages.tables for p in t)
        pages = f"{len(used):,} of {trace.pages.size} tokens; {total:,} in the tables, so {total - len(used):,} shared"
        lines.append(f"pages    {pages}")
    lines = [fit(line, width) for line in lines]
    told = [*textwrap.wrap(f"So {trace.verdict}.", width, break_long_words=False)]
    lines += ["", *(paint(line, "bold") for line in told), ""]
    for b in range(min(s.B, 4)):
        lines += _heads(trace, b, width)
    if s.B > 4:
        lines.append(f"... {s.B - 4} more batch rows: Trace.table")
    for warning in trace.warnings[:8]:
        wrapped = textwrap.wrap(warning, width - 2)
        lines += [paint(f"! {wrapped[0]}", "yellow"), *(f"  {line}" for line in wrapped[1:])]
    lines += _map(trace, width, ascii)
    text = "\n".join(line.rstrip() for line in lines).rstrip("\n")
    return text.encode("ascii", "replace").decode("ascii") if ascii else text


def _heads(trace: Record, b: int, width: int) -> list[str]:
    heads = trace.table[b]
    title = [f"batch row {b}"] if trace.shapes.B > 1 else []
    grid = [["head", "kv", "looks at", "entropy", "largest", "key 0", "distance", "sharp", "notes"]]
    for h in heads[:_MOST_HEADS]:
        grid.append([
            str(h.head), str(h.kv_head), _plain(h.effective), _plain(h.entropy), _plain(h.largest), _share(h.first),
            _plain(h.distance), _share(h.sharp), _notes(h),
        ])  # fmt: skip
    lines = [fit(line, width) for line in table(grid, ">>>>>>>><").split("\n")]
    if len(heads) > _MOST_HEADS:
        lines.append(f"... {len(heads) - _MOST_HEADS} more heads: Trace.table")
    return [*title, *lines, paint(fit(_UNITS, width), "dim"), ""]


_UNITS = "looks at: keys, e^entropy (nats); key 0: share of mass; sharp: rows over 0.99"


def _plain(x: float) -> str:
    return "-" if math.isnan(x) else number(x)


def _share(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.0%}"


def _notes(h: Head) -> str:
    notes = [
        f"{h.bad:,} NaN" if h.bad else "",
        f"{h.dead:,} dead" if h.dead else "",
        f"same as {h.twin}" if h.twin is not None else "",
        f"sink {h.learned:.0%}" if h.learned > 0 else "",
        "flat" if h.flat > 0.98 else "",
    ]
    return ", ".join(filter(None, notes))


def _map(trace: Record, width: int, ascii: bool) -> list[str]:
    """The pooled map of the first head, darker the more: each row's share of its mass, the largest cell black."""
    pooled = trace.statistics.map
    if pooled is None or not pooled.numel():
        return []
    part = pooled[0, 0].double().cpu()
    rows, wide = min(_ROWS, part.shape[0]), min(64, width - 12, part.shape[1])
    shown = _shrunk(part, rows, wide)
    shown = shown / shown.sum(1, keepdim=True).clamp(min=1e-300)
    shades = _ASCII if ascii else _SHADES
    marks = shown[shown > 0].sqrt()
    top = float(marks.quantile(0.98)) if marks.numel() else 1.0  # of a few dark cells the others would not be seen
    lines = [f"head {trace.heads[0]}: queries down, keys across; the darker, the more of a row's weight"]
    double = 2 if wide * 2 <= width - 12 and wide <= 32 else 1
    left = len(f"{trace.shapes.Lq - 1:,}")
    for r in range(rows):
        query = -(-r * part.shape[0] // rows) * trace.shapes.Lq // part.shape[0]
        line = "".join(shades[_shade(math.sqrt(float(x)) / top)] * double for x in shown[r])
        lines.append(f"{query:>{left},} {'|' if ascii else '▏'}{line}")
    last = f"{trace.shapes.Lk - 1:,}"
    lines.append(f"{'':>{left}}  0{last:>{max(wide * double - 1, len(last) + 1)}}")
    return [fit(line, width) if cells(line) > width else line for line in lines]


def _shade(part: float) -> int:
    """0 for what is lost beside the largest, else 1 to 4."""
    return 0 if part < 0.05 else min(4, 1 + int(4 * part))


def _shrunk(x: Tensor, rows: int, columns: int) -> Tensor:
    """Sums over larger bins."""
    r = torch.arange(x.shape[0], device="cpu") * rows // x.shape[0]
    c = torch.arange(x.shape[1], device="cpu") * columns // x.shape[1]
    part = torch.zeros(rows, x.shape[1], dtype=x.dtype, device="cpu").index_add_(0, r, x)
    return torch.zeros(rows, columns, dtype=x.dtype, device="cpu").index_add_(1, c, part)
