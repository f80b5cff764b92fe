"""The decoder over its cache, and requests served at once: the same bytes as one by one, whoever joins and leaves."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qkv.cache import PagesExhausted, Step
from qkv.cli.demo import picture as pages
from qkv.errors import ArgumentError, QKVError, UnsupportedError
from qkv.insight.terminal import cells
from qkv.lm import serving
from qkv.lm.decoder import KINDS, Config, Decoder
from qkv.lm.serving import Job, Request, Server, alone, pick
from tests.kit.training import TINY, letters

pytestmark = pytest.mark.usefixtures("one_thread")

SYSTEM = letters(43, seed=7)  # with pages of 8: five full ones, and three bytes


def model(kind: str = "mha", seed: int = 0) -> Decoder:
    """Random weights in float64; attention so sharp and logits so steep that one wrong key changes what is said."""
    made = Decoder(Config(attention=kind, **TINY), seed).double().eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "o_proj.weight", "head.weight")):
                weight.mul_(3.0)
    return made.requires_grad_(False)


def requests(count: int, seed: int = 0, system: bytes = SYSTEM) -> list[Request]:
    """Half of them greedy; no two alike in length."""
    rng = random.Random(seed)
    return [
        Request(system + letters(rng.randint(1, 30), seed=50 * seed + n), rng.randint(1, 20), n % 2 * 0.8, seed=n)
        for n in range(count)
    ]


def same(server: Server) -> None:
    """Every answer is that of its request alone, and all pages were given back."""
    for job in server.jobs:
        assert job.finished, f"{job.name} has {len(job.written)} of {job.request.length} bytes"
        assert job.written == alone(server.model, job.request), f"{job.name} differs"
    stats = server.cache.stats()
    assert (stats.sequences, stats.pages_used, stats.pages_free + stats.pages_cached) == (0, 0, stats.pages)


def served(asked: list[Request], made: Decoder, pages: int = 200, **options: Any) -> Server:
    server = Server(made, made.cache(pages, 8), **options)
    for request in asked:
        server.submit(request)
    server.run()
    return server


# ---- the decoder with a cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_chunks_and_one_byte_at_a_time_are_the_whole(kind: str) -> None:
    """Logits of every byte, batched and ragged; the window's pages are given back on the way."""
    made = model(kind)
    rows = torch.tensor([list(letters(41, seed=n)) for n in range(2)])
    want = made(rows)
    cache = made.cache(40, 4)
    seqs, got = [cache.add(), cache.add()], []
    with torch.inference_mode():
        for part in rows.split([11, 1, 20, 7, 1, 1], dim=1):
            got.append(made(part, cache.step(seqs, T=part.shape[1])))
        cache.free(seqs)
        seqs, ragged = [cache.add(), cache.add()], [[], []]  # type: ignore[var-annotated]
        at = [0, 0]
        while min(at) < 41:
            counts = [min(n, 41 - a) for n, a in zip((3, 8) if at[0] else (9, 0), at, strict=True)]
            packed = torch.cat([row[a : a + n] for row, a, n in zip(rows, at, counts, strict=True)])
            logits = made(packed[None], cache.step(seqs, lengths=counts))[0]
            for mine, part in zip(ragged, logits.split(counts), strict=True):
                mine.append(part)
            at = [a + n for a, n in zip(at, counts, strict=True)]
    # float64: two layers' roundings, with logits of up to a hundred
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.stack([torch.cat(r) for r in ragged]), want, rtol=0, atol=1e-9)
    if kind == "window":
        assert -1 in seqs[0].pages


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_bytes_are_those_of_whole_passes(kind: str) -> None:
    made = model(kind)
    prompt = letters(30, seed=3)
    cache = made.cache(20)
    seq, tokens = cache.add(), list(prompt)
    with torch.inference_mode():
        while len(tokens) < 60:
            new = tokens[seq.length :]
            tokens.append(int(made(torch.tensor([new]), cache.step([seq], T=len(new)))[0, -1].argmax()))
    assert bytes(tokens[30:]) == alone(made, Request(prompt, 30))
    assert cache.stats().tokens <= seq.length == 59


