"""The gate: random configurations, every backend, forward and gradients, against the oracle under the error rule.

    python -m tests.gates.gate --configs 2000 --seed 17     # what `make gate` runs
    python -m tests.gates.gate --replay 17004               # one configuration again, with every number

Every configuration is one integer, printed when it fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qkv
from tests.kit import judge
from tests.kit.cases import Config
from tests.kit.generator import random_config
from tests.kit.inputs import Inputs, materialise
from tests.kit.judge import Verdict
from tests.kit.oracle import Result, attention

ISAS = {
    "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set[str](),
}
SDPA_SLACK = 16.0  # how far beyond the error bound PyTorch's own kernel may be


def required_backends() -> tuple[str, ...]:
    """What has to run here, found without asking qkv: the Python ones, and the native ones this machine can execute."""
    names = ["reference", "tiled"]
    if importlib.util.find_spec("qkv._native") is not None:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())
        names += [f"cpu:{isa}" for isa, needed in ISAS.items() if needed <= flags]
    return tuple(names)


@cache
def backends() -> tuple[str, ...]:
    """The backends that qkv says it can run here. "cpu" alone is one of its instruction sets, so it is not listed."""
    x = torch.ones(1, 1, 2, 8)
    found = []
    for name in ("reference", "tiled", "sdpa", *(f"cpu:{isa}" for isa in ISAS)):
        try:
            qkv.attention(x, x, x, backend=name)
            found.append(name)
        except qkv.UnsupportedError:
            continue
    return tuple(found)


def mentions(spec: Any, kind: str) -> bool:
    """Whether a mask has a part of that kind."""
    if not isinstance(spec, tuple) or not spec:
        return False
    return spec[0] == kind or any(mentions(part, kind) for part in spec[1:])


def may_refuse(backend: str, config: Config) -> bool:
    """Which calls a backend is allowed to turn down. The Python ones take everything."""
    if backend == "sdpa":
        return True
    needs_python = mentions(config.mask, "mask_mod") or any(term[0] == "score_mod" for term in config.bias)
    return backend.startswith("cpu") and needs_python


# --------------------------------------------------------------------------------------------------------- one run
Attend = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def attend_with(backend: str) -> Attend:
    """out, lse and all gradients by qkv."""

    def attend(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        for leaf in inputs.leaves.values():
            leaf.requires_grad_()
        torch.manual_seed(inputs.config.seed)
        out, lse = qkv.attention(**inputs.call(), return_lse=True, backend=backend)
        names = list(inputs.leaves)
        given = (inputs.dout, inputs.dlse)
        grads = torch.autograd.grad((out, lse), [inputs.leaves[n] for n in names], given, materialize_grads=True)
        return out, lse, dict(zip(names, grads, strict=True))

    return attend


@dataclass(frozen=True)
class Question:
    """A configuration, its tensors and the truth about it, computed once and asked of every backend."""

    config: Config
    inputs: Inputs
    truth: Result
    naive: float | None  # the error of naive PyTorch, where it computes the same thing

    @classmethod
    def of(cls, config: Config, inputs: Inputs | None = None) -> Question:
        inputs = materialise(config) if inputs is None else inputs
        kind = inputs.oracle.q.dtype
        dout, dlse = (judge.numbers(x).astype(kind) for x in (inputs.dout, inputs.dlse))
        truth = attention(inputs.oracle, dout, dlse)
        return cls(config, inputs, truth, judge.naive_error(inputs, truth) if judge.is_plain(config) else None)


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


def ask(question: Question, backend: str, attend: Attend | None = None) -> Outcome:
    """Run one backend (or another implementation, for the mutants) and judge everything it returns."""
    config, inputs, truth = question.config, question.inputs, question.truth
    outcome = Outcome(config.seed, backend, config.dtype)
    try:
        if backend == "sdpa":
            return _ask_sdpa(question, outcome)
        out, lse, grads = (attend or attend_with(backend))(inputs)
    except qkv.UnsupportedError as error:
        outcome.refused = str(error)
        if not may_refuse(backend, config):
            outcome.verdicts.append(Verdict("refused", np.inf, f"refused: {error}"))
        return outcome
    except Exception as error:  # whatever a kernel throws is a finding about that kernel
        outcome.verdicts.append(Verdict("raised", np.inf, f"{type(error).__name__}: {error}"))
        return outcome
    outcome.verdicts += judge.judge_forward(config, truth, out, lse)
    outcome.verdicts += judge.judge_gradients(config, inputs, truth, grads)
    outcome.verdicts += _order_in_memory(inputs.q, out)
    _beside_naive(question, outcome, out)
    return outcome


def _ask_sdpa(question: Question, outcome: Outcome) -> Outcome:
    """PyTorch's own kernel: without lse, and its plan says that it may read what is hidden and promises no bound.

    So it gets zeros in the hidden slots, and only gross errors fail.
    """
    clean = dict(zip("qkv", question.inputs.clean(), strict=True))
    out = qkv.attention(**question.inputs.call() | clean, backend="sdpa")
    verdict = judge.judge_output(question.config, question.truth, out)
    outcome.verdicts.append(verdict if verdict.ratio > SDPA_SLACK else replace(verdict, fault=""))
    _beside_naive(question, outcome, out)
    return outcome


def _beside_naive(question: Question, outcome: Outcome, out: torch.Tensor) -> None:
    if question.naive is not None and out.shape == question.truth.out.shape:
        least = judge.rounding(question.config, question.truth)
        mine, naive = max(judge.largest_error(out, question.truth), least), max(question.naive, least)
        outcome.naive_ratio = mine / naive if naive else 1.0


def _order_in_memory(q: torch.Tensor, out: torch.Tensor) -> list[Verdict]:
    """out lies in q's order of dimensions."""
    if 0 in out.shape or 0 in q.stride():
        return []
    dims = [d for d in range(4) if q.shape[d] > 1 and out.shape[d] > 1]
    wanted, got = (sorted(dims, key=lambda d: -x.stride(d)) for x in (q, out))
    fault = "" if wanted == got else f"out has strides {out.stride()}, q {q.stride()}"
    return [Verdict("order", 0.0 if not fault else np.inf, fault)]


