"""What is wrong with a layer, said with what to do about it: from its numbers, and those it had at first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_LARGE = 50.0  # a logit beyond which softmax follows one key, and bfloat16 resolves scores to 0.25
_GROWN = 1.2
_COLLAPSED, _BEFORE = 1.2, 3.0  # effective tokens, now and at first

FIXES = {
    "nan": "Look at what this layer was given: a layer before it says NaN as well, or it began here",
    "nan values": "Look at the value projection and its input",
    "dead": "Check the mask: True means may attend",
    "logit": "Normalise queries and keys (qk_norm=True), cap the scores or lower the learning rate",
    "collapse": "Lower the learning rate, warm up longer or normalise queries and keys (qk_norm=True)",
    "uniform": "After warm-up: check its query and key projections and the scale, or prune it",
    "duplicate": "Check that heads were drawn apart, or prune one of them",
}
"""Every kind of warning, and its fix."""
_Warning = tuple[str, list[int], str]


@dataclass
class History:
    """What a layer was like when it was first looked at, and what was found since."""

    number: int
    shape: tuple[int, int] = (0, 0)
    tokens: dict[int, float | None] = field(default_factory=dict)
    logit: float | None = None
    last: dict[str, Any] = field(default_factory=dict)
    looked: int = 0
    nan: dict[str, Any] | None = None
    kinds: dict[str, int] = field(default_factory=dict)  # of warnings, and how often each was given

    def add(self, record: dict[str, Any]) -> None:
        """Note the numbers of one more call, its warnings among them."""
        shape = (record["shape"]["Lq"], record["shape"]["Lk"])
        if not self.looked:
            self.shape, self.logit = shape, _largest(record)
            self.tokens = dict(zip(record["heads"], record["tokens"], strict=True))
        found = [*_broken(record), *self._trends(record, shape), *_idle(record)]
        record["warnings"] = [
            {"kind": kind, "heads": heads, "text": text, "fix": FIXES[kind]} for kind, heads, text in found
        ]
        for kind, _, _ in found:
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
        self.looked, self.last = self.looked + 1, record

    def _trends(self, record: dict[str, Any], shape: tuple[int, int]) -> Iterator[_Warning]:
        """What has become of the layer since it was first looked at."""
        largest, before = _largest(record), max(self.logit or 0.0, 1.0)
        if largest is not None and largest > _LARGE and largest > _GROWN * before:
            heads = [h for h, x in zip(record["heads"], record["logit"], strict=True) if x is not None and x > _LARGE]
            yield "logit", heads, f"the largest logit is {largest:.0f}, and was {self.logit or 0:.0f} at first"
        if shape != self.shape:  # of other lengths, an entropy says something else
            return
        collapsed = [
            h
            for h, now in zip(record["heads"], record["tokens"], strict=True)
            if now is not None and now < _COLLAPSED and (self.tokens.get(h) or 0.0) > _BEFORE
        ]
        if collapsed:
            yield "collapse", collapsed, f"{_named(collapsed)} looks at one key a query, and looked at several at first"


def _largest(record: dict[str, Any]) -> float | None:
    return max((x for x in record["logit"] if x is not None), default=None)


def _broken(record: dict[str, Any]) -> Iterator[_Warning]:
    nan, values, dead = record["nan"], record["nan_values"], record["dead"]
    if nan["rows"]:
        at = nan["first"]
        text = f"{nan['rows']} of {nan['of']} rows are NaN, first row {at['row']} of head {at['head']}"
        yield "nan", [at["head"]], text
    if values["keys"]:
        at = values["first"]
        yield "nan values", [], f"{values['keys']} values are NaN, first that of key {at['row']}, kv head {at['head']}"
    if dead["rows"] and dead["rows"] == dead["of"]:
        yield "dead", [], "no query sees any key"


def _idle(record: dict[str, Any]) -> Iterator[_Warning]:
    """Heads that do nothing of their own."""
    if record["uniform_heads"]:
        yield "uniform", record["uniform_heads"], f"{_named(record['uniform_heads'])} weighs all keys alike"
    if record["duplicate_heads"]:
        pairs = ", ".join(f"{a} and {b}" for a, b, _ in record["duplicate_heads"][:4])
        heads = sorted({h for pair in record["duplicate_heads"] for h in pair[:2]})
        yield "duplicate", heads, f"heads {pairs} attend alike"


def _named(heads: list[int]) -> str:
    return f"head {', '.join(map(str, heads[:6]))}" + (f" and {len(heads) - 6} more" if len(heads) > 6 else "")