@pytest.mark.parametrize("given", [{"attention": "shared-qk"}, {"op": "sdpa"}], ids=str)
def test_layers_for_comparison_have_no_cache(given: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="no cache"):
        Decoder(Config(**TINY, **given)).cache(4)


def test_int8_storage_is_what_the_cache_says() -> None:
    made, rows = model().float(), torch.tensor([list(letters(40))])
    with torch.inference_mode():
        cache = made.cache(4, storage=torch.int8)
        off = (made(rows, cache.step([cache.add()], T=40)) - made(rows)).abs().max()
    assert cache.stats().storage == torch.int8
    assert 0 < off < 30  # stored keys err by 0.4 %, which scores this sharp make much of


# ---- the server


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_what_is_written_is_what_is_written_alone(kind: str, batch: int) -> None:
    server = served(requests(7), model(kind), batch=batch, chunk=5)
    same(server)
    assert server.preempted == 0


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "drop"])
@pytest.mark.parametrize("seed", range(3))
def test_requests_come_and_go_while_pages_run_out(seed: int, swap: bool) -> None:
    """A pool that holds about two of eight requests; some come later, in the middle of the others."""
    rng, made = random.Random(seed), model("gqa", seed)
    server = Server(made, made.cache(17, 8), batch=5, chunk=rng.choice((1, 4, 50)), swap=swap)
    later = requests(8, seed)
    most = 0
    while later or server.running or server.waiting:
        if later and rng.random() < 0.3:
            server.submit(later.pop())
        server.step()
        most = max(most, len(server.running))
    same(server)
    assert server.preempted > 0, "the pool was large enough"
    assert most > 2


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "drop"])
def test_the_youngest_makes_room(swap: bool) -> None:
    made = model()
    asked = [Request(letters(16, seed=n), 30) for n in range(3)]
    server = Server(made, made.cache(13, 8), batch=3, swap=swap)
    for request in asked:
        server.submit(request)
    left: list[str] = []
    server.run(lambda: left.extend(job.name for job in server.jobs if job.finished and job.name not in left))
    assert left == ["A", "B", "C"]
    assert 1 <= server.preempted <= 4  # who made room comes back when somebody has left, and not before
    same(server)


def test_a_system_prompt_is_computed_once() -> None:
    """Six requests at once: five full pages of eight bytes are computed by the first and shared by the others."""
    made = model()
    asked = [Request(SYSTEM + letters(10, seed=n), 12, seed=n) for n in range(6)]
    server = Server(made, made.cache(200, 8), chunk=16)
    for request in asked:
        server.submit(request)
    shared: set[tuple[int, ...]] = set()
    most = 0

    def watch() -> None:
        nonlocal most
        shared.update(job.seq.pages[:5] for job in server.running if job.seq is not None and job.cached >= 40)
        most = max(most, server.cache.stats().pages_shared)

    server.run(watch)
    same(server)
    assert len(shared) == 1
    assert most == 5
    assert server.shared == 5 * 40
    each = 43 + 10 + 12 - 1  # the last byte written is nobody's context
    assert server.computed == 6 * each - server.shared
    again = Server(made, server.cache)  # their pages are still cached
    again.submit(asked[0])
    again.run()
    same(again)
    assert again.shared == 48


def test_prompts_that_part_inside_a_page_or_are_equal() -> None:
    made = model()
    base = letters(30, seed=1)
    prompts = [base, base, base[:24], base[:20] + b"zzzz" + base[24:], base + b"q", base[:8], base]
    server = served([Request(p, 9, 0.7, seed=n) for n, p in enumerate(prompts)], made, chunk=3)
    same(server)
    assert server.shared > 0


