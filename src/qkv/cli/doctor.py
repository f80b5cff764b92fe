"""`qkv doctor`: what was detected on this machine, and which path calls take."""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path

import torch

from qkv import __version__
from qkv.backends import registry
from qkv.backends.chip import cpu_name
from qkv.backends.isas import ISAS, TUNED, tuned_for
from qkv.cli import tuning
from qkv.errors import QKVError
from qkv.insight.terminal import paint, table
from qkv.masks import causal, sliding_window
from qkv.plans import plan

# (what it is, query heads, key/value heads, Lq, Lk, D, mask)
CALLS = (
    ("prefill", 8, 8, 2048, 2048, 128, causal()),
    ("grouped", 32, 8, 2048, 2048, 128, causal()),
    ("window", 8, 8, 2048, 2048, 128, sliding_window(256)),
    ("decode", 32, 8, 1, 4096, 128, None),
    ("latent decode", 128, 1, 1, 4096, 576, None),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Said whole, however long: a terminal breaks the line, and a reader gets the command that helps.
CURE = (
    "attention runs in plain PyTorch and is slower. Install a C++20 compiler (g++ 10, clang 13 or newer), then in the "
    "folder of qkv: pip install --force-reinstall --no-deps ."
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv doctor` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what was detected here, and which path calls take",
        description="Say what was detected on this machine, and which backend runs usual calls (from qkv.plan).",
    )
    parser.add_argument("--tune", action="store_true", help=tuning.HELP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report, or what --tune measures; return the exit code."""
    if args.tune:
        return tuning.tune(_native())
    print(report())
    return 0


def report() -> str:
    """Return the report as text."""
    with warnings.catch_warnings():  # what plan() would warn of, this report says
        warnings.simplefilter("ignore")
        facts, (paths, reasons) = table(_facts()), _paths()
    lines = [facts, "", paint("which backend runs (qkv.plan)", "bold"), table(paths)]
    if reasons:
        lines += ["", "why not the native kernel:"]
        if len(set(reasons.values())) == 1:
            lines.append(f"  every call above: {next(iter(reasons.values()))}")
        else:
            lines += [f"  {call}: {why}" for call, why in reasons.items()]
    return "\n".join(lines)


def _facts() -> list[list[str]]:
    capability, usable = torch.backends.cpu.get_cpu_capability(), os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    return [
        ["qkv", __version__],
        ["python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"],
        ["torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {capability}"],
        ["cpu", f"{cpu_name()}, {usable} cores usable"],
        ["instructions", ", ".join(instruction_sets()) or "none of " + ", ".join(TUNED)],
        ["gpu", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none that this torch can use"],
        ["transformers", _transformers()],
        ["native", _native()],
        ["recording", tuning.known()],
    ]


def _paths() -> tuple[list[list[str]], dict[str, str]]:
    """Which backend runs each call, by type, and why the native one does not where another does."""
    rows = [["call", "q", "k", *(str(d).removeprefix("torch.") for d in DTYPES)]]
    reasons: dict[str, str] = {}
    for name, hq, hkv, lq, lk, size, mask in CALLS:
        row = [name, f"{hq}×{lq}×{size}", f"{hkv}×{lk}×{size}"]
        for dtype in DTYPES:
            q, k = torch.empty(1, hq, lq, size, dtype=dtype), torch.empty(1, hkv, lk, size, dtype=dtype)
            found = plan(q, k, k[..., :512] if name == "latent decode" else k, mask=mask)
            row.append(found.backend)
            why = dict(found.refused).get("cpu")
            if why is not None and found.backend != "cpu":
                reasons.setdefault(f"{name}, {str(dtype).removeprefix('torch.')}", why)
        rows.append(row)
    return rows, reasons


def instruction_sets() -> list[str]:
    """Return those of the native kernel's instruction sets that the processor has, best first (Linux; else empty)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return tuned_for(line.partition(":")[2])


def _transformers() -> str:
    """Return the version found, and what of it `attn_implementation="qkv"` can use."""
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return "not installed: pip install transformers for attn_implementation='qkv'"
    from qkv.integrations.features import features

    lacking = [name for name, found in features().items() if not found]
    has = f"lacks {', '.join(lacking)}" if lacking else "has what attn_implementation='qkv' needs"
    return f"{version}, {has}"


def _native() -> str:
    """Return which native kernels can run here, or why none."""
    try:
        backend = registry.load("cpu")
    except ImportError as error:
        return f"not installed ({error}); {CURE}"
    missing = getattr(backend, "missing", None)
    if isinstance(missing, str):
        return f"not usable: {missing}; {CURE}"
    able = []
    q = torch.empty(1, 1, 1, 64)
    for isa in ISAS:
        try:
            plan(q, q, q, backend=f"cpu:{isa}")
        except QKVError:
            continue
        able.append(isa)
    return f"installed; runs here: {', '.join(able)}" if able else "installed"
