"""A plan in words: methods side by side, and what ranks have to do, folded where they are many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from qkv.backends.amounts import duration, unit
from qkv.call.problem import Problem
from qkv.checks import short, shown
from qkv.distributed.costs import FEW, Cost, Rank

MOST = 8  # ranks that are told one by one


def lines(plan: Any) -> list[str]:
    """The lines of a printed `DistributedPlan`."""
    p, m = plan.problem, plan.machine
    shape = " x ".join(map(str, plan.mesh))
    found = [
        f"problem   q ({p.B}, {p.Hq}, {p.Lq}, {p.D})  k ({p.B}, {p.Hkv}, {p.Lk}, {p.D})  "
        f"v ({p.B}, {p.Hkv}, {p.Lk}, {p.Dv})  {short(p.dtype)}{', with gradients' if p.needs_grad else ''}",
        f"mask      {shown(p.mask) if p.mask is not None else 'none: every key is visible'}",
        f"mesh      {shape} ranks, each {unit(m.flops, 'FLOP/s', 1000)}, {unit(m.bandwidth, 'B/s', 1000)}, "
        f"{duration(m.latency)} a message",
        f"shards    {_shards(plan)}",
        f"method    {plan.method}: {_reason(plan)}",
    ]
    found += [f"{'refused' if not n else '':<10}{name}: {why}" for n, (name, why) in enumerate(plan.refused)]
    found += ["", *table(methods(plan), "<")]
    found += ["", *table(ranks(plan), ">")]
    notes = _notes(plan)
    return [*found, "", *notes] if notes else found


def _shards(plan: Any) -> str:
    rows = [plan.shards.rows(rank) for rank in range(plan.shards.ranks)]
    parts = max(map(len, plan.shards.ranges))
    return f"{min(rows):,} to {max(rows):,} rows a rank, in at most {parts} range{'s' if parts > 1 else ''}"


def _reason(plan: Any) -> str:
    if plan.asked is not None:
        return "asked for by method="
    taken, alone = plan.seconds, plan.alone
    many = alone / taken if taken else 1.0
    speed = f"{many:.3g}" if many < 1000 else f"{many:,.0f}"
    speed = f"{speed} times as fast as one rank, of {plan.shards.ranks:,}"
    return f"about {duration(taken)}, {speed}"


def compared(one: Cost, chosen: Cost, problem: Problem) -> str:
    """Why a method that could run does not."""
    a, b = one.seconds(problem.needs_grad), chosen.seconds(problem.needs_grad)
    if a > b * 1.02:
        mine, theirs = _exposed(one, problem), _exposed(chosen, problem)
        more = "it waits longer for bytes" if mine > theirs else "its slowest rank has more work"
        return f"{duration(a)}, {a / b:.2f} times as long: {more}" if b else f"{duration(a)}"
    memory, other = (max(_memory(r, problem) for r in cost.ranks) for cost in (one, chosen))
    more = f" and takes {unit(memory, 'B', 1024)}, not {unit(other, 'B', 1024)}" if memory > other * 1.02 else ""
    return f"it is as fast, within 2 %,{more}; {chosen.method} goes first".replace("%,;", "%;")


def _exposed(cost: Cost, problem: Problem) -> float:
    rank = cost.slowest(problem.needs_grad)
    return rank.forward.exposed + (rank.backward.exposed if problem.needs_grad else 0.0)


def _memory(rank: Rank, problem: Problem) -> int:
    return rank.back_memory if problem.needs_grad else rank.memory


def methods(plan: Any) -> list[list[str]]:
    """Each method's slowest rank."""
    p: Problem = plan.problem
    head = ["method", "forward", "waits", *(["backward", "waits"] if p.needs_grad else [])]
    rows = [[*head, "received", *(["in backward"] if p.needs_grad else []), "memory"]]
    for name, cost in plan.costs.items():
        slow = cost.slowest(p.needs_grad)
        times = [slow.forward, *([slow.backward] if p.needs_grad else [])]
        most = max(r.traffic.received for r in cost.ranks)
        back = [unit(max(r.traffic.back_received for r in cost.ranks), "B", 1024)] if p.needs_grad else []
        told = [x for passed in times for x in (duration(passed.seconds), duration(passed.exposed))]
        peak = max(_memory(r, p) for r in cost.ranks)
        rows.append([name, *told, unit(most, "B", 1024), *back, unit(peak, "B", 1024)])
    return rows