def test_an_answer_is_shared_with_the_question_that_follows_it() -> None:
    made = model()
    first = Request(SYSTEM, 30, 0.5, seed=3)
    server = served([first], made)
    talk = SYSTEM + server.jobs[0].written + b"and then?"
    server.submit(Request(talk, 8, seed=4))
    server.run()
    same(server)
    assert server.shared == (43 + 30 - 1) // 8 * 8  # the answer's last byte was not computed


@pytest.mark.parametrize("batch", [1, 3])
def test_salts_share_nothing(batch: int) -> None:
    """Neither while they run together nor one after the other, and none waits for what it cannot have."""
    made = model()
    asked = [Request(SYSTEM, 10, 0.5, seed=1, salt=salt) for salt in ("alice", "bob", None)]
    server = Server(made, made.cache(200, 8), batch=batch)
    for request in asked:
        server.submit(request)
    server.step()
    assert len(server.running) == batch
    server.run()
    same(server)
    assert server.shared == server.cache.stats().hits == 0
    server.submit(asked[1])
    server.run()
    assert server.shared == 40
    same(server)


def test_a_request_too_long_for_the_pool_is_given_up_alone() -> None:
    made = model()
    server = Server(made, made.cache(8, 8))
    server.submit(Request(letters(90), 5))
    server.submit(Request(letters(20, seed=1), 12))
    with pytest.raises(PagesExhausted):
        server.run()
    server.run()
    assert [job.finished for job in server.jobs] == [False, True]
    assert server.jobs[1].written == alone(made, server.jobs[1].request)
    assert server.cache.stats().pages_used == 0


