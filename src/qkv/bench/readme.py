"""What README shows of a run: a table in Markdown, and a chart as SVG that reads well on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from qkv.bench.report import milliseconds

NAMES = {
    "qkv": "qkv",
    "sdpa": "PyTorch SDPA",
    "flex": "FlexAttention, compiled",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "jax": "JAX",
    "ggml": "llama.cpp ggml",
    "matmuls": "two matmuls, softmax",
}
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
# Row of the benchmark -> what a reader calls it, and in which types: float32, too, where another library comes close.
# Decode by its cold figures: keys come from memory, as in use. docs/speed.md has all rows.
ROWS = {
    "full 2048 d128 {}": ("full, 2,048 tokens, D 128", ("bf16", "f32")),
    "causal 2048 d128 {}": ("causal, 2,048 tokens, D 128", ("bf16", "f32")),
    "window 256 of 2048 d128 {}": ("sliding window of 256, 2,048 tokens, D 128", ("bf16",)),
    "documents 256 of 4096 d64 {}": ("documents of 256 in 4,096 tokens, D 64", ("bf16",)),
    "decode 32/32 {} cold": ("one token, 4,096 keys, 32/32 heads", ("bf16",)),
    "decode 32/8 {} cold": ("one token, 4,096 keys, 32/8 heads", ("bf16",)),
}
HEAD = """\
| call | qkv, ms | PyTorch SDPA, ms | fastest other, ms | it takes | of `torch.mm`, or of reading |
|---|---:|---:|---:|---:|---:|"""
_TYPES = {"bf16": "bfloat16", "f32": "float32"}
# Rows of the chart: name of the benchmark row, title for a reader.
PANELS = (
    ("full 2048 d128 bf16", "Full attention, 2,048 tokens, bfloat16"),
    ("causal 2048 d128 f32", "Causal, 2,048 tokens, float32"),
    ("causal 2048 d128 bf16", "Causal, 2,048 tokens, bfloat16"),
    ("window 256 of 2048 d128 bf16", "Sliding window of 256, 2,048 tokens, bfloat16"),
    ("decode 32/8 bf16 cold", "One new token, 4,096 keys from memory, 32/8 heads, bfloat16"),
    ("decode 32/32 f32 cold", "One new token, 4,096 keys from memory, 32/32 heads, float32"),
    ("mla 128 heads 4096 bf16", "Latent attention (MLA) decode, 128 heads, 4,096 keys, bfloat16"),
)
_SHOWN = 4  # bars a panel: ours and the fastest others
_LONGEST = 8.0  # times as long as ours; longer bars are cut and marked
_WIDTH, _LABEL, _BAR, _LINE, _PANEL = 760, 190, 430, 20, 34

_STYLE = """
.t{font:600 15px system-ui,sans-serif;fill:#1f2328}.p{font:600 13px system-ui,sans-serif;fill:#1f2328}
.n{font:12px system-ui,sans-serif;fill:#59636e}.m{font:600 12px system-ui,sans-serif;fill:#1f2328}
.o{fill:#b7bec7}.q{fill:#0969da}.c{stroke:#fff;stroke-width:2}
@media (prefers-color-scheme:dark){
.t,.p,.m{fill:#f0f6fc}.n{fill:#9198a1}.o{fill:#3d444d}.q{fill:#4493f8}.c{stroke:#0d1117}}
""".strip()


def table(documents: Sequence[Mapping[str, Any]]) -> str:
    """Ours against PyTorch's attention and the fastest other library: medians of one run for each processor."""
    lines = [HEAD]
    for document in documents:
        rows = {row["name"]: row for row in document["rows"]}
        measured = [
            line(rows[name.format(short)], f"{title}, {_TYPES[short]}")
            for name, (title, types) in ROWS.items()
            for short in types
            if name.format(short) in rows and rows[name.format(short)]["contenders"]["qkv"].get("seconds")
        ]
        lines += [f"| **{made_on(document)}, {document['date'][:10]}** | | | | | |", *measured]
    return "\n".join(lines) + "\n"


def made_on(document: Mapping[str, Any]) -> str:
    """The processor of a run, its threads, and the instruction set that ours took or that everybody was held to."""
    machine, isa = document["machine"], document["settings"].get("isa")
    paths = (row["contenders"]["qkv"].get("path", "") for row in document["rows"])
    taken = next((path.rpartition(", ")[2] for path in paths if "instruction set" in path), "")
    parts = [machine["cpu"], f"{machine['threads']} threads", f"everybody held to {isa}" if isa else taken]
    return ", ".join(part for part in parts if part)


def line(row: Mapping[str, Any], title: str) -> str:
    """A line of the table whose head is HEAD."""
    contenders, best = row["contenders"], row["best_peer"]
    cells = [title, milliseconds_of(contenders["qkv"]), milliseconds_of(contenders.get("sdpa", {}))]
    if best and best != "sdpa":
        cells += [f"{milliseconds_of(contenders[best])} ({NAMES[best]})"]
    else:
        cells += ["the same" if best else "–"]
    cells += [f"{row['ratio']['median']:.1f}×" if row["ratio"] else "–", reached(row)]
    return f"| {' | '.join(cells)} |"


def reached(row: Mapping[str, Any]) -> str:
    """The part of the machine's own rate that ours reaches, and of which."""
    part, kind = row["limit"]["reached"], {"gemm": "mm", "read": "read"}.get(row["limit"]["kind"])
    return f"{part['median']:.0%} of {kind}" if part else ""


def milliseconds_of(contender: Mapping[str, Any]) -> str:
    """The median of a contender, or a dash where it was not timed."""
    seconds = contender.get("seconds")
    return milliseconds(seconds["median"]) if seconds else "–"


def write(path: Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Replace what stands between the markers of a file that has them, else write a file of its own."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if START in text and END in text:
        before, _, rest = text.partition(START)
        after = rest.partition(END)[2]
        text = f"{before}{START}\n{table(documents)}{END}{after}"
    else:
        text = table(documents)
    path.write_text(text, encoding="utf-8")


def svg(document: Mapping[str, Any], panels: Sequence[tuple[str, str]] = PANELS) -> str:
    """Draw a benchmark document (see `report.document`); rows that were not measured are left out."""
    rows = {row["name"]: row for row in document["rows"]}
    parts: list[str] = []
    y = 46
    for name, title in panels:
        bars = _bars(rows[name]) if name in rows else []
        if len(bars) < 2:
            continue
        y += _PANEL
        parts.append(f'<text class="p" x="16" y="{y - 9}">{escape(title)}</text>')
        for bar in bars:
            parts += _bar(bar, bars, y)
            y += _LINE
    machine, versions = document["machine"], document["versions"]
    title = f"Attention on the CPU, milliseconds a call: {machine['threads']} threads of {machine['cpu']}"
    known = [f"{NAMES[key]} {versions[key]}" for key in ("openvino", "onnxruntime", "jax", "ggml") if versions.get(key)]
    foot = ", ".join([f"torch {versions['torch'].partition('+')[0]}", *known, document["date"][:10]])
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 34}" width="{_WIDTH}" height="{y + 34}" '
        f'role="img" aria-label="{escape(title)}"><style>{_STYLE}</style>'
    )
    return "\n".join(
        [
            head,
            f'<text class="t" x="16" y="26">{escape(title)}</text>',
            '<text class="n" x="16" y="44">medians, shorter is better; '
            f"a cut bar is more than {_LONGEST:g} times as long as ours</text>",
            *parts,
            f'<text class="n" x="16" y="{y + 24}">{escape(foot)}</text>',
            "</svg>\n",
        ]
    )


def _bars(row: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(name, seconds, times as long as ours): ours first, then the fastest others of the row's own type."""
    times = {
        name: (contender["seconds"]["median"], contender["times_ours"]["median"])
        for name, contender in row["contenders"].items()
        if name in NAMES and contender.get("agrees") and contender.get("times_ours")
    }
    if "qkv" not in times:
        return []
    others = sorted((name for name in times if name != "qkv"), key=times.__getitem__)[: _SHOWN - 1]
    return [(name, *times[name]) for name in ("qkv", *others)]


def _bar(bar: tuple[str, float, float], bars: Sequence[tuple[str, float, float]], y: int) -> list[str]:
    contender, seconds, ratio = bar
    longest = min(_LONGEST * bars[0][1], max(seconds for _, seconds, _ in bars))
    length = max(2.0, _BAR * min(seconds, longest) / longest)
    colour = "q" if contender == "qkv" else "o"
    times = "" if contender == "qkv" else f'<tspan class="n">  {ratio:.1f}×</tspan>'
    parts = [
        f'<text class="{"m" if contender == "qkv" else "n"}" x="{_LABEL}" y="{y + 11}" text-anchor="end">'
        f"{escape(NAMES[contender])}</text>",
        f'<rect class="{colour}" x="{_LABEL + 8}" y="{y}" width="{length:.1f}" height="14" rx="2"/>',
        f'<text class="m" x="{_LABEL + 14 + length:.1f}" y="{y + 11}" xml:space="preserve">'
        f"{milliseconds(seconds)}{times}</text>",
    ]
    if seconds > longest:
        x = _LABEL + length - 6
        parts.append(f'<path class="c" fill="none" d="M{x:.1f} {y + 16}l5 -18m3 0l-5 18"/>')
    return parts