def sweep(plans: Sequence[Any]) -> list[str]:
    """One call on several meshes, a line each: the method that runs, and its slowest rank."""
    rows = []
    for plan in plans:
        p, cost = plan.problem, plan.cost
        slow, count = cost.slowest(p.needs_grad), plan.shards.ranks
        even = plan.alone / count / plan.seconds if plan.seconds else 1.0
        times = [slow.forward, *([slow.backward] if p.needs_grad else [])]
        told = [x for passed in times for x in (duration(passed.seconds), duration(passed.exposed))]
        most = max(cost.ranks, key=lambda r: r.traffic.received + r.traffic.back_received).traffic
        moved = [_bytes(most.received), *([_bytes(most.back_received)] if p.needs_grad else [])]
        mesh = " x ".join(map(str, plan.mesh))
        rows.append([mesh, plan.method, f"{even:.0%}", *told, *moved, _bytes(max(_memory(r, p) for r in cost.ranks))])
    grad = plans[0].problem.needs_grad
    times, moved = ["forward", "waits"], ["received"]
    head = ["ranks", "method", "of even", *times, *(["backward", "waits"] if grad else [])]
    return table([[*head, *moved, *(["in backward"] if grad else []), "memory"], *rows], ">")


def ranks(plan: Any) -> list[list[str]]:
    """What ranks have to do by the chosen method: each one, or the least, the middle and the most."""
    p: Problem = plan.problem
    found: Sequence[Rank] = plan.cost.ranks
    columns: list[tuple[str, Callable[[Rank], float], Callable[[float], str]]] = [
        ("rows", lambda r: r.rows, lambda x: f"{x:,.0f}"),
        ("FLOP", lambda r: r.flops, lambda x: unit(x, "", 1000).strip()),
        ("received", lambda r: r.traffic.received, _bytes),
        ("sent", lambda r: r.traffic.sent, _bytes),
        ("memory", lambda r: _memory(r, p), _bytes),
        ("forward", lambda r: r.forward.seconds, duration),
        ("waits", lambda r: r.forward.exposed, duration),
    ]
    if p.needs_grad:
        columns += [
            ("received back", lambda r: r.traffic.back_received, _bytes),
            ("sent back", lambda r: r.traffic.back_sent, _bytes),
            ("backward", lambda r: r.backward.seconds, duration),
            ("waits", lambda r: r.backward.exposed, duration),
        ]
    head = ["rank", *(name for name, _, _ in columns)]
    if len(found) <= MOST:
        return [head, *([str(r.rank), *(say(of(r)) for _, of, say in columns)] for r in found)]
    folds: list[tuple[str, Callable[[list[float]], float]]] = [("min", min), ("median", median), ("max", max)]
    return [head, *([name, *(say(fold([of(r) for r in found])) for _, of, say in columns)] for name, fold in folds)]


def _bytes(n: float) -> str:
    return unit(n, "B", 1024)


def _notes(plan: Any) -> list[str]:
    p, cost = plan.problem, plan.cost
    found = []
    if len(cost.ranks) < cost.of:
        found.append(
            f"of {cost.of:,} ranks {len(cost.ranks)} were looked at, those with most work and bytes among them"
        )
    elif cost.of > FEW:
        found.append("what ranks need of each other is said by ranges; small gaps between them move, too")
    if not cost.exact:
        found.append("pairs are bounds: the mask has to be looked at to count them")
    if p.positions == "tensor":
        found.append("positions are data: planned as if queries stood in order from 0")
    return found


def table(rows: Sequence[Sequence[str]], first: str) -> list[str]:
    """Columns of text: the first to the left or right, the others to the right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if c == 0 and first == "<" else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
