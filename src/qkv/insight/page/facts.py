"""What the page says first: the call in a sentence or two, and what a reader has to know before believing a number."""

from __future__ import annotations

import math

from qkv.insight.page.source import Source
from qkv.insight.page.text import digits


def verdict(source: Source) -> str:
    """How many keys a query sees, at how many it looks, and which heads stand out."""
    live = [lane for lane in source.lanes if lane.live]
    if not live:
        return "No query of this call sees a key: every output is 0."
    seen = float(source.trace.visible.double().mean()) if source.trace.visible.numel() else float(source.Lk)
    looks = sum(lane.facts.effective for lane in live) / len(live)
    away = [lane.facts.distance for lane in live if not math.isnan(lane.facts.distance)]
    far = f", {digits(sum(away) / len(away), 2)} tokens away" if away and source.Lk > 1 else ""
    said = f"On average a query sees {_round(seen)} keys and looks at {_round(looks)} of them{far}."
    if len(live) > 1:
        sharp, flat = (pick(live, key=lambda x: x.facts.effective) for pick in (min, max))
        if flat.facts.effective > 1.05 * sharp.facts.effective:
            said += f" {sharp.name.capitalize()} is the sharpest, at {_round(sharp.facts.effective)}; "
            said += f"{flat.name} the flattest, at {_round(flat.facts.effective)}."
    return said


def _round(x: float) -> str:
    """A mean count, to two digits or to one."""
    return digits(x, 2) if x < 100 else f"{x:,.0f}"


def warnings(source: Source) -> list[str]:
    """The trace's warnings, then the page's own."""
    said = [f"{w[:1].upper()}{w[1:]}." for w in source.trace.warnings]
    if bool((source.trace.visible > source.Dv + 1).any()):
        said.append(
            f"Rows that see more than Dv + 1 = {source.Dv + 1:,} keys have outputs that other weights give, too: what "
            "weights do not prove is said under “One query in full”."
        )
    if source.B * len(source.heads) > len(source.lanes):
        said.append(f"The page shows the first {len(source.lanes)} of {source.B * len(source.heads):,} heads.")
    return said
