"""How long the largest page of a trace takes to open: `python benchmarks/page_paint.py`, with Chromium installed.

100,000 tokens, 32 heads on 8 of keys and values, tokens with texts. A page is opened five times, each in a new tab;
times are the browser's own, from the start of navigation: to the first paint with content, and to the end of load, by
which time the page's script has drawn everything.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import qkv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.kit.chromium import Browser, Page

RUNS = 5
TOKENS, HEADS, KV_HEADS, D = 100_000, 32, 8, 16
TIMES = """(n => [performance.getEntriesByName("first-contentful-paint")[0].startTime, n.loadEventEnd])(
    performance.getEntriesByType("navigation")[0])"""


def trace() -> qkv.insight.Trace:
    """A window of 64 keys keeps the call itself short; the page is as large as that of any other of its size."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, TOKENS, D, generator=rng) for heads in (HEADS, KV_HEADS, KV_HEADS))
    mask = qkv.causal() & (qkv.sliding_window(64) | qkv.prefix(2))
    return qkv.see(q, k, v, mask=mask, tokens=[f" token{j}" for j in range(TOKENS)])


def main() -> None:
    start = time.perf_counter()
    seen = trace()
    made = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        seen.html(file, rows=[500, 50_000])
        print(f"see {made - start:.1f} s, page {time.perf_counter() - made:.1f} s, {file.stat().st_size:,} bytes")
        browser = Browser(Path(folder) / "profile")
        found = []
        for _ in range(RUNS):
            page = Page(browser, file)
            page.run("new Promise(done => setTimeout(done, 300))")  # load ends after its event
            found.append(page.run(TIMES))
            page.close()
        browser.close()
    for name, times in zip(("first paint", "load"), zip(*found, strict=True), strict=True):
        print(f"{name}: median {statistics.median(times):.0f} ms of {', '.join(f'{t:.0f}' for t in sorted(times))}")


if __name__ == "__main__":
    main()
