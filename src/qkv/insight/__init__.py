"""Ways to understand attention: what a call looks at, experiments that answer a question, drawings for a terminal.

`qkv.see(...)` returns a `Trace`; `qkv.why(topic)` runs an experiment. The other pieces here are what they are made of.
"""

from __future__ import annotations

from qkv.insight.trace import Trace as Trace

__all__ = ["Trace"]
