"""README's table and chart, and docs/speed.md, from the files of results: python benchmarks/speed_tables.py.

The numbers come from `qkv bench --json benchmarks/results/PROCESSOR-INSTRUCTIONSET.jsonl`, and the same with
--training, --caches, --sparse and --models; each run writes its own part of the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qkv.bench import readme, results
from qkv.bench.report import milliseconds

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path for path in (ROOT / "benchmarks" / "results").glob("*.jsonl") if path.stem not in ("decoders", "sparse_study")
)  # these two: what models learned (train_tables.py, sparse_study.py)
SHOWN = ("amd-epyc-avx512bf16", "intel-xeon-avx2")  # whose calls README shows; the chart is of the first

HEAD = """# Speed

`qkv bench` times attention beside the other libraries on your machine: results are checked against float64 first, calls
are interleaved, and a ratio is the median over rounds of times of one round
([how it is measured](../benchmarks/README.md)). `python benchmarks/speed_tables.py` writes these tables from the
files in [benchmarks/results](../benchmarks/results), one for each processor and instruction set.

Rows are named by mask, tokens, head size (d) and type; heads are query/key-value heads, 8/8 unless said. Cold: keys and
values come from memory. "of mm": the part of `torch.mm`'s rate in that type that the call reaches; above 100% says that
`torch.mm` is itself below what the processor can do (with AVX2 bfloat16 and float16 are compared with float32's rate:
theirs is a plain loop). "of read": the part of the rate at which K and V can be read.
"""
PICTURE = f"![{SHOWN[0]}: the time of each call beside the other libraries](pictures/bench.svg)"


def shown() -> list[dict[str, Any]]:
    """The calls that README shows, of each of its processors."""
    return [results.read(ROOT / "benchmarks" / "results" / f"{name}.jsonl")["calls"] for name in SHOWN]


def page() -> str:
    """The text of docs/speed.md."""
    return "\n".join([HEAD, f"{PICTURE}\n", *(processor(path) for path in FILES)])


def processor(path: Path) -> str:
    """All tables of one file."""
    runs = results.read(path)
    parts = [f"## {readme.made_on(next(iter(runs.values())))}\n"]
    for part, (title, table) in TABLES.items():
        if part in runs:
            parts += [f"### {title}\n", f"{_made_with(runs[part])}.\n", table(runs[part])]
    return "\n".join(parts)


def _made_with(run: dict[str, Any]) -> str:
    names = {"torch": "torch", "transformers": "transformers", **readme.NAMES}
    versions = {names[key]: text.partition("+")[0] for key, text in run["versions"].items() if key in names}
    shown = {name: text for name, text in versions.items() if name not in (readme.NAMES["sdpa"], "qkv")}
    shown.pop(readme.NAMES["flex"], None)
    shown.pop(readme.NAMES["matmuls"], None)
    return f"{run['date'][:10]}, {', '.join(f'{name} {text}' for name, text in shown.items())}"


def calls(run: dict[str, Any]) -> str:
    """Forward calls, each beside PyTorch's attention and the fastest other library."""
    rows = [readme.line(row, row["name"]) for row in run["rows"] if row["contenders"]["qkv"].get("seconds")]
    return "\n".join([readme.HEAD, *rows, ""])


def training(run: dict[str, Any]) -> str:
    """Forward and backward, beside PyTorch's attention."""
    rows = []
    for row in run["rows"]:
        name, (ours, theirs) = row["name"].removeprefix("training "), (row["contenders"][n] for n in ("qkv", "sdpa"))
        times = [readme.milliseconds_of(ours), readme.milliseconds_of(theirs)]
        rows.append([name, *times, _times(theirs.get("times_ours")), readme.reached(row)])
    memory = [[m["name"], f"{m['extra_bytes'] / 1e6:,.0f}", f"{m['allowed_bytes'] / 1e6:,.0f}"] for m in run["memory"]]
    return "\n".join(
        [
            _table(["call", "qkv, ms", "PyTorch SDPA, ms", "it takes", "of `torch.mm`"], rows),
            _table(["memory of forward + backward beyond inputs and gradients", "MB", "allowed, MB"], memory),
        ]
    )


