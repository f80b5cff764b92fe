"""The gate: random configurations of a kind of call, asked of every backend, judged under the error rule.

`Gate` knows how questions are asked: on processes, so that a crash is a finding about one configuration; under a watch
on what must not be written; with statistics at the end. A kind of call says how to draw a configuration, materialise,
answer and judge it: `tests.gates.calls` for tensors, `tests.gates.view_calls` for a cache's views.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch

import qkv
from tests.kit import backends, judge
from tests.kit.judge import Verdict
from tests.kit.oracle import Result

Config = TypeVar("Config")
Inputs = TypeVar("Inputs")
Tensors = dict[str, torch.Tensor]  # out, lse, and gradients by the name of what they are of: dq, dbias0, ...


@dataclass(frozen=True)
class Question(Generic[Config, Inputs]):
    """A configuration, its tensors and the truth about it, computed once and asked of every backend."""

    config: Config
    inputs: Inputs
    truth: Result
    naive: float | None = None  # the error of naive PyTorch, where it computes the same thing


@dataclass
class Outcome:
    """What one backend made of one configuration."""

    seed: int
    backend: str
    dtype: str
    verdicts: list[Verdict] = field(default_factory=list)
    refused: str = ""
    naive_ratio: float | None = None

    @property
    def faults(self) -> list[str]:
        return [v.fault for v in self.verdicts if not v.passed]


class Gate(ABC, Generic[Config, Inputs]):
    """How configurations of one kind are drawn, asked and judged."""

    name: ClassVar[str]
    starts_processes: ClassVar[bool] = False
    """Whether its answers come from processes of their own."""

    @abstractmethod
    def random(self, seed: int) -> Config:
        """The configuration number `seed`, the same on every machine."""

    @abstractmethod
    def question(self, config: Config) -> Question[Config, Inputs]:
        """Its tensors, and the truth about it."""

    @abstractmethod
    def backends(self) -> tuple[str, ...]:
        """Which are asked."""

    @abstractmethod
    def answer(self, question: Question[Config, Inputs], backend: str | None) -> Tensors:
        """What a backend (None: the one that qkv takes) makes of it."""

    @abstractmethod
    def judge(self, question: Question[Config, Inputs], outcome: Outcome, answer: Tensors) -> None:
        """Add the verdicts on everything that was returned."""

    @abstractmethod
    def watched(self, question: Question[Config, Inputs]) -> dict[str, Any]:
        """The tensors and tables that no call may write to."""

    def ask_more(self, question: Question[Config, Inputs], outcomes: list[Outcome]) -> None:
        """What is asked once every backend has answered."""

    def ask(
        self,
        question: Question[Config, Inputs],
        backend: str | None,
        answer: Callable[[Inputs], Tensors] | None = None,
    ) -> Outcome:
        """Ask one backend, or another implementation, and judge all that it returns."""
        config: Any = question.config
        outcome = Outcome(config.seed, backend or "by itself", config.dtype)
        try:
            found = self.answer(question, backend) if answer is None else answer(question.inputs)
        except qkv.UnsupportedError as error:
            outcome.refused = str(error)
            if not backends.may_refuse(backend, config):
                outcome.verdicts.append(Verdict("refused", np.inf, f"refused: {error}"))
            return outcome
        except Exception as error:  # whatever a kernel throws is a finding about that kernel
            outcome.verdicts.append(Verdict("raised", np.inf, f"{type(error).__name__}: {error}"))
            return outcome
        self.judge(question, outcome, found)
        return outcome

    def ask_all(self, config: Config, names: Iterable[str]) -> list[Outcome]:
        """One configuration on every backend; the inputs must come out as they went in."""
        question = self.question(config)
        before = {name: _numbers(x).copy() for name, x in self.watched(question).items()}
        outcomes = [self.ask(question, name) for name in names]
        self.ask_more(question, outcomes)
        for name, x in self.watched(question).items():
            if not np.array_equal(_numbers(x), before[name], equal_nan=True):
                outcomes[0].verdicts.append(Verdict("inputs", np.inf, f"{name} was written to"))
        return outcomes

    def judged(
        self, seeds: Iterable[int], names: tuple[str, ...], processes: int, limit: float = 120
    ) -> Iterator[list[Outcome]]:
        """The outcomes of every seed, as they come. A process that dies or hangs is replaced."""
        todo = iter(seeds)
        workers = [Worker(self, names) for _ in range(processes)]
        busy: list[Worker] = []
        for worker in workers:
            if (seed := next(todo, None)) is not None:
                worker.give(seed)
                busy.append(worker)
        while busy:
            ready = multiprocessing.connection.wait([w.pipe for w in busy], timeout=1)
            for n, worker in enumerate(busy):
                late = time.monotonic() - worker.since > limit
                if worker.pipe not in ready and not late:
                    continue
                try:
                    if late:
                        raise TimeoutError
                    yield worker.pipe.recv()
                except (EOFError, OSError) as error:
                    yield [worker.lost(f"no answer in {limit:.0f} s" if isinstance(error, TimeoutError) else "")]
                    busy[n] = worker = Worker(self, names)
                if (seed := next(todo, None)) is not None:
                    worker.give(seed)
                else:
                    worker.stop()
                    worker.seed = -1
            busy = [w for w in busy if w.seed >= 0]

    def run(
        self, seeds: Sequence[int], names: tuple[str, ...], processes: int, show: Callable[[str], Any]
    ) -> Statistics:
        """Judge these configurations; `show` receives a progress line now and then."""
        configs = len(seeds)
        statistics, begin, last = Statistics(), time.monotonic(), 0.0
        for done, outcomes in enumerate(self.judged(seeds, names, processes), 1):
            for outcome in outcomes:
                statistics.add(outcome)
            spent = time.monotonic() - begin
            if spent - last > 1 or done == configs:
                last = spent
                left = spent / done * (configs - done)
                show(
                    f"{done}/{configs} {self.name} on {len(names)} backends, {len(statistics.faults)} faults, "
                    f"worst error {statistics.worst:.2f} of its bound, {spent:.0f} s, {left:.0f} s left"
                )
        return statistics

    def replay(self, seed: int, names: Iterable[str]) -> int:
        """Print a configuration with every number; the exit code."""
        config = self.random(seed)
        print(config)
        bad = 0
        for outcome in self.ask_all(config, names):
            print(f"{outcome.backend:<15}{'refused' if outcome.refused else ''}")
            for verdict in outcome.verdicts:
                print(f"    {verdict.quantity:<8} error / bound {verdict.ratio:.4f}  {verdict.fault}")
            bad += len(outcome.faults)
        return 1 if bad else 0


def _numbers(x: Any) -> Any:
    return judge.numbers(x) if isinstance(x, torch.Tensor) else np.array(x)


def order_in_memory(q: torch.Tensor, out: torch.Tensor) -> list[Verdict]:
    """out lies in q's order of dimensions."""
    if 0 in out.shape or 0 in q.stride():
        return []
    dims = [d for d in range(4) if q.shape[d] > 1 and out.shape[d] > 1]
    wanted, got = (sorted(dims, key=lambda d: -x.stride(d)) for x in (q, out))
    fault = "" if wanted == got else f"out has strides {out.stride()}, q {q.stride()}"
    return [Verdict("order", 0.0 if not fault else np.inf, fault)]


