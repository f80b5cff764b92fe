"""Small decoders trained with one thing changed, and the tables of what it cost.

    python benchmarks/train_tables.py variants [TEXT] [--seeds 0 1 2] [--threads 1] [--part 1/2]
    python benchmarks/train_tables.py ablations [--seeds 0 1 2] [--threads 1] [--part 1/2]
    python benchmarks/train_tables.py steps [--threads 2]
    python benchmarks/train_tables.py report [--json benchmarks/results/decoders.jsonl] [--why FILE]
    python benchmarks/train_tables.py card CHECKPOINT > src/qkv/lm/model/README.md

Every run leaves a JSON file in --results as it ends, and one that is there is not made again: stop and start at will,
and let two processes do `--part 1/2` and `--part 2/2`. `report` prints the tables from the files, or from the one file
of `--results FILE` that `--json` gathered: a run a line, with seven digits, since small differences of bits are told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qkv.bench.results import rounded
from qkv.lm import checkpoint
from qkv.lm.comparison import step_times
from qkv.lm.data import Corpus, read_corpus
from qkv.lm.decoder import KINDS, Config
from qkv.lm.generation import SHIPPED
from qkv.lm.training import Run, Settings, decoder, held_out_bits
from qkv.lm.variants import ABLATIONS

SIZES: dict[str, Any] = {"dim": 128, "layers": 3, "heads": 4, "context": 256}
STEPS, BATCH, EVERY = 500, 8, 50
VARIANTS = [*((kind, "qkv") for kind in KINDS), ("mha", "sdpa")]
TIMED = {"mha": ("mha", "qkv"), "mha, SDPA": ("mha", "sdpa"), "gqa": ("gqa", "qkv"), "mqa": ("mqa", "qkv"),
         "mla": ("mla", "qkv"), "window": ("window", "qkv"), "window, SDPA": ("window", "sdpa")}  # fmt: skip
RULES = {"mha": "scale 1/√d, two matrices, W_V (as usual)", **{name: a.what for name, a in ABLATIONS.items()}}
Result = dict[str, Any]


def train(corpus: Corpus, kind: str, op: str, seed: int, steps: int) -> Result:
    """Train one decoder and return what it measured."""
    config, settings = Config(attention=kind, op=op, **SIZES), Settings(steps=steps, batch=BATCH, seed=seed)
    run = Run(config, settings, corpus)
    run.evaluate()
    run.go(steps, EVERY, lambda _: None)
    losses = run.record.losses
    return {
        "text": corpus.name, "sha256": corpus.sha256, "config": asdict(config), "settings": asdict(settings),
        "bits": run.record.held[-1][1], "held": run.record.held, "step_ms": run.record.step_time(),
        "losses": [statistics.fmean(losses[at : at + 10]) for at in range(0, len(losses), 10)],  # means of ten steps
        "weights": sum(p.numel() for p in run.model.parameters()), "cached_numbers": config.cached_numbers(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def work(args: argparse.Namespace) -> None:
    """Make the runs that are missing, or this process's part of them."""
    kinds = VARIANTS if args.command == "variants" else [(kind, "qkv") for kind in RULES]
    corpus = read_corpus(getattr(args, "text", None), SIZES["context"])
    stem = "reference" if getattr(args, "text", None) is None else Path(args.text).stem
    mine, of = (int(n) for n in args.part.split("/"))
    jobs = [(kind, op, seed) for seed in args.seeds for kind, op in kinds][mine - 1 :: of]
    args.results.mkdir(parents=True, exist_ok=True)
    for kind, op, seed in jobs:
        path = args.results / f"{stem}.{kind.replace('/', '-over-')}.{op}.{seed}.json"
        if not path.exists():
            write(path, train(corpus, kind, op, seed, args.steps))
            print(f"{path.name}: {json.loads(path.read_text())['bits']:.4f} bits per byte", file=sys.stderr, flush=True)


def steps(args: argparse.Namespace) -> None:
    """Time the steps of `qkv train`'s default decoder in turn, at two contexts with equally many bytes a step."""
    args.results.mkdir(parents=True, exist_ok=True)
    for context, batch in ((256, 8), (2048, 1)):
        configs = {name: Config(attention=kind, op=op, context=context) for name, (kind, op) in TIMED.items()}
        found = step_times(configs, batch, args.rounds)
        told = {"context": context, "batch": batch, "threads": torch.get_num_threads(), "ms": found}
        write(args.results / f"steps.{context}.{torch.get_num_threads()}.json", told)


