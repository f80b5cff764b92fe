"""The README's table, from a benchmark document; put between two markers where the file has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkv.bench.chart import NAMES
from qkv.bench.report import milliseconds

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
# Row of the benchmark -> what a reader calls it. Decode by its cold figures: keys come from memory, as in use.
ROWS = {
    "full 2048 d128 {}": "full, 2,048 tokens, D 128",
    "causal 2048 d128 {}": "causal, 2,048 tokens, D 128",
    "causal 512 d64 {}": "causal, 512 tokens, D 64",
    "window 256 of 2048 d128 {}": "sliding window of 256, 2,048 tokens, D 128",
    "documents 256 of 4096 d64 {}": "documents of 256 in 4,096 tokens, D 64",
    "decode 32/32 {} cold": "one token, 4,096 keys, 32/32 heads",
    "decode 32/8 {} cold": "one token, 4,096 keys, 32/8 heads",
    "mla 128 heads 4096 {}": "MLA decode, 4,096 keys, 128 heads",
}
_TYPES = {"bf16": "bfloat16", "f32": "float32"}


def table(document: Mapping[str, Any]) -> str:
    """Ours against PyTorch's attention and the fastest other library, as medians of one run."""
    rows = {row["name"]: row for row in document["rows"]}
    lines = [_introduction(document), ""]
    lines += [
        "| call | qkv, ms | PyTorch SDPA, ms | fastest other, ms | it takes | of the machine's limit |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, title in ROWS.items():
        for short, dtype in _TYPES.items():
            row = rows.get(name.format(short))
            if row and row["contenders"]["qkv"].get("seconds"):
                lines.append(_line(row, f"{title}, {dtype}"))
    return "\n".join(lines) + "\n"


def _introduction(document: Mapping[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    others = [
        f"{NAMES[key]} {versions[key]}" for key in ("openvino", "onnxruntime", "jax", "ggml") if versions.get(key)
    ]
    known = ", ".join([f"torch {versions['torch'].partition('+')[0]}", *others])
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {known}; {document['date'][:10]}. "
        "The limit is the rate of `torch.mm`, or of reading K and V from memory, measured in the same run."
    )


def _line(row: Mapping[str, Any], title: str) -> str:
    contenders, best = row["contenders"], row["best_peer"]
    cells = [title, _time(contenders["qkv"]), _time(contenders.get("sdpa", {}))]
    if best and best != "sdpa":
        cells += [f"{_time(contenders[best])} ({NAMES[best]})"]
    else:
        cells += ["the same" if best else "–"]
    cells += [f"{row['ratio']['median']:.1f}×" if row["ratio"] else "–"]
    reached = row["limit"]["reached"]
    cells += [f"{reached['median']:.0%}" if reached else ""]
    return f"| {' | '.join(cells)} |"


def _time(contender: Mapping[str, Any]) -> str:
    seconds = contender.get("seconds")
    return milliseconds(seconds["median"]) if seconds else "–"


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replace what stands between the markers of a file that has them, else write a file of its own."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if START in text and END in text:
        before, _, rest = text.partition(START)
        after = rest.partition(END)[2]
        text = f"{before}{START}\n{table(document)}{END}{after}"
    else:
        text = table(document)
    path.write_text(text, encoding="utf-8")
