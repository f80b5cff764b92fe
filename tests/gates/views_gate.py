"""The gate of views: random calls on pages, every backend, against the oracle under the error rule; and sameness.

    python -m tests.gates.views_gate --configs 2000 --seed 17     # `python -m tests.gates.gate` runs it too
    python -m tests.gates.views_gate --replay 17004               # one configuration again, with every number

Each configuration also runs again on one native backend, with its pages in another order, on pages of their own where
they were shared, each sequence alone, with two threads, and on contiguous keys: the bits have to stay.
"""

from __future__ import annotations

import argparse
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

import qkv
from qkv import execute, plans
from qkv.call.keys import Clock, KVLayout, KVView
from qkv.masks import as_mask
from tests.gates import gate
from tests.gates.gate import Outcome, Statistics, tell_outcomes
from tests.kit import judge, private, views
from tests.kit.judge import Verdict
from tests.kit.oracle import Result
from tests.kit.views import ViewConfig, ViewInputs, random_view_config

CONFIGS = 2000


@dataclass(frozen=True)
class Question:
    """A configuration, its tensors and the truth about it."""

    config: ViewConfig
    inputs: ViewInputs
    truth: Result

    @classmethod
    def of(cls, config: ViewConfig) -> Question:
        inputs = views.materialise(config)
        truth = inputs.truth()
        if config.storage != "plain" and config.dtype == "bf16":  # the floor of scaled weights, see views.py
            truth.max_v = np.maximum(truth.max_v, views.LARGEST[config.storage])
        return cls(config, inputs, truth)


def names_of_all() -> tuple[str, ...]:
    """The backends that answer for views: all but PyTorch's own, which promises no bound."""
    return tuple(name for name in gate.backends() if name != "sdpa")


def may_refuse(backend: str | None, config: ViewConfig) -> bool:
    """Which calls a backend is allowed to turn down: those with Python functions, and only if it was named."""
    return backend is not None and gate.may_refuse(backend, config)  # type: ignore[arg-type]


def run(inputs: ViewInputs, backend: str | None, **other: Any) -> dict[str, torch.Tensor]:
    out, lse = qkv.attention(**inputs.call() | other, return_lse=True, backend=backend)
    return {"out": out, "lse": lse}


def ask(question: Question, backend: str | None) -> Outcome:
    """Run one backend (None: the one that qkv takes) and judge what it returns."""
    config, inputs, truth = question.config, question.inputs, question.truth
    outcome = Outcome(config.seed, backend or "by itself", config.dtype)
    try:
        found = run(inputs, backend)
    except qkv.UnsupportedError as error:
        outcome.refused = str(error)
        if not may_refuse(backend, config):
            outcome.verdicts.append(Verdict("refused", np.inf, f"refused: {error}"))
        return outcome
    except Exception as error:  # whatever a kernel throws is a finding about that kernel
        outcome.verdicts.append(Verdict("raised", np.inf, f"{type(error).__name__}: {error}"))
        return outcome
    outcome.verdicts += judge.judge_forward(config, truth, found["out"], found["lse"])  # type: ignore[arg-type]
    outcome.verdicts += gate._order_in_memory(inputs.q, found["out"])
    return outcome


# ------------------------------------------------------------------------------------------------------- sameness
def alone(inputs: ViewInputs, i: int) -> tuple[torch.Tensor, KVView]:
    """Sequence i by itself; for masks and biases that are the same for all."""
    c, layout = inputs.config, inputs.view.layout
    table = layout.tables[layout.starts[i] : layout.starts[i + 1]]
    first = sum(c.queries[:i])
    q = inputs.q[:, :, first : first + c.queries[i]] if c.ragged else inputs.q[i : i + 1]
    queries = array("q", c.queries[i : i + 1]) if c.ragged else None
    own = KVLayout(table, array("q", [0, len(table)]), array("q", [c.lengths[i]]), queries, Clock())
    return q, inputs.view._replace(layout=own)


