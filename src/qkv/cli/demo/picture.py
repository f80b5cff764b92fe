"""A server at work, drawn: the line that each sequence writes, and the page table of its cache.

On a terminal the picture is renewed at every step by rich, where it is installed; elsewhere it is printed once.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter

from qkv.insight.terminal import bar, cells, columns, fit, is_terminal
from qkv.lm.serving import Job, Server

WIDTH = 80
PAUSE = 0.03  # seconds a frame stays: the steps themselves are over too soon to be seen

Line = list[tuple[str, str]]  # pieces of text, each with its style


class Picture:
    """What is drawn of a server.

    Parameters
    ----------
    server : Server
    hidden : int
        Leading bytes of each prompt that are not shown, such as a system prompt.
    """

    def __init__(self, server: Server, hidden: int = 0) -> None:
        self.server, self.hidden = server, hidden
        self.fullest: list[Line] = []  # the page table when most pages were in use
        self.shared, self.waste = 0, 0.0  # the most pages shared at once, and the share of used slots wasted then
        self._used = 0

    def look(self) -> None:
        """Remember what is to be told after the end, when all pages have been given back."""
        stats = self.server.cache.stats()
        self.shared = max(self.shared, stats.pages_shared)
        if stats.pages_used >= max(self._used, 1):
            self._used, self.fullest = stats.pages_used, self.table()
            self.waste = stats.waste_tokens / (stats.tokens + stats.waste_tokens)

    def lines(self) -> list[Line]:
        """The answers, a line a sequence; they grow."""
        return [self._answer(job) for job in self.server.jobs]

    def table(self) -> list[Line]:
        """The page table as it is now, a row a sequence, with what is used, cached and free below."""
        server = self.server
        stats = server.cache.stats()
        used = Counter(page for job in server.running if job.seq is not None for page in job.seq.pages if page >= 0)
        head = f"  bytes  pages at step {server.steps}; * is in several tables, the last bar is its filling"
        lines: list[Line] = [[(fit(head, WIDTH), "dim")]]
        lines += [self._row(job, used) for job in server.jobs]
        foot = (
            f"{stats.pages} pages of {stats.page_size} bytes: {stats.pages_used} used, {stats.pages_shared} of them "
            f"shared *, {stats.pages_cached} cached, {stats.pages_free} free"
        )
        return [*lines, [(fit(foot, WIDTH), "dim")]]

    def _answer(self, job: Job) -> Line:
        prompt = _shown(job.request.prompt[self.hidden :])
        start = f"{job.name} {prompt}"
        return [(fit(start, WIDTH), "bold"), (fit(_shown(job.written), WIDTH - cells(start)), "")]

    def _row(self, job: Job, used: Counter[int]) -> Line:
        if job not in self.server.running or job.seq is None:
            why = "has left" if job.finished else "moved to host memory" if job.seq is not None else "waits"
            return [(f"{job.name}      -  {why}", "dim")]
        P, length, pages = self.server.cache.page_size, job.seq.length, job.seq.pages
        pieces: Line = [(f"{job.name} {length:>6}  ", "")]
        room = (WIDTH - 9) // 5
        first = max(0, len(pages) - room)
        for at, page in enumerate(pages[first:], first):
            if at == first and first:
                pieces.append(("  …  ", "dim"))
            elif page < 0:
                pieces.append(("   · ", "dim"))  # given back: it has left the window
            elif used[page] > 1:
                pieces.append((f"{page:>4}*", "cyan"))
            elif length < (at + 1) * P:
                pieces.append((f"{page:>4}{bar((length - at * P) / P, 1)}", "yellow"))
            else:
                pieces.append((f"{page:>4} ", "green"))
        return pieces


def show(server: Server, hidden: int = 0, pause: float | None = None) -> Picture:
    """Run a server to its end and draw it on standard output; returns the picture for its figures."""
    picture = Picture(server, hidden)
    live = is_terminal() and os.environ.get("TERM") != "dumb" and _has_rich()
    if live:
        _live(picture, PAUSE if pause is None else pause)
    else:
        server.run(picture.look)
        print("\n".join("".join(text for text, _ in line).rstrip() for line in picture.lines() + picture.fullest))
    return picture


def _live(picture: Picture, pause: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def drawn(table: list[Line]) -> Text:
        lines = (Text.assemble(*line) for line in picture.lines() + table)
        return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)

    def watch() -> None:
        picture.look()
        screen.update(drawn(picture.table()), refresh=True)
        time.sleep(pause)

    console = Console(file=sys.stdout, width=min(WIDTH, columns()), highlight=False)
    with Live(console=console, auto_refresh=False, transient=False) as screen:
        picture.server.run(watch)
        screen.update(drawn(picture.fullest), refresh=True)


def _has_rich() -> bool:
    try:
        import rich.live  # noqa: F401
    except ImportError:
        return False
    return True


def _shown(text: bytes) -> str:
    """Bytes as one line that a terminal can show."""
    letters = text.decode(errors="replace")
    return "".join(letter if letter.isprintable() else " " for letter in letters)