@pytest.mark.parametrize("where", ["between layers", "after them", "pick"])
def test_an_interrupted_step_is_taken_again(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    server = Server(made, made.cache(60, 8), batch=4)
    for request in requests(4):
        server.submit(request)
    for _ in range(6):
        server.step()
    calls = 0

    def breaking(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return whole(*args)

    whole: Callable[..., Any]
    if where == "pick":
        whole = pick
        monkeypatch.setattr(serving, "pick", breaking)
    else:
        mlp = made.blocks[where == "after them"].mlp  # keys of one layer are stored by then, or of both
        whole = mlp.forward
        monkeypatch.setattr(mlp, "forward", breaking)
    with pytest.raises(KeyboardInterrupt):
        server.run()
    server.run()
    assert calls > 2
    same(server)


def test_generators_are_the_requests_own() -> None:
    made = model()
    first = alone(made, Request(SYSTEM, 20, 1.0, seed=5))
    torch.manual_seed(1)
    assert alone(made, Request(SYSTEM, 20, 1.0, seed=5)) == first
    assert alone(made, Request(SYSTEM, 20, 1.0, seed=6)) != first


def test_a_byte_is_drawn_as_often_as_it_is_likely() -> None:
    logits, rng = torch.tensor([0.0, 1.0, 3.0, -1.0]), torch.Generator().manual_seed(0)
    assert pick(logits, 0, rng) == pick(logits, 1e-3, rng) == 2
    counts = torch.bincount(torch.tensor([pick(logits, 2.0, rng) for _ in range(4000)]), minlength=4)
    p = torch.softmax(logits / 2, -1)
    assert ((counts / 4000 - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()  # five standard deviations


@pytest.mark.parametrize("given", [(b"", 3), (b"a", 0), (b"a", 3, -1.0), (b"a", 3, float("nan"))], ids=str)
def test_requests_that_ask_for_nothing(given: Any) -> None:
    with pytest.raises(ArgumentError, match="a request has a prompt"):
        Request(*given)
    with pytest.raises(ArgumentError, match="at least 1"):
        Server(model(), model().cache(4), batch=0)


# ---- wrong in small ways


def _restarting(step: Step) -> Tensor:
    """Positions that begin at 0 with each step."""
    return torch.cat([torch.arange(n) for n in step.lengths or ()])[None]


def _as_one(step: Step) -> Tensor:
    """Positions that run on over the packed row."""
    return torch.arange(sum(step.lengths or ()))[None]


@pytest.mark.parametrize("wrong", [_restarting, _as_one])
def test_wrong_positions_show(wrong: Callable[[Step], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "positions", property(wrong))
    with pytest.raises(AssertionError, match="differs"):
        same(served(requests(5), model()))


def test_a_row_of_another_sequence_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = serving.accumulate
    monkeypatch.setattr(serving, "accumulate", lambda counts: [max(end - 1, 1) for end in plain(counts)])
    with pytest.raises((AssertionError, QKVError)):
        same(served(requests(5), model()))


def test_pages_of_another_prompt_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that differ in their first byte only, and a cache that does not look at it."""
    made = model()
    asked = [Request(bytes([97 + n]) + SYSTEM, 12) for n in range(3)]
    same(served(asked, made))
    server = Server(made, made.cache(200, 8))
    add = server.cache.add
    monkeypatch.setattr(server.cache, "add", lambda tokens, salt: add(tokens=[97, *tokens[1:]], salt=salt))
    monkeypatch.setattr(server.cache, "_check_tokens", lambda call, names, tokens, T, lengths: None)
    monkeypatch.setattr(server, "_is_being_computed", lambda job: len(server.running) > 0)
    for request in asked:
        server.submit(request)
    server.run()
    with pytest.raises(AssertionError, match="B differs"):
        same(server)


# ---- the picture


def snapshots(server: Server, hidden: int = 0) -> tuple[pages.Picture, list[str]]:
    picture, seen = pages.Picture(server, hidden), []

    def watch() -> None:
        picture.look()
        seen.append("\n".join("".join(text for text, _ in line) for line in picture.lines() + picture.table()))

    server.run(watch)
    return picture, seen


def test_the_picture_shows_tables_and_growing_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    monkeypatch.setattr(serving, "pick", lambda logits, *_: 97 + int(logits[97:123].argmax()))  # letters only
    server = Server(made, made.cache(30, 8), batch=2)
    for n in range(4):
        server.submit(Request(SYSTEM + b"ask ", 12 + n, seed=n))
    picture, seen = snapshots(server, hidden=len(SYSTEM))
    assert max(cells(line) for frame in seen for line in frame.split("\n")) <= 80
    assert len(seen) == server.steps
    assert "A ask " in seen[0]
    assert "waits" in seen[0]
    assert "has left" in seen[-1]
    starts = [frame.split("\n")[0] for frame in seen]
    assert all(after.startswith(before.rstrip()) for before, after in pairwise(starts))
    two = next(frame for frame in seen if frame.count("*") > 7)  # the head and foot have one each
    assert "   0*   1*   2*   3*   4*" in two
    assert "5 of them shared *" in two
    assert picture.shared == 5
    assert 0 < picture.waste < 1
    assert any("5 of them shared" in text for line in picture.fullest for text, _ in line)


def test_long_tables_windows_and_odd_bytes_fit() -> None:
    made = model("window")
    server = Server(made, made.cache(200, 1))
    server.submit(Request(b"\x1b[2J\x07\xff\n" + letters(60), 10))
    _, seen = snapshots(server)
    assert all(cells(line) <= 80 for frame in seen for line in frame.split("\n"))
    assert not any(letter in frame for frame in seen for letter in "\x1b\x07\r")
    swapped = Job(Request(b"a", 1), "B")
    server.jobs.append(swapped)
    swapped.seq = made.cache(4).add()
    assert "moved to host memory" in "".join(text for line in pages.Picture(server).table() for text, _ in line)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_on_a_terminal_it_is_renewed_at_each_step(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    server = Server(made, made.cache(60, 8))
    for request in requests(3):
        server.submit(request)
    screen = _Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(pages, "_has_rich", lambda: rich)
    pages.show(server, hidden=len(SYSTEM), pause=0.0)
    frames = screen.getvalue().count("pages at step")
    assert frames > server.steps if rich else frames == 1
    same(server)