def contiguous(inputs: ViewInputs, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of sequence i as plain tensors, read key by key; what is given back is poison."""
    view, (q, own) = inputs.view, alone(inputs, i)
    P, parts = view.k.shape[2], []
    for pool in (view.k, view.v):
        rows = [pool[own.layout.tables[j // P], :, j % P] for j in range(own.layout.lengths[0])]
        parts.append(torch.stack(rows, 1)[None] if rows else pool.new_zeros(1, pool.shape[1], 0, pool.shape[3]))
    return q, parts[0], parts[1]


def moved(inputs: ViewInputs, seed: int, copies: bool) -> KVView:
    """The same keys on other pages: all in another order, or (copies) each sequence on pages of its own."""
    view, rng = inputs.view, np.random.default_rng(seed)
    P, N = view.k.shape[2], view.k.shape[0]
    layout, tables = view.layout, array("i", view.layout.tables)
    used = [layout.starts[i] + m for i, x in enumerate(layout.lengths) for m in range(-(-x // P))]
    used = [at for at in used if tables[at] >= 0]
    if copies:
        source = torch.tensor([tables[at] for at in used], dtype=torch.int64)
        to = rng.permutation(len(used))
        for n, at in enumerate(used):
            tables[at] = int(to[n])
    else:
        source, to = torch.arange(N), rng.permutation(N)
        for at in used:
            tables[at] = int(to[tables[at]])
    back = source[torch.from_numpy(np.argsort(to))] if len(used) else torch.arange(1)
    pools = [None if x is None else x[back] for x in view[:4]]
    own = KVLayout(tables, layout.starts, layout.lengths, layout.queries, Clock())
    return KVView(pools[0], pools[1], pools[2], pools[3], view.dtype, own, view.held)


def bits(x: torch.Tensor) -> bytes:
    """The bytes of the values: one NaN is as good as another, 0 is not -0."""
    x = x.detach().contiguous()
    return x.masked_fill(x.isnan(), torch.nan).flatten().view(torch.uint8).numpy().tobytes()


def differ(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if bits(one[name]) != bits(two[name])]


def _rows(found: dict[str, torch.Tensor], config: ViewConfig, i: int) -> dict[str, torch.Tensor]:
    """What belongs to sequence i."""
    if not config.ragged:
        return {name: x[i : i + 1] for name, x in found.items()}
    first = sum(config.queries[:i])
    return {name: x[:, :, first : first + config.queries[i]] for name, x in found.items()}


def _mask_by_row(spec: Any) -> bool:
    if spec is None or spec[0] in ("and", "or", "not", "per_head"):
        return any(_mask_by_row(part) for part in spec[1:]) if spec else False
    if spec[0] == "prefix":
        return not isinstance(spec[1], int)
    return spec[0] in ("padding", "segments", "blocks", "dense", "mask_mod")


def by_row(config: ViewConfig) -> bool:
    """Whether the mask or a bias may mean something else for another batch row."""
    return _mask_by_row(config.seen_by) or any(spec[0] == "tensor" and spec[1][0] > 1 for spec in config.bias)


def joined(inputs: ViewInputs) -> Any:
    """The call's mask, and what the cache still holds."""
    mask, held = as_mask(inputs.mask), inputs.view.held
    return mask if held is None else held if mask is None else mask & held


def variants(inputs: ViewInputs, backend: str | None) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """What must not change a bit: a name, and the check that tells which results it changed."""
    c, first = inputs.config, run(inputs, backend)

    def threads() -> list[str]:
        before = torch.get_num_threads()
        torch.set_num_threads(3 - min(before, 2))
        try:
            return differ(first, run(inputs, backend))
        finally:
            torch.set_num_threads(before)

    def by_itself(i: int) -> list[str]:
        q, own = alone(inputs, i)
        return differ(_rows(first, c, i), run(inputs, backend, q=q, k=own))

    def plainly(i: int) -> list[str]:
        q, k, v = contiguous(inputs, i)
        own = {"q": q, "k": k, "v": v, "mask": joined(inputs), "positions": "end"}
        return differ(_rows(first, c, i), run(inputs, backend, **own))

    yield "repetition", lambda: differ(first, run(inputs, backend))
    yield "without lse", lambda: differ({"out": first["out"]}, {"out": qkv.attention(**inputs.call(), backend=backend)})
    yield "pages in another order", lambda: differ(first, run(inputs, backend, k=moved(inputs, 1, copies=False)))
    yield "pages of one's own", lambda: differ(first, run(inputs, backend, k=moved(inputs, 2, copies=True)))
    yield "threads", threads
    for i in range(0 if by_row(c) else c.n):
        yield f"sequence {i} alone", lambda i=i: by_itself(i)  # type: ignore[misc]
        if c.storage == "plain" and c.P % 16 == 0 and c.queries[i]:
            yield f"sequence {i} on contiguous keys", lambda i=i: plainly(i)  # type: ignore[misc]


def sameness(question: Question, backend: str) -> list[Verdict]:
    """A fault for everything that changed bits."""
    faults = []
    for name, check in variants(question.inputs, backend):
        changed = check()
        if changed:
            faults.append(Verdict("same", np.inf, f"other bits in {changed}: {name}"))
    return faults


def ask_all(config: ViewConfig, names: Iterable[str]) -> list[Outcome]:
    """One configuration on every backend, and its sameness on one of the native ones."""
    question, names = Question.of(config), list(names)
    tensors = {
        "q": question.inputs.q,
        **dict(zip(("k", "v", "k_scale", "v_scale"), question.inputs.view, strict=False)),
    }
    before = {name: judge.numbers(x).copy() for name, x in tensors.items() if x is not None}
    tables = question.inputs.view.layout.tables.tobytes()
    outcomes = [ask(question, name) for name in names]
    native = [o for o in outcomes if o.backend.startswith("cpu") and not o.refused]
    if any(o.refused for o in outcomes):
        outcomes.append(ask(question, None))
    if native:
        chosen = native[config.seed % len(native)]
        if not any(v.quantity == "raised" for v in chosen.verdicts):
            chosen.verdicts += sameness(question, chosen.backend)
    for name, old in before.items():
        if not np.array_equal(judge.numbers(tensors[name]), old, equal_nan=True):
            outcomes[0].verdicts.append(Verdict("inputs", np.inf, f"{name} was written to"))
    if question.inputs.view.layout.tables.tobytes() != tables:
        outcomes[0].verdicts.append(Verdict("inputs", np.inf, "the page tables were written to"))
    return outcomes


# --------------------------------------------------------------------------------------- mistakes in what is between
def _held_ignored(real: Any) -> Any:
    return lambda call, mask, held: as_mask(mask, call)


def _position_off(real: Any) -> Any:
    def problem_of(call: str, q: Any, view: KVView, mask: Any, options: Any, group: Any) -> Any:
        problem, inputs = real(call, q, view, mask, options, group)
        return replace(problem, positions=(group.Lk - group.Lq - 1,)), inputs

    return problem_of


def _offsets_off(real: Any) -> Any:
    return lambda call, q, view, *rest: real(call, q.roll(1, 2) if view.layout.queries is not None else q, view, *rest)


def _which_short(real: Any) -> Any:
    def prepare(*given: Any) -> Any:
        execute = real(*given)

        def run_some(q: Any, view: KVView, bias: Any, sinks: Any, lse: bool, to: Any = None, which: Any = ()) -> Any:
            if to is not None:
                to.out.fill_(0)  # memory that happens to be right is no excuse
            return execute(q, view, bias, sinks, lse, to, list(which[:-1]) or list(which))

        return run_some

    return prepare


def _one_group(real: Any) -> Any:
    def groups(q: Any, view: KVView) -> Any:
        found = real(q, view)
        return [found[0]._replace(sequences=tuple(i for group in found for i in group.sequences))]

    return groups


def _first_table(real: Any) -> Any:
    def gathered(view: KVView, *rest: Any) -> Any:
        layout, longest = view.layout, max(range(len(view.layout.lengths)), key=view.layout.lengths.__getitem__)
        starts = type(layout.starts)("q", [layout.starts[longest]] * len(layout.starts))
        own = KVLayout(layout.tables, starts, layout.lengths, layout.queries, layout.clock)
        return real(view._replace(layout=own), *rest)

    return gathered


def _values_by_key_scale(real: Any) -> Any:
    return lambda view, *rest: real(view._replace(v_scale=view.k_scale), *rest)


# name: (what is wrong, the function of qkv.execute or qkv.plans that is replaced, by what)
GLUE_MUTANTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "held ignored": ("what the cache gave back counts as visible", "joined", _held_ignored),
    "position off": ("queries of copied keys stand one place early", "problem_of", _position_off),
    "offsets off": ("rows of a ragged step are taken one place early", "_copied", _offsets_off),
    "which short": ("the last sequence of a group is left out", "_prepare", _which_short),
    "one group": ("the first sequence's lengths serve all", "groups", _one_group),
    "one table": ("all sequences are read by the longest one's table", "gathered", _first_table),
    "value scale": ("stored values are multiplied by the keys' scales", "gathered", _values_by_key_scale),
}


