"""`qkv bench --caches` at small sizes: what is compared, which wrong results are noticed, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.bench import caches, results
from qkv.bench.caches import books as caches_books, contest as caches_race, reading as caches_rows
from qkv.bench.caches.contest import Bench, Figure, Line, Race
from qkv.bench.cases import Case
from qkv.bench.race import Spread
from qkv.cache import base, prefix, storage
from qkv.errors import ArgumentError
from tests.kit.bench_fakes import FakeClock, command

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = Case("bf16", 1, 70, 16, B=3, Hq=4, Hkv=2)
LATENT = Case("bf16", 1, 50, 40, B=2, Hq=4, Hkv=1, rank=32)


@pytest.fixture
def small() -> Bench:
    return Bench(cache_bytes=1 << 10, rounds=(1, 1), seconds=0.0)


SMALL: dict[str, Callable[[Bench], list[Line]]] = {
    "paged": partial(caches_rows.paged, case=CASE, judged=True),
    "8 bits": partial(
        caches_rows.quantised, case=CASE, kinds=(torch.int8, torch.float8_e4m3fn), needed=1.6
    ),
    "cascade": partial(caches_rows.cascade, Hq=4, Hkv=2, needed=3.0, batch=4, common=64, own=20, D=16),
    "latent": partial(caches_rows.latent, case=LATENT, needed=1.0),
    "append": partial(caches_books.append, layers=2, needed=2.0, batch=3, heads=2, D=16, steps=20),
    "lookup": partial(caches_books.lookup, needed=10.0, tokens=100),
    "waste": partial(caches_books.waste, batch=5, longest=60),
    "memory": partial(caches_books.memory, pages=8, heads=2, D=16),
}  # fmt: skip
OPPONENTS = {
    "paged": ["contiguous", "contiguous", "contiguous", "gather + SDPA"],
    "8 bits": ["bf16 storage"] * 2,
    "cascade": ["own copies"],
    "append": ["bare copying"],
    "lookup": ["digests alone"],
    "waste": [""],
    "memory": [""] * 4,
}


@pytest.mark.parametrize("name", SMALL)
def test_a_row(name: str, small: Bench) -> None:
    lines = SMALL[name](small)
    assert [line.problem for line in lines] == [""] * len(lines)
    assert all(line.figure is not None for line in lines)
    if name == "latent":
        assert lines[0].opponent in ("two mm", "two bmm")
    else:
        assert [line.opponent for line in lines] == OPPONENTS[name]
    text = "\n".join(map(caches.line_text, lines))
    assert all(line.case in text for line in lines)
    json.dumps(caches.as_data(lines))


def test_targets(small: Bench) -> None:
    """Paged decode is judged where pages are not in order, in time and in the read rate."""
    lines = SMALL["paged"](small)
    needed = [[(f.needed, f.at_most) for f in line.checks] for line in lines]
    judged = [(1.08, True), (0.85, False)]
    assert needed == [[], judged, judged, [(40.0, False)]]
    int8, float8 = SMALL["8 bits"](small)
    assert [f.needed for f in int8.checks] == [1.6]
    assert float8.checks == []
    small.cache_bytes = 1 << 30
    int8, _ = SMALL["8 bits"](small)
    assert int8.checks == []
    assert "in the cache" in int8.case
    every = caches.contests()
    assert caches.contests(quick=True).keys() < every.keys()
    given = {name: contest.keywords.get("needed") for name, contest in every.items() if isinstance(contest, partial)}
    assert {name: n for name, n in given.items() if n} == {
        "cascade 32/32": 3.0, "cascade 32/8": 1.0, "8 bits 32/8": 1.6, "8 bits 32/32": 1.6, "latent 1": 1.0,
        "latent 4": 1.0, "append": 2.0, "append 16 layers": 2.0, "prefix lookup": 10.0,
    }  # fmt: skip


# ---- the pages


def test_places_of_pages() -> None:
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(3, 2, 70, 8, generator=g).to(torch.bfloat16) for _ in range(2))
    tables = {}
    for how in caches_rows.PLACES:
        cache = qkv.cache.PagedCache(pages=15, num_kv_heads=2, head_dim=8)
        seqs = caches_rows.fill(cache, (k, v), how)
        tables[how] = [list(seq.pages) for seq in seqs]
        assert sorted(page for row in tables[how] for page in row) == list(range(15))
        for b in range(3):
            keys, values = caches_rows.read_back(cache.view(seqs), b, 1)
            assert torch.equal(keys, k[b, 1].float())
            assert torch.equal(values, v[b, 1].float())
    assert tables["in order"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert tables["in turn"] == [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13], [2, 5, 8, 11, 14]]
    steps = [b - a for row in tables["shuffled"] for a, b in pairwise(row)]
    assert len(set(steps)) > 3


# ---- wrong results


def problems(lines: list[Line]) -> list[str]:
    return [line.problem for line in lines]


def wrong_attention(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Tensor], Tensor]) -> None:
    """Results over views are changed; over tensors they stay."""
    right = Bench.attention

    def attention(self: Bench, q: Tensor, k: Any, v: Any = None, mask: Any = None) -> Tensor:
        out = right(self, q, k, v, mask)
        return out if v is not None else change(k, out)

    monkeypatch.setattr(Bench, "attention", attention)


@pytest.mark.parametrize("name", ["paged", "8 bits", "cascade", "latent"])
def test_attention_that_is_wrong(name: str, small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_attention(monkeypatch, lambda view, out: out.roll(1, 1))  # another head's
    lines = SMALL[name](small)
    assert all("relative error" in problem for problem in problems(lines))
    assert all(line.figure is None and line.ours is None for line in lines)
    assert all("wrong result" in caches.line_text(line) for line in lines)


@pytest.mark.parametrize("name", ["paged", "8 bits", "cascade", "latent"])
def test_attention_that_is_not_a_number(name: str, small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_attention(monkeypatch, lambda view, out: out * torch.nan)
    assert all("relative error inf" in problem for problem in problems(SMALL[name](small)))


def test_pages_that_change_a_bit(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(view: Any, out: Tensor) -> Tensor:
        shuffled = view.layout.tables[1] - view.layout.tables[0] not in (1, 3)
        return torch.nextafter(out, out + 1) if shuffled else out

    wrong_attention(monkeypatch, change)
    order, turn, shuffled, _ = problems(SMALL["paged"](small))
    assert (order, turn) == ("", "")
    assert shuffled == "shuffled: other bits than in order"


def test_storage_that_is_off(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over what is stored would be right; what is stored is not what was given."""
    right = storage.quantise

    def wrong(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        stored, scale = right(x, kind)
        return stored, scale * 1.1

    monkeypatch.setattr(storage, "quantise", wrong)
    assert all("off by more than rounding" in problem for problem in problems(SMALL["8 bits"](small)))


def test_forks_that_share_nothing(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = qkv.cache.PagedCache.fork

    def fork(self: Any, seq: Any) -> Any:
        twin = right(self, seq)
        self.swap_out(twin)
        self.swap_in(twin)  # on pages of its own
        return twin

    monkeypatch.setattr(qkv.cache.PagedCache, "fork", fork)
    many = partial(SMALL["cascade"], common=32)
    room = qkv.cache.PagedCache.__init__
    monkeypatch.setattr(
        qkv.cache.PagedCache, "__init__", lambda self, *, pages, **given: room(self, pages=2 * pages, **given)
    )
    assert problems(many(small)) == ["shared: 0 pages are shared, of 2 in common"]


def test_an_append_to_another_slot(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = base.Cache._places

    def places(self: Any, step: Any) -> Any:
        found = right(self, step)
        found._base = found._base.flip(0)  # the first sequence's token to the last one's page
        return found

    monkeypatch.setattr(base.Cache, "_places", places)
    assert problems(SMALL["append"](small)) == ["append: layer 0 does not hold what was appended"]


def test_a_prefix_that_is_not_found(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = prefix.PrefixIndex.match
    monkeypatch.setattr(prefix.PrefixIndex, "match", lambda self, *given: right(self, *given)[:-1])
    assert problems(SMALL["lookup"](small)) == ["80 tokens found, of 96"]


@pytest.mark.parametrize(("name", "count"), [("waste", 1), ("memory", 4)])
def test_figures_that_are_off(name: str, count: int, small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.Storage, "bytes_per_slot", property(lambda self: 7))
    monkeypatch.setattr(qkv.cache.PagedCache, "_empty_slots", lambda self: 1)
    found = problems(SMALL[name](small))
    assert len(found) == count
    assert all("stats()" in problem for problem in found)


# ---- times


def test_ratios_and_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    keys = torch.zeros(2, 512)  # 4,096 bytes, read in 4 ms as float32 and in 3 ms as int64
    seconds = {torch.float32: 0.004, torch.int64: 0.003}
    monkeypatch.setattr(caches_race, "read_through", lambda k, v: clock.call(seconds[k.dtype])())
    calls = {"ours": clock.call(0.005), "other": clock.call(0.010), "broken": clock.call(0.001)}
    small = Bench(cache_bytes=1, clock=clock, seconds=0.0)
    race = Race(small, calls, {"broken": "relative error 1"}, (keys[0], keys[1]))
    line = race.line("row", "ours", "other", 1.9, nbytes=2048, of_read=0.35)
    assert line.figure is not None
    assert line.reached is not None
    assert line.figure.value.median == pytest.approx(2.0)
    assert line.reached.possible == 1.15
    assert line.reached.value.median == pytest.approx(0.3)  # half of the bytes in 1.5 ms, of 5
    assert (line.limit, line.figure.verdict, line.reached.verdict, line.rounds) == ("read", "pass", "miss", 5)
    most = race.line("row", "other", "ours", 1.9, at_most=True)
    assert most.figure is not None
    assert (most.figure.value.median, most.figure.verdict) == (pytest.approx(2.0), "miss")
    assert most.reached is None
    assert race.line("row", "ours", "broken").problem == "broken: relative error 1"
    text = caches.line_text(line) + caches.line_text(most)
    assert "30% read, ≥ 35% miss" in text
    assert "≤ 1.9×" in text
    told = caches.summary([line, most])
    assert told.startswith("1 of 3 targets reached.")
    assert "miss: row: 0.30, needed 0.35 (read)" in told


@pytest.mark.parametrize(
    ("value", "at_most", "verdict"),
    [
        ((2.0, 1.8, 2.1), False, "pass"), ((1.9, 1.8, 2.1), False, "near"), ((1.9, 1.8, 1.95), False, "miss"),
        ((2.0, 1.8, 2.1), True, "pass"), ((2.1, 1.9, 2.2), True, "near"), ((2.1, 2.05, 2.2), True, "miss"),
    ],
)  # fmt: skip
def test_verdicts(value: tuple[float, float, float], at_most: bool, verdict: str) -> None:
    assert Figure(Spread(*value), needed=2.0, at_most=at_most).verdict == verdict
    assert Figure(Spread(*value)).verdict == ""


def test_more_than_the_machine_can_do_is_no_pass() -> None:
    fast, faster = (Figure(Spread(x, x, x), "", 0.85, possible=1.15) for x in (1.1, 1.2))
    assert (fast.verdict, faster.verdict) == ("pass", "no data")
    assert "something else ran" in caches.summary([Line("row", limit="read", reached=faster)])


def test_what_an_append_takes_beyond_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """By sequence and layer: 30 microseconds a call of append, 12 a copy of each of two tensors, three sequences."""
    clock = FakeClock()
    right = qkv.cache.PagedCache.append

    def appended(*given: Any) -> None:
        right(*given)
        clock.call(30e-6)()

    copied = Tensor.index_copy_

    def copy(self: Tensor, *given: Any) -> Tensor:
        if self.dtype == torch.complex128 and not busy:
            clock.call(12e-6)()
        return copied(self, *given)

    busy: list[int] = []
    wrote = storage.Plane.write

    def write(*given: Any) -> None:
        busy.append(1)
        wrote(*given)
        busy.clear()

    monkeypatch.setattr(qkv.cache.PagedCache, "append", appended)
    monkeypatch.setattr(storage.Plane, "write", write)
    monkeypatch.setattr(Tensor, "index_copy_", copy)
    (line,) = SMALL["append"](Bench(cache_bytes=1, clock=clock, seconds=0.0))
    assert line.ours is not None
    assert line.theirs is not None
    assert line.figure is not None
    assert line.ours.median == pytest.approx(2 * 30e-6)  # a step
    assert line.theirs.median == pytest.approx(2 * 2 * 12e-6)
    assert line.figure.value.median == pytest.approx((30 - 24) / 3)
    assert "4.00 a sequence and step" in line.note


# ---- the command


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    chosen: dict[str, Any] = {name: SMALL[name] for name in ("waste", "lookup")}
    monkeypatch.setattr(caches, "contests", lambda quick: chosen)
    return chosen


def test_the_command(
    toy: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "caches.json"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert command(["--caches", "--seconds", "20", "--threads", "1", "--json", str(path)]) == 0
    document = results.read(path)["caches"]
    waste, lookup = document["caches"]
    assert waste["measured"] == {
        "median": 15.0, "low": 15.0, "high": 15.0, "unit": "slots", "needed": 15, "at_most": True, "verdict": "pass",
    } or waste["measured"]["median"] < 15  # fmt: skip
    assert lookup["opponent"] == "digests alone"
    assert lookup["seconds"]["median"] > 0
    assert document["settings"]["caches"] is True
    assert document["settings"]["omp_wait_policy"] == "active"
    out = capsys.readouterr().out
    assert "prefix lookup, 100 tokens" in out
    assert "OMP_WAIT_POLICY is not passive" in out
    assert caches.waiting("PASSIVE") == ""


def test_rows_by_name(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--caches", "--list"]) == 0
    assert capsys.readouterr().out == "waste\nlookup\n"
    assert command(["--caches", "--only", "was"]) == 0
    assert "lookup" not in capsys.readouterr().out
    with pytest.raises(ArgumentError, match="no row has such a name"):
        command(["--caches", "--only", "nothing"])


def test_a_row_that_fails_leaves_the_others(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    def fails(bench: Bench) -> list[Line]:
        raise RuntimeError("no memory")

    toy.clear()
    toy.update({"broken": fails, "waste": SMALL["waste"]})
    assert command(["--caches"]) == 1
    out = capsys.readouterr().out
    assert "failed: RuntimeError: no memory" in out
    assert "waste, 5 sequences" in out


def test_slow_is_not_wrong(toy: dict[str, Any]) -> None:
    toy.clear()
    slow = Line("row", figure=Figure(Spread(0.5, 0.4, 0.6), needed=1.0))
    toy["slow"] = lambda bench: [slow]
    assert command(["--caches"]) == 0
    toy["wrong"] = lambda bench: [Line("row", problem="relative error 1")]
    assert command(["--caches"]) == 1


@pytest.mark.parametrize("other", ["--training", "--models", "--sweep", "--no-memory", "--peers=sdpa", "--chart=x.svg"])
def test_other_measurements_are_another_run(other: str) -> None:
    with pytest.raises(ArgumentError, match="Make two runs"):
        command(["--caches", other])
