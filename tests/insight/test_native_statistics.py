"""Statistics by the native kernels: against the oracle, against dense float64, and what looking must not change."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import qkv
from qkv.call.statistics import Statistics, Wanted
from tests.kit import backends, looks, skips, views
from tests.kit.bits import bits, exact
from tests.kit.cases import CASES, Config
from tests.kit.generator import random_config
from tests.kit.inputs import materialise
from tests.kit.statistics_truth import Truth
from tests.views.test_values import CASES as VIEWS

NATIVE = tuple(name for name in backends.required() if name.startswith("cpu"))
ALL = Wanted(top=8, mass=True, bins=(16, 24), distance=True)


@pytest.fixture(autouse=True)
def own_passes() -> Iterator[None]:
    """The kernels find statistics themselves."""
    with looks.no_fallback():
        yield


def differ(a: Tensor, b: Tensor) -> bool:
    return bits(a) != bits(b) if a.is_floating_point() else exact(a) != exact(b)


def changed(a: Statistics, b: Statistics) -> list[str]:
    return [name for name, x, y in zip(Statistics._fields, a, b, strict=True) if x is not None and differ(x, y)]


def unobserved(config: Config, given: dict[str, object], backend: str) -> Tensor:
    torch.manual_seed(config.seed)
    out: Tensor = qkv.attention(**given, backend=backend)  # type: ignore[arg-type, assignment]
    return out.detach()


def against_the_oracle(config: Config) -> None:
    """Every instruction set is right, on hidden slots that are poisoned, and changes no bit of the output."""
    if backends.may_refuse("cpu", config):
        return
    inputs = materialise(config)
    truth = Truth.of(inputs.oracle)
    for backend in NATIVE:
        assert not looks.wrong(inputs, truth, backend), (backend, str(config))
        torch.manual_seed(config.seed)
        found = looks.look(inputs.call(), backend, looks.everything(config))
        assert not differ(found.out, unobserved(config, inputs.call(), backend)), (backend, str(config))
        torch.manual_seed(config.seed)
        rows = looks.look(inputs.call(), backend, Wanted())
        assert not differ(found.out, rows.out), (backend, str(config))
        assert not changed(rows.statistics, found.statistics), (backend, str(config))


@pytest.mark.parametrize("config", CASES, ids=lambda config: config.name)
def test_named_cases(config: Config) -> None:
    against_the_oracle(config)


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed: int) -> None:
    against_the_oracle(random_config(seed))


def _on_pages(config: views.ViewConfig) -> None:
    if not looks.native_looks(config):
        return
    inputs = views.materialise(config)
    truths = [Truth.of(call) for call in inputs.oracle]
    for backend in NATIVE:
        assert not looks.wrong_on_pages(inputs, truths, backend), (backend, str(config))
        found = looks.look(inputs.call(), backend, ALL)
        assert not differ(found.out, qkv.attention(**inputs.call(), backend=backend)), (backend, str(config))


@pytest.mark.parametrize("name", VIEWS)
def test_named_views(name: str) -> None:
    """Pages in any order and in common, unread ones poisoned or without memory, int8 and float8, ragged steps."""
    _on_pages(VIEWS[name])


@pytest.mark.parametrize("seed", range(24))
def test_random_views(seed: int) -> None:
    _on_pages(views.random_view_config(seed))


# ------------------------------------------------------------------------------------------------- sizes that matter
# (Lq, Lk, Hq, Hkv, D): many tiles and stripes, with a last one that is not whole; few rows of many heads, in chunks and
# not; one row; keys that end inside of sixteen.
SHAPES = ((700, 700, 2, 2, 32), (530, 1100, 2, 1, 48), (30, 900, 8, 2, 24), (1, 1300, 8, 2, 64), (5, 77, 6, 3, 17))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dense(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, wanted: Wanted) -> Statistics:
    """The definition, all weights at once in float64."""
    Lq, Lk = q.shape[2], k.shape[2]
    s = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    p = s.softmax(-1).nan_to_num()
    away = (torch.arange(Lq)[:, None] + Lk - Lq - torch.arange(Lk)).abs()
    order = torch.sort(s, dim=-1, descending=True, stable=True)
    keys, best = order.indices[..., : wanted.top], order.values[..., : wanted.top]
    rows, columns = wanted.bins or (1, 1)
    bins = torch.zeros(*q.shape[:2], rows, columns, dtype=torch.float64)
    where = (torch.arange(Lq) * rows // Lq)[:, None], torch.arange(Lk) * columns // Lk
    flat = (where[0] * columns + where[1]).flatten()
    bins.view(*q.shape[:2], -1).index_add_(2, flat, p.flatten(2))
    return Statistics(
        s.logsumexp(-1), s.amax(-1), p.amax(-1), -(p * p.clamp(min=1e-300).log()).sum(-1), (p * away).sum(-1),
        keys.masked_fill(best == -math.inf, -1), p.gather(-1, keys), p.sum(-2), bins,
    )  # fmt: skip


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_against_dense_float64(shape: tuple[int, ...], causal: bool, backend: str) -> None:
    """Within 1e-5 of each quantity's own size, and the same for 1 and 2 threads and for any wave of heads.

    Scores of q and k of size 1 are off by some 1e-6, and so are, relatively, weights, their sums and what is counted
    in nats; distances and received mass are compared at the size of the largest.
    """
    Lq, Lk, Hq, Hkv, D = shape
    for dtype in DTYPES:
        g = torch.Generator().manual_seed(D)
        q, k, v = (torch.randn(1, h, n, D, generator=g).to(dtype) for h, n in ((Hq, Lq), (Hkv, Lk), (Hkv, Lk)))
        bins = min(16, Lq), min(24, Lk)
        given = {"q": q, "k": k, "v": v, "mask": qkv.causal() if causal else None, "positions": "end"}
        seen = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq) if causal else None
        want = dense(q, k, seen, D**-0.5, ALL._replace(bins=bins))
        found = looks.look(given, backend, ALL._replace(bins=bins)).statistics
        for name, x, y in zip(Statistics._fields, found, want, strict=True):
            assert x is not None
            assert y is not None
            if name == "top_keys":
                assert (x != y).double().mean() < 1e-3, (dtype, name)  # near ties
                assert ((x < 0) == (y < 0)).all()
                continue
            size = y[y.isfinite()].abs().max().clamp(min=1)
            assert (x.double() - y).abs().max() <= 1e-5 * size, (dtype, name)
        assert (found.mass.sum(-1) - Lq).abs().max() < 1e-5 * Lq  # type: ignore[union-attr]
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3 - threads if threads < 3 else 1)
            again = looks.look(given, backend, ALL._replace(bins=bins)).statistics
        finally:
            torch.set_num_threads(threads)
        assert not changed(found, again)


@pytest.mark.parametrize("backend", NATIVE)
def test_equal_scores_are_ranked_by_key(backend: str) -> None:
    """Whole numbers: scores are exact, and many are equal; up to 64 keys, of which few rows see so many."""
    for dtype, Lq in ((torch.float32, 200), (torch.bfloat16, 200), (torch.float32, 1), (torch.float64, 60)):
        g = torch.Generator().manual_seed(Lq)
        q, k = (torch.randint(-2, 3, (2, 2, n, 8), generator=g).to(dtype) for n in (Lq, 200))
        for top in (1, 3, 64):
            given = {"q": q, "k": k, "v": k, "mask": qkv.causal(), "positions": "end", "scale": 1.0}
            found = looks.look(given, backend, Wanted(top=top)).statistics
            seen = torch.ones(Lq, 200, dtype=torch.bool).tril(200 - Lq)
            want = dense(q, k, seen, 1.0, Wanted(top=top))
            assert torch.equal(found.top_keys, want.top_keys)  # type: ignore[arg-type]
            assert (found.top_weights.double() - want.top_weights).abs().max() < 1e-5  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", NATIVE)
def test_a_needle_is_the_first_key(backend: str) -> None:
    """Anywhere in a row, in a long one too, and found at any magnitude of scores."""
    for where in (0, 15, 16, 191, 192, 1000, 4095):
        for size in (4.0, 1e6):
            q, k = torch.ones(1, 1, 60, 16), torch.zeros(1, 1, 4096, 16)
            k[0, 0, where] = size
            found = looks.look({"q": q, "k": k, "v": k}, backend, Wanted(top=2, mass=True)).statistics
            assert (found.top_keys[..., 0] == where).all()  # type: ignore[index]
            assert (found.top_keys[..., 1] == (0 if where else 1)).all()  # type: ignore[index]
            share = math.exp(size * 4) if size < 100 else math.inf
            want = 1.0 if share == math.inf else share / (share + 4095)
            assert (found.top_weights[..., 0] - want).abs().max() < 1e-5  # type: ignore[index]
            assert abs(found.mass[0, 0, where].item() - 60 * want) < 1e-3  # type: ignore[index]


@pytest.mark.parametrize("backend", NATIVE)
def test_weights_of_few_rows_sum_to_1_at_any_magnitude(backend: str) -> None:
    assert not looks.saturated(backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("Lq", [1, 60])
def test_a_row_of_nan_is_its_own_affair(backend: str, Lq: int) -> None:
    """It is NaN in all that it has, and adds nothing to what others share; a row that sees nothing is 0."""
    q, k = torch.randn(1, 2, Lq, 16), torch.randn(1, 2, 300, 16)
    spoiled = q.clone()
    spoiled[0, 1, -1, 3] = torch.nan
    mask = qkv.dense(torch.ones(Lq, 300, dtype=torch.bool).index_fill_(0, torch.arange(min(Lq - 1, 1)), False))
    f = looks.look({"q": spoiled, "k": k, "v": k, "mask": mask}, backend, ALL._replace(bins=(1, 1))).statistics
    clean = looks.look({"q": q, "k": k, "v": k, "mask": mask}, backend, ALL._replace(bins=(1, 1))).statistics
    for name in ("lse", "score", "weight", "entropy", "distance", "top_weights"):
        x = getattr(f, name)
        assert x[0, 1, -1].isnan().all(), name
        assert not x[0, 0].isnan().any(), name
        assert not x[0, 1, :-1].isnan().any(), name
    assert (f.top_keys[0, 1, -1] == -1).all()  # type: ignore[index]
    rows = Lq - 1 if Lq > 1 else 1
    assert f.mass.sum(-1)[0].tolist() == pytest.approx([rows, rows - 1], rel=1e-5)  # type: ignore[union-attr]
    assert f.map[0, :, 0, 0].tolist() == pytest.approx([rows, rows - 1], rel=1e-5)  # type: ignore[index]
    assert not differ(f.mass[0, 0], clean.mass[0, 0])  # type: ignore[index]
    if Lq > 1:
        for name, nothing in (("score", -math.inf), ("weight", 0), ("entropy", 0), ("distance", 0), ("top_weights", 0)):
            assert (getattr(f, name)[:, :, 0] == nothing).all(), name
        assert (f.top_keys[:, :, 0] == -1).all()  # type: ignore[index]


def test_many_heads_run_in_waves() -> None:
    """Heads whose sums would not all fit: the same bits as one by one."""
    q, k = torch.randn(2, 6, 100, 8), torch.randn(2, 6, 60_000, 8)
    wanted = Wanted(mass=True, bins=(100, 50))
    whole = looks.look({"q": q, "k": k, "v": k}, "cpu", wanted).statistics
    for b, h in ((0, 0), (0, 5), (1, 3)):
        mine = {name: t[b : b + 1, h : h + 1] for name, t in (("q", q), ("k", k), ("v", k))}
        one = looks.look(mine, "cpu", wanted).statistics
        assert not differ(one.mass[0, 0], whole.mass[b, h])  # type: ignore[index]
        assert not differ(one.map[0, 0], whole.map[b, h])  # type: ignore[index]


@pytest.mark.skipif(sys.platform != "linux", reason=skips.NOT_LINUX)
def test_memory_at_100_000_tokens() -> None:
    """Beyond inputs and outputs under 64 MB. A window: memory does not depend on how many keys a row sees."""
    code = """
        import resource, torch, qkv
        from qkv.call.statistics import Wanted
        from tests.kit.looks import look
        from qkv.call.statistics import Statistics
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        wanted = Wanted(top=8, mass=True, bins=(256, 256), distance=True)
        q, k, v = (torch.randn(1, 1, 100_000, 64) for _ in range(3))
        small = {"q": q[:, :, :500], "k": k[:, :, :500], "v": v[:, :, :500]}
        look(small, "cpu", wanted)
        before = peak()
        found = look({"q": q, "k": k, "v": v, "mask": qkv.sliding_window(200)}, "cpu", wanted)
        outputs = found.out.nbytes + sum(t.nbytes for t in found.statistics) + 2 * found.statistics.lse.nbytes
        print(peak() - before - outputs / 2**20)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 64


def test_more_keys_than_the_kernels_rank_are_left_to_tiled() -> None:
    q = torch.randn(1, 1, 3, 8)
    with contextlib.suppress(AssertionError):
        looks.look({"q": q, "k": q, "v": q}, "cpu", Wanted(top=65))
        pytest.fail("somebody ranked 65 keys")
