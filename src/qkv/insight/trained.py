"""What the questions of `qkv.why` cost models that were trained: measured once, by benchmarks/train_tables.py."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

# The ablations that bear on each topic, in the order they are told.
TOPICS = {
    "lookup": ("one-head",),
    "names": ("folded-qk",),
    "scale": ("scale-1", "scale-1/d"),
    "same-qk": ("shared-qk", "shared-qk-no-self"),
    "projections": ("folded-qk", "v-is-x", "v-is-x-whole"),
}


@lru_cache(maxsize=1)
def results() -> dict[str, Any]:
    """The measured table: text, budget, and by ablation its name, bits per byte and cost over the seeds."""
    found: dict[str, Any] = json.loads(files("qkv.insight").joinpath("trained.json").read_text(encoding="utf-8"))
    return found


def trained(topic: str) -> str:
    """What changing this cost trained models, in held-out bits per byte; "" for a topic that no ablation bears on."""
    if topic not in TOPICS:
        return ""
    found = results()
    parts = []
    for name in TOPICS[topic]:
        row = found["ablations"][name]
        low, high = row["cost"][1:]
        certain = "" if low > 0 or high < 0 else ", no difference beyond the seeds'"
        parts.append(f"{row['what']} {row['cost'][0]:+.3f} ({low:+.3f} to {high:+.3f}{certain})")
    return (
        f"Small models trained with this changed (docs/training.md), over {found['bits']:.3f} bits per byte, mean and "
        f"range of {len(found['seeds'])} seeds: {'; '.join(parts)}."
    )
