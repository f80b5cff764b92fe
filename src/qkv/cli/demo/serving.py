"""The second part of the demo: the shipped model serves several prompts at once on one paged cache."""

from __future__ import annotations

import time

from qkv.cli.demo.picture import Picture, show
from qkv.cli.demo.screen import WIDTH
from qkv.cli.progress import Progress
from qkv.errors import UnsupportedError
from qkv.insight.terminal import fit, paint
from qkv.lm.generation import load
from qkv.lm.serving import Request, Server, alone

SYSTEM = "The Python language reference describes the exact syntax and semantics of the language. "
PROMPTS = (  # and how many bytes to write: some leave early, and others join in their place
    ("The for statement ", 28), ("A list ", 56), ("An exception ", 50), ("If a class ", 58), ("A generator ", 46),
    ("The else clause ", 40),
)  # fmt: skip
PAGES, BATCH = 40, 4  # fewer at a time than there are prompts, so that some join when others leave


def serve() -> None:
    """Let the shipped model answer several prompts at once, and check each answer against one by one."""
    try:
        model = load()
    except UnsupportedError:
        return  # the first screen said so
    server = Server(model, model.cache(PAGES), batch=BATCH)
    for n, (prompt, length) in enumerate(PROMPTS):  # half of them take the likeliest byte, half draw
        server.submit(Request((SYSTEM + prompt).encode(), length, temperature=0.3 * (n % 2), seed=n))
    line = f"{len(PROMPTS)} prompts after one system prompt of {len(SYSTEM)} bytes, on one paged cache:"
    print("\n" + paint(fit(line, WIDTH), "bold"))
    picture = show(server, hidden=len(SYSTEM))
    begun = time.perf_counter()
    with Progress("qkv demo") as progress:
        progress.say("the same one by one, without a cache")
        differing = [job.name for job in server.jobs if job.written != alone(model, job.request)]
    print(_summary(server, picture, differing, time.perf_counter() - begun))


def _summary(server: Server, picture: Picture, differing: list[str], seconds: float) -> str:
    """Sum up what was served; `differing` names the sequences that differ from one-by-one generation."""
    count, speed = len(server.jobs), sum(len(job.written) for job in server.jobs) / max(server.seconds, 1e-9)
    equal = f"no, {', '.join(differing)} differ" if differing else "yes"
    lines = [
        f"{count} sequences, {server.steps} steps, {picture.shared} pages shared, waste {picture.waste:.1%}, "
        f"{speed:,.0f} tokens/s",
        f"equal to one-by-one: {equal} (that took {seconds:.1f} s without a cache, this {server.seconds:.1f} s)",
    ]
    return "\n".join(fit(line, WIDTH) for line in lines)
