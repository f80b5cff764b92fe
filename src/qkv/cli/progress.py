"""What a command is doing, on standard error: one line that renews itself on a terminal, a line a step elsewhere."""

from __future__ import annotations

import sys
import time

from qkv.insight.terminal import columns, fit, is_terminal, paint


class Progress:
    """A line of progress; leave the `with` block to take it off the screen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if is_terminal(sys.stderr):
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """Print a part of the result at once, in the place of the line of progress."""
        if is_terminal(sys.stderr):
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(text, flush=True)

    def say(self, step: str) -> None:
        """Show the step that begins now."""
        spent = time.perf_counter() - self.started
        line = fit(f"{self.name}: {step} … {spent:.1f} s", columns(sys.stderr) - 1)
        if is_terminal(sys.stderr):
            print(f"\r\x1b[K{paint(line, 'dim', sys.stderr)}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