def ask_all(config: Config, names: Iterable[str]) -> list[Outcome]:
    """One configuration on every backend; the inputs must come out as they went in."""
    question = Question.of(config)
    before = [judge.numbers(x) for x in question.inputs.leaves.values()]
    before = [x.copy() for x in before]
    outcomes = [ask(question, name) for name in names]
    for (name, leaf), old in zip(question.inputs.leaves.items(), before, strict=True):
        if not np.array_equal(judge.numbers(leaf), old, equal_nan=True):
            outcomes[0].verdicts.append(Verdict("inputs", np.inf, f"{name} was written to"))
    return outcomes


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


# ---------------------------------------------------------------------------------------------------- command line
Serve = Callable[[Connection, tuple[str, ...]], None]


def _serve(pipe: Connection, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    while True:
        pipe.send(ask_all(random_config(pipe.recv()), names))


class Worker:
    """A process that judges one configuration at a time, so that a crash is a finding about that one."""

    def __init__(self, names: tuple[str, ...], serve: Serve) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, names), daemon=True)
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


def judged(
    seeds: Iterable[int], names: tuple[str, ...], processes: int, limit: float = 120, serve: Serve = _serve
) -> Iterator[list[Outcome]]:
    """The outcomes of every seed, as they come. A process that dies or hangs is replaced."""
    todo = iter(seeds)
    workers = [Worker(names, serve) for _ in range(processes)]
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
                worker.stop()
                code = worker.process.exitcode
                fault = f"no answer in {limit:.0f} s" if isinstance(error, TimeoutError) else f"died, exit code {code}"
                yield [Outcome(worker.seed, "process", "", [Verdict("crash", np.inf, fault)])]
                busy[n] = worker = Worker(names, serve)
            if (seed := next(todo, None)) is not None:
                worker.give(seed)
            else:
                worker.stop()
                worker.seed = -1
        busy = [w for w in busy if w.seed >= 0]


