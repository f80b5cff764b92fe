"""The seconds that `--seconds` gives, kept while the run goes on: what is left of them, and what no longer fits.

A call cannot be interrupted, and what a row costs beyond its rounds (inputs, checks, a peer's compilation) is not known
before: so rows get equal shares of what is left, and one that would end too late is not begun.
"""

from __future__ import annotations

from collections.abc import Callable

_MOST_SHARES = 3.0
OUT_OF_TIME = "left out: no time was left for it (--seconds gives more)"


class Budget:
    """`seconds` from now on, for `rows` rows.

    >>> budget = Budget(10.0, 4, now=lambda: 0.0)
    >>> budget.fits, budget.rounds(longest=12.0)
    (True, 2.0)
    """

    def __init__(self, seconds: float, rows: int, now: Callable[[], float]) -> None:
        self.now, self.rows = now, rows
        self.end, self._slack = now() + seconds, 0.05 * seconds
        self.overhead = 0.5  # seconds that a row costs beyond its rounds, as seen so far
        self.names: list[str] = []  # of rows that were left out
        self.until = self.end  # when the row that has begun has to end at the latest
        self._begun = now()
        self._given = 0.0

    @property
    def left(self) -> float:
        return self.end - self.now()

    @property
    def fits(self) -> bool:
        """Whether a row that costs what rows have cost so far would end nearly in time; the first is always begun."""
        return (not self._given and not self.names) or self.left + self._slack >= self.overhead

    def rounds(self, longest: float, part: float = 1.0) -> float:
        """Begin a row: the seconds for its rounds, `part` of an equal share less what rows cost beyond them.

        With a first compilation and the least number of rounds it may take three shares, not more.
        """
        self._begun = self.now()
        share = self.left / max(1, self.rows)
        self.until = min(self.end, self._begun + _MOST_SHARES * share)
        self._given = min(longest, max(1e-9, part * share - self.overhead))
        self.rows -= 1
        return self._given

    def done(self) -> None:
        """End a row: what it took beyond its rounds is expected of those to come."""
        beyond = max(0.0, self.now() - self._begun - self._given)
        self.overhead += 0.3 * (beyond - self.overhead)

    def leave_out(self, name: str) -> None:
        """A row that does not fit."""
        self.rows -= 1
        self.names.append(name)

    def said(self) -> str:
        """What was left out, as a sentence; empty if nothing was."""
        if not self.names:
            return ""
        return f"Left out, because --seconds has no room for more: {', '.join(self.names)}."