# ------------------------------------------------------------------------------------------------------ processes
def _serve(pipe: Connection, gate: Gate[Any, Any], names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    while True:
        pipe.send(gate.ask_all(gate.random(pipe.recv()), names))


class Worker:
    """A process that judges one configuration at a time, so that a crash is a finding about that one."""

    def __init__(self, gate: Gate[Any, Any], names: tuple[str, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, gate, names), daemon=not gate.starts_processes)
        self.process.start()
        theirs.close()
        self.seed = -1
        self.since = 0.0

    def give(self, seed: int) -> None:
        self.seed, self.since = seed, time.monotonic()
        self.pipe.send(seed)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def lost(self, fault: str) -> Outcome:
        """What is told of a configuration that was not answered."""
        self.stop()
        fault = fault or f"died, exit code {self.process.exitcode}"
        return Outcome(self.seed, "process", "", [Verdict("crash", np.inf, fault)])


# ------------------------------------------------------------------------------------------------------ statistics
class Statistics:
    """Errors as parts of their bounds, by backend, dtype and quantity; and beside naive PyTorch."""

    def __init__(self) -> None:
        self.ratios: dict[tuple[str, str, str], list[tuple[float, int]]] = defaultdict(list)
        self.naive: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
        self.refused: dict[str, int] = defaultdict(int)
        self.faults: list[tuple[int, str, str]] = []
        self.worst = 0.0

    def add(self, outcome: Outcome) -> None:
        if outcome.refused:
            self.refused[outcome.backend] += 1
        for verdict in outcome.verdicts:
            if verdict.quantity == "order":
                continue
            quantity = verdict.quantity.rstrip("0123456789")
            self.ratios[outcome.backend, outcome.dtype, quantity].append((verdict.ratio, outcome.seed))
            self.worst = max(self.worst, verdict.ratio)
        if outcome.naive_ratio is not None:
            self.naive[outcome.backend, outcome.dtype].append((outcome.naive_ratio, outcome.seed))
        self.faults += [(outcome.seed, outcome.backend, fault) for fault in outcome.faults]

    def naive_faults(self) -> list[str]:
        """The rules beside naive PyTorch, which are about a whole run. sdpa is PyTorch's own: it is only reported."""
        faults = []
        for (backend, dtype), pairs in self.naive.items():
            ratios = np.array([ratio for ratio, _ in pairs])
            if backend == "sdpa":
                continue
            if dtype in ("f32", "f64"):
                logs = np.log(ratios)
                noise = 2 * logs.std() / len(logs) ** 0.5  # a run is a sample: only what it can tell apart is a fault
                if len(ratios) >= 20 and logs.mean() - noise > np.log(1.05):
                    mean = f"{np.exp(logs.mean()):.3f} (noise {np.exp(noise):.3f})"
                    faults.append(f"{backend} {dtype}: geometric mean of error / naive error {mean} > 1.05")
            else:
                worst, seed = max(pairs)
                share = (ratios <= 1).mean()
                if worst > 1.25:
                    faults.append(f"{backend} {dtype}: error / naive error {worst:.3f} > 1.25 at seed {seed}")
                if len(ratios) >= 20 and share < min(0.99, 1 - 1 / len(ratios)):
                    faults.append(f"{backend} {dtype}: error <= naive error on {share:.1%} of configurations < 99 %")
        return faults

    def table(self) -> Iterator[str]:
        yield "error / bound"
        yield f"{'backend':<15}{'dtype':<6}{'quantity':<9}{'calls':>6}{'median':>9}{'99 %':>9}{'max':>9}{'at seed':>11}"
        for (backend, dtype, quantity), pairs in sorted(self.ratios.items()):
            x = np.array([ratio for ratio, _ in pairs])
            row = "".join(f"{np.quantile(x, part, method='higher'):>9.4f}" for part in (0.5, 0.99, 1))
            yield f"{backend:<15}{dtype:<6}{quantity:<9}{len(x):>6}{row}{max(pairs)[1]:>11}"
        yield ""
        yield "error / error of naive PyTorch in the same dtype"
        yield f"{'backend':<15}{'dtype':<6}{'calls':>6}{'mean':>9}{'<= 1':>9}{'max':>9}"
        for (backend, dtype), pairs in sorted(self.naive.items()):
            x = np.array([ratio for ratio, _ in pairs])
            row = f"{np.exp(np.log(x).mean()):>9.3f}{(x <= 1).mean():>9.1%}{x.max():>9.3f}"
            yield f"{backend:<15}{dtype:<6}{len(x):>6}{row}"
        for backend, count in sorted(self.refused.items()):
            yield f"{backend} refused {count} configurations"