def replay(seed: int, names: Iterable[str]) -> int:
    config = random_config(seed)
    return tell_outcomes(config, ask_all(config, names))


def tell_outcomes(config: Any, outcomes: Iterable[Outcome]) -> int:
    """Print a configuration with every number; the exit code."""
    print(config)
    bad = 0
    for outcome in outcomes:
        print(f"{outcome.backend:<15}{'refused' if outcome.refused else ''}")
        for verdict in outcome.verdicts:
            print(f"    {verdict.quantity:<8} error / bound {verdict.ratio:.4f}  {verdict.fault}")
        bad += len(outcome.faults)
    return 1 if bad else 0


def run(
    configs: int,
    seed: int,
    names: tuple[str, ...],
    processes: int,
    show: Callable[[str], Any],
    serve: Serve = _serve,
) -> Statistics:
    """Judge configurations seed, seed + 1, ...; `show` receives a progress line now and then."""
    statistics, begin, last = Statistics(), time.monotonic(), 0.0
    for done, outcomes in enumerate(judged(range(seed, seed + configs), names, processes, serve=serve), 1):
        for outcome in outcomes:
            statistics.add(outcome)
        spent = time.monotonic() - begin
        if spent - last > 1 or done == configs:
            last = spent
            left = spent / done * (configs - done)
            show(
                f"{done}/{configs} configurations on {len(names)} backends, {len(statistics.faults)} faults, "
                f"worst error {statistics.worst:.2f} of its bound, {spent:.0f} s, {left:.0f} s left"
            )
    return statistics


def fresh_seed() -> int:
    """A new seed each run; QKV_SEED fixes it, so that a run can be repeated as a whole."""
    return int(os.environ.get("QKV_SEED", int(time.time()) % 10_000_000 * 100))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gates.gate", description="Judge qkv against its oracle.")
    parser.add_argument("--configs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None, help="the first configuration; a new one each run by default")
    parser.add_argument("--replay", type=int, default=None, metavar="SEED", help="one configuration, in full")
    parser.add_argument("--backends", nargs="+", default=None)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    names = tuple(args.backends or backends())
    missing = set(required_backends()) - set(names)
    if missing and args.backends is None:
        print(f"missing backends: {', '.join(sorted(missing))}")
        return 1
    if args.replay is not None:
        return replay(args.replay, names)
    seed = fresh_seed() if args.seed is None else args.seed
    print(f"gate: {args.configs} configurations from seed {seed} on {', '.join(names)}")
    wide = sys.stdout.isatty()
    statistics = run(
        args.configs, seed, names, args.processes, lambda s: print(s, end="\r" if wide else "\n", flush=True)
    )
    print()
    for line in statistics.table():
        print(line)
    for at, backend, fault in sorted(statistics.faults)[:60]:
        only = "" if backend == "process" else f" --backends {backend}"
        print(f"FAULT {backend}: {fault}   (python -m tests.gates.gate --replay {at}{only})")
    faults = [*statistics.faults, *statistics.naive_faults()]
    for fault in statistics.naive_faults():
        print(f"FAULT {fault}")
    print(f"gate: {'passed' if not faults else f'{len(faults)} faults'}; seed {seed}\n")
    from tests.gates import views_gate  # which imports this module

    paged = ["--seed", str(seed), "--configs", str(args.configs), "--processes", str(args.processes)]
    if args.backends is not None:
        paged += ["--backends", *args.backends]
    return max(1 if faults else 0, views_gate.main(paged))


if __name__ == "__main__":
    sys.exit(main())
