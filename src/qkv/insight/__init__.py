"""Ways to understand attention: experiments that answer a question, and drawings for a terminal.

`qkv.why(topic)` runs an experiment; the pieces here are what it and the command line are made of.
"""

from __future__ import annotations