def write(path: Path, value: Result) -> None:
    """Write a whole file or none."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value))
    beside.replace(path)


def read(results: Path) -> tuple[list[Result], list[Result]]:
    """The runs and the timings of a folder with a file for each, or of one file with a line for each."""
    if results.is_dir():
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    else:
        found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return [f for f in found if "bits" in f], [f for f in found if "ms" in f]


def report(args: argparse.Namespace) -> None:
    """Print every table that the files hold; with --json, gather the files into one."""
    runs, timings = read(args.results)
    print(tables(runs, timings))
    if args.json is not None:
        found = rounded([*runs, *timings], 7)
        args.json.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found), encoding="utf-8")
    if args.why is not None:
        args.why.write_text(json.dumps(told(runs), indent=1, ensure_ascii=False) + "\n")


def tables(runs: list[Result], timings: list[Result]) -> str:
    """The tables of docs/training.md."""
    texts = dict.fromkeys(run["text"] for run in runs)
    parts = [variants_table([run for run in runs if run["text"] == text]) for text in texts]
    return "\n\n".join("\n".join(part) for part in [*parts, ablations_table(runs), steps_table(timings)])


def card(args: argparse.Namespace) -> None:
    """Print the card of the shipped model, filled in from the checkpoint that it was exported from."""
    saved, shipped = checkpoint.load(args.text), checkpoint.load(SHIPPED)
    notes = saved.notes
    config, text, made = Config(**notes["config"]), notes["text"], notes["made_with"]
    windows = read_corpus(None, config.context).held_out(32, config.context)
    told = {
        **notes["config"], **notes["settings"], "sha256": text["sha256"], "trained": f"{text['trained']:,}",
        "held": f"{text['held_out']:,}", "step_ms": f"{notes['record']['step_ms']:.0f}", "threads": made["threads"],
        "bits": f"{notes['record']['held'][-1][1]:.3f}", "kv": f"{2 * config.cached_numbers():,}",
        "export_bits": f"{held_out_bits(decoder(shipped), windows):.3f}", "file_bytes": f"{SHIPPED.stat().st_size:,}",
        "weights": f"{sum(t.numel() for t in shipped.tensors.values()):,}", "torch": made["torch"],
        "python_full": made["python"], "python": ".".join(made["python"].split(".")[:2]),
    }  # fmt: skip
    print(Path(__file__).with_name("model_card.md").read_text().format(**told), end="")


def variants_table(runs: list[Result]) -> list[str]:
    """Bits per byte and cache of each kind of attention on one text, and our op's curves against PyTorch's."""
    base, rows = runs[0], []
    for kind, op in VARIANTS:
        some = chosen(runs, kind, op)
        if some:
            name = kind if op == "qkv" else f"{kind}, PyTorch's SDPA"
            bound = f", of {some[0]['config']['window']} bytes" if kind == "window" else ""
            cache = f"{2 * some[0]['cached_numbers']:,}{bound}"
            rows.append(f"| {name} | {spread(some)} | {cache} | {some[0]['weights']:,} | {len(some)} |")
    config, settings = base["config"], base["settings"]
    title = (
        f"**{base['text']}**: {config['layers']} layers of {config['dim']}, {config['heads']} heads, "
        f"{settings['steps']} steps of {settings['batch']} × {config['context']} bytes"
    )
    head = ["| attention | bits per byte, held out | key/value bytes a token (bf16) | weights | seeds |"]
    return [title, "", *head, "|---|---|---|---|---|", *rows, *curves(runs)]


def curves(runs: list[Result]) -> list[str]:
    """Say how far apart the held-out curves of the two ops are, beside those of two seeds."""
    pairs = [(a, b) for a in chosen(runs, "mha", "qkv") for b in chosen(runs, "mha", "sdpa")]
    same = [gap(a, b) for a, b in pairs if a["settings"]["seed"] == b["settings"]["seed"]]
    other = [gap(a, b) for a, b in pairs if a["settings"]["seed"] != b["settings"]["seed"]]
    if not same or not other:
        return []
    return [
        "",
        f"Largest distance of two held-out curves: qkv and SDPA from one seed {max(same):.4f} bits per byte, from two "
        f"seeds {min(other):.4f} to {max(other):.4f}.",
    ]


def gap(a: Result, b: Result) -> float:
    """Return the largest difference of two held-out curves."""
    return max(abs(float(x) - float(y)) for (_, x), (_, y) in zip(a["held"], b["held"], strict=True))


def ablations_table(runs: list[Result]) -> list[str]:
    """Mean and spread of each ablation on the reference, and its difference to the unchanged decoder, seed by seed."""
    runs = [run for run in runs if run["config"]["op"] == "qkv"]
    texts = {run["text"] for run in runs if run["config"]["attention"] in ABLATIONS}
    runs = [run for run in runs if run["text"] in texts]
    base = {run["settings"]["seed"]: run["bits"] for run in chosen(runs, "mha", "qkv")}
    rows = []
    for kind, what in RULES.items():
        some = chosen(runs, kind, "qkv")
        costs = [run["bits"] - base[run["settings"]["seed"]] for run in some if run["settings"]["seed"] in base]
        if some:
            cost = f"{statistics.fmean(costs):+.4f} ({min(costs):+.4f} to {max(costs):+.4f})" if costs else ""
            cost = "" if kind == "mha" else cost
            rows.append(f"| {what} | {spread(some)} | {cost} | {some[0]['weights']:,} | {len(some)} |")
    head = ["| attention | bits per byte, held out | cost, seed by seed | weights | seeds |", "|---|---|---|---|---|"]
    return [f"**Ablations**, {', '.join(sorted(texts))}", "", *head, *rows]


def told(runs: list[Result]) -> Result:
    """Return what `qkv.why` tells of the ablations: bits per byte, and each one's cost with its range over seeds."""
    runs = [run for run in runs if run["config"]["op"] == "qkv"]
    texts = {run["text"] for run in runs if run["config"]["attention"] in ABLATIONS}
    runs = [run for run in runs if run["text"] in texts]
    base = {run["settings"]["seed"]: run["bits"] for run in chosen(runs, "mha", "qkv")}
    config, settings = runs[0]["config"], runs[0]["settings"]
    found: Result = {}
    for kind, rule in ABLATIONS.items():
        costs = [r["bits"] - base[r["settings"]["seed"]] for r in chosen(runs, kind, "qkv")]
        cost = (statistics.fmean(costs), min(costs), max(costs))
        found[kind] = {"what": rule.what, "cost": [round(x, 4) for x in cost]}
    budget = f"{config['layers']} layers of {config['dim']}, {settings['steps']} steps"
    budget += f" of {settings['batch']} × {config['context']} bytes"
    return {
        "text": texts.pop(),
        "budget": budget,
        "seeds": sorted(base),
        "bits": round(statistics.fmean(base.values()), 4),
        "ablations": found,
    }


