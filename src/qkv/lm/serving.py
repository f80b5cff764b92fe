"""Continuous batching: requests join and leave at every step, on one paged cache."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from qkv.cache import PagedCache, PagesExhausted, Sequence
from qkv.errors import ArgumentError
from qkv.lm.decoder import Decoder


@dataclass(frozen=True)
class Request:
    """A prompt to go on with."""

    prompt: bytes
    length: int  # bytes to write
    temperature: float = 0.0  # 0 takes the likeliest byte each time
    seed: int = 0  # of the sampling; no other request touches its generator
    salt: str | None = None  # pages are shared among requests of the same salt

    def __post_init__(self) -> None:
        if not self.prompt or self.length < 1 or not 0 <= self.temperature < float("inf"):
            given = f"a prompt of {len(self.prompt)} bytes, length={self.length}, temperature={self.temperature}"
            rule = "a request has a prompt and a length of at least one byte, and a temperature >= 0"
            raise ArgumentError.of("qkv demo", rule, given, "Use a word as the prompt")


@dataclass(eq=False)
class Job:
    """A request that is served: its bytes so far, and its place in the cache while it has one."""

    request: Request
    name: str
    tokens: list[int] = field(init=False)
    seq: Sequence | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.rng = torch.Generator().manual_seed(self.request.seed)

    @property
    def written(self) -> bytes:
        """What the model has added."""
        return bytes(self.tokens[len(self.request.prompt) :])

    @property
    def finished(self) -> bool:
        return len(self.written) >= self.request.length

    @property
    def cached(self) -> int:
        """Bytes whose keys are in the cache."""
        return 0 if self.seq is None else self.seq.length


class Server:
    """Serves requests with one model and one cache, as many at once as fit.

    Each step is one pass over one ragged batch: a chunk of the prompt for requests that have just come, one byte for
    the others. A prompt's pages that are in the cache, or that a running request is about to compute, are shared. When
    the pages run out, the youngest request makes room: its pages go to host memory (`swap`), or are dropped and
    computed again; it goes on when another has left.

    Parameters
    ----------
    model : Decoder
    cache : PagedCache
        Of `model.cache(pages)`; the server's own while it runs.
    batch : int
        Most requests at once.
    chunk : int
        Most bytes of a prompt in a step.
    swap : bool

    Notes
    -----
    What is written does not depend on who else is served: attention reads each sequence's own pages, in the same order
    alone or not. Matrix products of another size may round otherwise, by some 1e-6 of a logit in float32.
    """

    def __init__(
        self, model: Decoder, cache: PagedCache, *, batch: int = 8, chunk: int = 32, swap: bool = True
    ) -> None:
        if batch < 1 or chunk < 1:
            rule, given = "batch and chunk are at least 1", f"batch={batch}, chunk={chunk}"
            raise ArgumentError.of("qkv demo", rule, given, "Use the defaults")
        self.model, self.cache, self.batch, self.chunk, self.swap = model, cache, batch, chunk, swap
        self.jobs: list[Job] = []  # all, as they came
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # the oldest first
        self.steps = self.preempted = 0
        self.computed = self.shared = 0  # bytes of prompts and answers
        self.seconds = 0.0
        self._full = False  # no pages until a running request ends

    def submit(self, request: Request) -> Job:
        """Queue a request."""
        job = Job(request, _name(len(self.jobs)))
        self.jobs.append(job)
        self.waiting.append(job)
        return job

    def run(self, watch: Callable[[], object] = lambda: None) -> None:
        """Take steps until all requests are answered; `watch` is called after each.

        Raises
        ------
        PagesExhausted
            A request needs more pages than the cache has, alone. It is given up; the others go on with the next call.
        """
        while self.step():
            watch()

    def step(self) -> bool:
        """Take one step; False where nothing is left to do."""
        begun = time.perf_counter()
        self._admit()
        if not self.running:
            return False
        with torch.inference_mode(), one_thread():
            while True:
                parts = [self._next(job) for job in self.running]
                try:
                    logits = self._forward(parts)
                    break
                except PagesExhausted:
                    if len(self.running) == 1:
                        self._leave(self.running[0])
                        raise
                    self._preempt()
            for job, end in zip(list(self.running), accumulate(map(len, parts)), strict=True):
                if job.cached == len(job.tokens):  # the last known byte is computed: its logits tell the next
                    job.tokens.append(pick(logits[end - 1], job.request.temperature, job.rng))
                    if job.finished:
                        self._leave(job)
        self.steps += 1
        self.computed += sum(map(len, parts))
        self.seconds += time.perf_counter() - begun
        return True

    def _next(self, job: Job) -> list[int]:
        """The bytes that a request adds to the step: some of its prompt, or its last byte."""
        if job.seq is not None and job.cached == len(job.tokens):  # a step was broken off before its byte was picked
            self.cache.truncate(job.seq, job.cached - 1)
        return job.tokens[job.cached :][: self.chunk]

    def _forward(self, parts: list[list[int]]) -> Tensor:
        """The logits (sum T, 256) of one ragged step; nothing has happened where it raises."""
        seqs = [job.seq for job in self.running if job.seq is not None]
        packed = [token for part in parts for token in part]
        step = self.cache.step(seqs, lengths=[len(part) for part in parts], tokens=packed)
        try:
            logits: Tensor = self.model(torch.tensor([packed]), step)[0]
            return logits
        except BaseException:
            self.cache.rollback(seqs)
            raise

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.batch and not self._full:
            job = self.waiting[0]
            if self._is_being_computed(job):
                return
            if job.seq is None:
                job.seq = self.cache.add(tokens=job.tokens, salt=job.request.salt)
                self.shared += job.seq.cached_tokens
            else:
                try:
                    self.cache.swap_in(job.seq)
                except PagesExhausted:
                    if not self.running:  # the pages are held by sequences that are not this server's
                        raise
                    self._full = True
                    return
            self.running.append(self.waiting.popleft())

    def _is_being_computed(self, job: Job) -> bool:
        """Whether pages that this request can share are a running one's next work."""
        if job.seq is not None:
            return False
        P = self.cache.page_size
        for other in self.running:
            if other.request.salt == job.request.salt:
                # The last byte is always computed: its logits are needed.
                common = _common(job.tokens[:-1], other.tokens)
                if common // P * P > other.cached:
                    return True
        return False

    def _preempt(self) -> None:
        """Take the youngest request's pages: to host memory, or dropped; it waits at the head of the queue."""
        job = self.running.pop()
        assert job.seq is not None
        if self.swap:
            self.cache.swap_out(job.seq)
        else:
            self.cache.free(job.seq)
            job.seq = None
        self.waiting.appendleft(job)
        self.preempted += 1
        self._full = True

    def _leave(self, job: Job) -> None:
        assert job.seq is not None
        self.cache.free(job.seq)
        self.running.remove(job)
        job.seq = None
        self._full = False


def alone(model: Decoder, request: Request) -> bytes:
    """What the model writes for one request by itself, without a cache: each byte from a pass over all before it."""
    job = Job(request, "")
    with torch.inference_mode(), one_thread():
        while not job.finished:
            logits = model(torch.tensor([job.tokens]))[0, -1]
            job.tokens.append(pick(logits, request.temperature, job.rng))
    return job.written


def pick(logits: Tensor, temperature: float, rng: torch.Generator) -> int:
    """The next byte: the likeliest at temperature 0, else drawn."""
    if temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits.double() / temperature, dim=-1)
    return int(torch.multinomial(p, 1, generator=rng))


@contextmanager
def one_thread() -> Iterator[None]:
    """For a model this small: waking threads costs more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name(n: int) -> str:
    return chr(ord("A") + n) if n < 26 else str(n)


def _common(a: list[int], b: list[int]) -> int:
    """How many leading entries are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