@contextmanager
def glue_mutant(name: str) -> Iterator[None]:
    """qkv with one mistake between a view and its kernels; "" is none."""
    if not name:
        yield
        return
    _, where, wrong = GLUE_MUTANTS[name]
    modules = [m for m in (execute, plans) if hasattr(m, where)]
    real = getattr(modules[0], where)
    private.forget()
    for module in modules:
        setattr(module, where, wrong(real))
    try:
        yield
    finally:
        for module in modules:
            setattr(module, where, real)
        private.forget()


def killer(name: str, asked: Iterable[Question], names: Iterable[str]) -> tuple[Question, str] | None:
    """The first question that tells qkv with this mistake from qkv, and how."""
    with glue_mutant(name):
        for question in asked:
            for backend in names:
                outcome = ask(question, backend)
                if outcome.faults:
                    return question, f"{backend}: {outcome.faults[0]}"
    return None


# ---------------------------------------------------------------------------------------------------- command line
def serve(pipe: Connection, names: tuple[str, ...]) -> None:
    """What a process of the gate does."""
    torch.set_num_threads(1)
    while True:
        pipe.send(ask_all(random_view_config(pipe.recv()), names))


def replay(seed: int, names: Iterable[str]) -> int:
    config = random_view_config(seed)
    return tell_outcomes(config, ask_all(config, names))