def caches(run: dict[str, Any]) -> str:
    """Contests of `qkv bench --caches`; those without an opponent are counts."""
    rows = []
    for line in run["caches"]:
        times = [milliseconds(line[key]["median"]) if line[key] else "" for key in ("seconds", "opponent_seconds")]
        kind, reached = line["limit"]["kind"].replace("GEMM", "mm"), line["limit"]["reached"]
        part = f"{reached['median']:.0%} of {kind}" if reached else ""
        rows.append([line["case"], times[0], line["opponent"], times[1], _measured(line["measured"]), part])
    head = ["case (sequences × keys, heads, type)", "qkv, ms", "beside", "ms", "measured", "of mm, of read"]
    note = "× ≤: how many times as long ours takes; ×: how many times as long the other does.\n"
    return "\n".join([_table(head, rows), note])


def sparse(run: dict[str, Any]) -> str:
    """Patterns of `qkv bench --sparse`, as parts of the call without a mask, and decode with selected blocks."""
    rows, steps = [], []
    for row in run["sparse"]:
        if "step" in row:
            parts = [f"{row[how][1]:.1%}" for how in ("mean", "minmax")]
            steps.append([row["name"], f"{row['full']:.1f}", *parts, f"{row['step'][1]:.1f}×", row["verdict"]])
            continue
        needed = f" (≤ {row['needed']:.1%})" if row["needed"] else ""
        factors = [f"{row[key][1]:.1f}×" if row[key] else "" for key in ("flex", "cover")]
        back = f"{row['efficiency'][1]:.2f}" if row["efficiency"] else ""
        part = f"{row['time'][1]:.1%}{needed}"
        rows.append([row["name"], f"{row['share']:.1%}", f"{row['full']:.0f}", part, *factors, back, row["verdict"]])
    head = [
        "pattern, heads × tokens",
        "visible",
        "no mask, ms",
        "time, of that",
        "FlexAttention takes",
        "covering tiles take",
    ]
    head += ["of forward's efficiency", ""]
    decode = ["step of decode, heads × keys", "all keys, ms", "selection by mean, of that", "by minmax"]
    return "\n".join([_table(head, rows), _table([*decode, "a full step takes", ""], steps) if steps else ""])


def models(run: dict[str, Any]) -> str:
    """A token of a Hugging Face Llama of 1B shape."""
    rows = []
    for m in run["models"]:
        ratio = f"{m['ratio'][1]:.1f}×"
        rows.append([f"{m['context']:,}", m["cache"], f"{m['ours']:.1f}", f"{m['theirs']:.1f}", ratio])
    about = "A token of greedy decoding, Llama of 1B shape (16 layers, 32/8 heads of 64), bfloat16, batch 1.\n"
    head = ["tokens before it", "cache", "`qkv`, ms", "`sdpa`, same cache, ms", "it takes"]
    return "\n".join([about, _table(head, rows)])


TABLES = {
    "calls": ("Forward", calls),
    "training": ("Forward and backward", training),
    "caches": ("Caches", caches),
    "sparse": ("Sparse masks", sparse),
    "models": ("In a Hugging Face model", models),
}


def _times(value: dict[str, float] | None) -> str:
    return f"{value['median']:.1f}×" if value else "–"


def _measured(found: dict[str, Any]) -> str:
    value = found["median"]
    text = f"{value:,.2f}" if value < 100 and value % 1 else f"{value:,.0f}"
    unit = found["unit"] if found["unit"] == "×" else f" {found['unit']}"
    return f"{text}{unit}{' ≤' if found['at_most'] and unit == '×' else ''}"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Write the page, README's table and the chart."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (ROOT / "docs" / "speed.md").write_text(page(), encoding="utf-8")
    (ROOT / "docs" / "pictures" / "bench.svg").write_text(readme.svg(shown()[0]), encoding="utf-8")
    readme.write(ROOT / "README.md", shown())


if __name__ == "__main__":
    main()