def steps_table(timings: list[Result]) -> list[str]:
    """Milliseconds of a training step, each kind in turn."""
    head = ["| context | threads | attention | ms a step | SDPA's mha takes |", "|---|---|---|---|---|"]
    rows = []
    for timing in sorted(timings, key=lambda timing: (timing["threads"], timing["context"])):
        for name, times in timing["ms"].items():
            ratios = [b / a for a, b in zip(times, timing["ms"]["mha, SDPA"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            ratio = f"{middle:.2f}× ({low:.2f} to {high:.2f})"
            row = f"| {timing['context']} × {timing['batch']} | {timing['threads']} | {name} "
            rows.append(f"{row}| {statistics.median(times):.0f} | {ratio} |")
    return ["**Time of a training step**, decoders in turn", "", *head, *rows]


def chosen(runs: list[Result], kind: str, op: str) -> list[Result]:
    """Return the runs of one kind and op."""
    return [run for run in runs if run["config"]["attention"] == kind and run["config"]["op"] == op]


def spread(runs: list[Result]) -> str:
    """Return mean and range of the runs' bits per byte."""
    bits = [run["bits"] for run in runs]
    around = f" ({min(bits):.4f} to {max(bits):.4f})" if len(bits) > 1 else ""
    return f"{statistics.fmean(bits):.4f}{around}"


COMMANDS = {"variants": work, "ablations": work, "steps": steps, "report": report, "card": card}


def main() -> None:
    """Read the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument(
        "text", nargs="?", help="of variants: a file (default: Python's language reference); of card: a checkpoint"
    )
    parser.add_argument("--results", type=Path, default=Path("results/training"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of a run (default {STEPS})")
    parser.add_argument("--rounds", type=int, default=15, help="of the command steps (default 15)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default="1/1", help="i/n: every n-th run from the i-th on")
    parser.add_argument("--json", type=Path, help="of report: one file for all results")
    parser.add_argument("--why", type=Path, help="of report: src/qkv/insight/trained.json, which qkv.why tells")
    args = parser.parse_args()
    if args.text is not None and args.command not in ("variants", "card"):
        parser.error(f"{args.command} takes no text")
    torch.set_num_threads(args.threads)
    if args.command == "card" and args.text is None:
        parser.error("card takes a checkpoint")
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