def report(statistics: Statistics, seed: int) -> int:
    """Print the errors as parts of their bounds, and the faults; the exit code."""
    for line in statistics.table():
        if line == "":
            break  # what follows is about naive PyTorch
        print(line)
    for backend, count in sorted(statistics.refused.items()):
        print(f"{backend} refused {count} configurations")
    for at, backend, fault in sorted(statistics.faults)[:60]:
        print(f"FAULT {backend}: {fault}   (python -m tests.gates.views_gate --replay {at})")
    print(f"views: {'passed' if not statistics.faults else f'{len(statistics.faults)} faults'}; seed {seed}")
    return 1 if statistics.faults else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gates.views_gate", description="Judge attention on pages.")
    parser.add_argument("--configs", type=int, default=CONFIGS)
    parser.add_argument("--seed", type=int, default=None, help="the first configuration; a new one each run by default")
    parser.add_argument("--replay", type=int, default=None, metavar="SEED", help="one configuration, in full")
    parser.add_argument("--backends", nargs="+", default=None)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    names = tuple(args.backends or names_of_all())
    missing = set(gate.required_backends()) - set(names)
    if missing and args.backends is None:
        print(f"missing backends: {', '.join(sorted(missing))}")
        return 1
    if args.replay is not None:
        return replay(args.replay, names)
    seed = gate.fresh_seed() if args.seed is None else args.seed
    print(f"views: {args.configs} configurations from seed {seed} on {', '.join(names)}")
    wide = sys.stdout.isatty()
    show = lambda s: print(s, end="\r" if wide else "\n", flush=True)  # noqa: E731
    statistics = gate.run(args.configs, seed, names, args.processes, show, serve)
    print()
    return report(statistics, seed)


if __name__ == "__main__":
    sys.exit(main())
