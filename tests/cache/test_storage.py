"""Numbers in 8 bits with their bounds, pools of the caller's own, and constructors that say what is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import qkv
from qkv.cache import DenseCache, LatentCache, PagedCache, RingCache, stored
from qkv.cache.storage import quantise
from tests.kit.cache_truth import contents, rows, same

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
EPS = torch.finfo(torch.float32).eps


def read_back(x: torch.Tensor, storage: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    number, scale = quantise(x, storage)
    return number.view(storage).to(torch.float32) * scale[..., None], scale


# ---- 8 bits


@pytest.mark.parametrize("power", [-30, -3, 0, 3, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_bounded(power: int, dtype: torch.dtype) -> None:
    """|x - stored * scale|: half a step of int8, or of float8's 3 bits of mantissa, and float32's rounding of two."""
    if dtype == torch.float16:
        power = max(min(power, 2), -3)
    x = (rows(power + 50, 200, 33) ** 3 * 10.0**power).to(dtype)
    true = x.to(torch.float32)
    top = true.abs().amax(-1, keepdim=True)
    for storage, largest in ((INT8, 127), (FLOAT8, 448)):
        got, scale = read_back(x, storage)
        assert torch.equal(scale, top[:, 0] / largest)
        error = (got.double() - true.double()).abs()
        step = scale.double()[:, None]
        half = step / 2 if storage == INT8 else torch.maximum(true.double().abs() / 16, step / 1024)
        assert (error <= half * (1 + 4 * EPS) + 4 * EPS * true.double().abs()).all()
        assert (error.amax(-1) > 0.2 * half.amax(-1)).any(), "the bound is not loose by much"
        assert (got.abs().amax(-1) >= top[:, 0] * (1 - 4 * EPS)).all(), "the largest number is kept"


@pytest.mark.parametrize("storage", [INT8, FLOAT8], ids=str)
def test_rows_that_are_special(storage: torch.dtype) -> None:
    tiny = torch.finfo(torch.float32).smallest_normal
    huge = torch.finfo(torch.float32).max
    x = torch.tensor(
        [[0.0, -0.0, 0.0], [1.0, math.nan, 2.0], [math.inf, 1.0, 0.0], [-math.inf, 0.0, 0.0], [1e-45, 0.0, -1e-45],
         [tiny, -tiny, 0.0], [huge, -huge, huge / 300], [5.0, 5.0, -5.0]],
    )  # fmt: skip
    got, scale = read_back(x, storage)
    assert got[0].tolist() == [0.0, 0.0, 0.0]
    assert scale[0] == 0
    for row in (1, 2, 3):
        assert scale[row].isnan()
        assert got[row].isnan().all()
        assert not quantise(x, storage)[0][row].any(), "the numbers stored are clean"
    assert got[4].abs().max() <= 1e-43
    assert torch.allclose(got[5], x[5], rtol=1e-2)
    assert got[6].isfinite().all()
    assert torch.allclose(got[6][:2], x[6][:2], rtol=1e-6)
    assert torch.allclose(got[7], x[7], rtol=1e-6)
    assert read_back(torch.tensor([[1e300, 1.0]], dtype=torch.float64), storage)[0].isnan().all()


@pytest.mark.parametrize("storage", [INT8, FLOAT8], ids=str)
def test_scales_are_of_one_token_and_head(storage: torch.dtype) -> None:
    cache = PagedCache(pages=8, page_size=4, num_kv_heads=3, head_dim=5, value_dim=8, layers=2, storage=storage)
    a, b = cache.add(), cache.add()
    made = {}
    for layer in range(2):
        k = rows(layer, 2, 3, 6, 5, dtype=torch.bfloat16) * torch.logspace(-3, 3, 18, dtype=torch.bfloat16).view(
            1, 3, 6, 1
        )
        v = rows(layer + 9, 2, 6, 3, 8, dtype=torch.bfloat16).transpose(1, 2)
        cache.append([a, b], k, v, layer=layer)
        made[layer] = k, v
    for layer, (k, v) in made.items():
        view = cache.view([a, b], layer=layer)
        assert view.k.dtype == view.v.dtype == storage
        assert view.dtype == torch.bfloat16
        assert view.k_scale is not None
        assert view.k_scale.shape == (8, 3, 4)
        for i in range(2):
            got_k, got_v, _ = contents(view, i)
            assert same(got_k, read_back(k[i], storage)[0])
            assert same(got_v, read_back(v[i], storage)[0])
    stats = cache.stats()
    assert stats.storage == storage
    assert stats.bytes_per_token == 2 * 3 * (5 + 8 + 8)
    twin = cache.fork(a)
    cache.append([twin], *(x[:1, :, :1] for x in made[0]))
    cache.append([twin], *(x[:1, :, :1] for x in made[1]), layer=1)
    assert same(contents(cache.view([twin], layer=1), 0)[0][:, :6], contents(cache.view([a], layer=1), 0)[0])


@pytest.mark.parametrize("storage", [INT8, FLOAT8], ids=str)
def test_scales_have_no_gradient(storage: torch.dtype) -> None:
    cache = PagedCache(pages=1, num_kv_heads=1, head_dim=4, storage=storage)
    a = cache.add()
    k = rows(1, 1, 1, 3, 4, dtype=torch.bfloat16).requires_grad_()
    cache.append([a], k, k * 2)
    view = cache.view([a])
    assert view.k_scale is not None
    assert view.v_scale is not None
    assert not view.k_scale.requires_grad
    assert not view.v_scale.requires_grad


@pytest.mark.parametrize("storage", [None, INT8, FLOAT8], ids=str)
def test_debug_fills_free_slots_with_nan(storage: torch.dtype | None) -> None:
    cache = PagedCache(pages=4, page_size=4, num_kv_heads=2, head_dim=3, storage=storage, debug=True)
    a = cache.add()
    cache.append([a], rows(1, 1, 2, 6, 3, dtype=torch.bfloat16), rows(2, 1, 2, 6, 3, dtype=torch.bfloat16))
    view = cache.view([a])
    used = a.pages

    def numbers(pages: torch.Tensor, scale: torch.Tensor | None, page: int) -> torch.Tensor:
        return pages[page].float() if scale is None else pages[page].float() * scale[page][..., None]

    for pages, scale in ((view.k, view.k_scale), (view.v, view.v_scale)):
        assert not numbers(pages, scale, used[0]).isnan().any()
        assert numbers(pages, scale, used[1])[:, 2:].isnan().all()
        cache.truncate(a, 5)
        assert numbers(pages, scale, used[1])[:, 1:].isnan().all()
    cache.free(a)
    for page in range(4):
        assert numbers(view.k, view.k_scale, page).isnan().all()
        assert numbers(view.v, view.v_scale, page).isnan().all()


def test_figures_tell_what_is_in_effect() -> None:
    for storage, size in ((None, 2), (INT8, 1), (FLOAT8, 1)):
        for cache in (
            DenseCache(sequences=1, num_kv_heads=2, head_dim=8, storage=storage),
            RingCache(sequences=1, window=8, num_kv_heads=2, head_dim=8, storage=storage),
            PagedCache(pages=4, num_kv_heads=2, head_dim=8, storage=storage),
            LatentCache(rank=8, rope_dim=8, pages=4, storage=storage),
        ):
            stats = cache.stats()
            seq = cache.add()
            assert stats.storage == cache.view([seq]).k.dtype == (storage or torch.bfloat16)
            assert stats.dtype == torch.bfloat16
            scales = 0 if storage is None else 4 if stats.cache == "LatentCache" else 2 * 2 * 4
            assert stats.bytes_per_token == 16 * size * (1 if stats.cache == "LatentCache" else 2) + scales
            assert str(stats.storage)[6:] in str(stats)


# ---- pools of the caller's own


def _pool(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return rows(1, 9, 2, 4, 8, dtype=dtype), rows(2, 9, 2, 4, 6, dtype=dtype)


def i32(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32)


def test_a_view_of_vllm_tables() -> None:
    k, v = _pool()
    table = i32([[3, 1, -1, 99], [7, -1, 2**31 - 1, 0], [5, 0, 8, 2], [-1, -1, -1, -1]])
    view = stored(k, v, table, [5, 4, 13, 0])
    assert list(view.layout.tables) == [3, 1, 7, 5, 0, 8, 2]
    assert list(view.layout.starts) == [0, 2, 3, 7, 7]
    assert list(view.layout.lengths) == [5, 4, 13, 0]
    assert view.layout.queries is None
    assert (view.dtype, view.held, view.k_scale) == (torch.float32, None, None)
    assert view.k.data_ptr() == k.data_ptr()
    assert same(contents(view, 0)[0], torch.cat((k[3], k[1, :, :1]), 1))
    assert same(contents(view, 2)[1], torch.cat((v[5], v[0], v[8], v[2, :, :1]), 1))
    table.zero_()
    assert view.layout.tables[0] == 3
    ragged = stored(k, v, table, torch.tensor([5, 4, 13, 0]), queries=[2, 1, 3, 0])
    assert ragged.layout.queries is not None
    assert list(ragged.layout.queries) == [2, 1, 3, 0]
    turned = rows(1, 9, 4, 2, 8).transpose(1, 2)
    assert same(contents(stored(turned, v, i32([[4]]), [3]), 0)[0], turned[4, :, :3].contiguous())


def test_a_view_of_flashinfer_tables() -> None:
    k, v = _pool()
    view = stored(k, v, (i32([0, 3, 3, 5]), i32([3, 1, 99, 7, 2, 77])), [5, 0, 8])
    assert list(view.layout.tables) == [3, 1, 7, 2]
    assert list(view.layout.starts) == [0, 2, 2, 4]
    empty = stored(k, v, (i32([0]), i32([])), [])
    assert list(empty.layout.starts) == [0]


def test_a_view_of_8_bit_pools() -> None:
    k, v = _pool()
    for storage in (INT8, FLOAT8):
        (qk, sk), (qv, sv) = quantise(k, storage), quantise(v, storage)
        view = stored(
            qk.view(storage), qv.view(storage), i32([[2]]), [4], k_scale=sk, v_scale=sv, dtype=torch.float16
        )  # fmt: skip
        assert view.dtype == torch.float16
        assert same(contents(view, 0)[0], read_back(k[2], storage)[0])


K, V = _pool()
S, A, T = qkv.ShapeError, qkv.ArgumentError, qkv.ArgumentTypeError
BAD_POOLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "page too large": ({"table": i32([[3, 9]]), "lengths": [5]}, A, "page 9"),
    "page negative": ({"table": i32([[3, -1]]), "lengths": [5]}, A, "page -1"),
    "first page negative": ({"table": i32([[-2, 3]]), "lengths": [5]}, A, "page -2"),
    "table too short": ({"table": i32([[3, 1]]), "lengths": [9]}, S, "needs 3"),
    "too few rows": ({"table": i32([[3, 1]]), "lengths": [5, 5]}, S, "2 lengths"),
    "table of int64": ({"table": torch.tensor([[3, 1]])}, T, "int64"),
    "table of float": ({"table": torch.tensor([[3.0, 1.0]])}, T, "float32"),
    "table of bool": ({"table": torch.tensor([[True, False]])}, T, "bool"),
    "table is a list": ({"table": [[3, 1]]}, T, "list"),
    "table is 1-D": ({"table": i32([3, 1])}, S, r"table \(2,\)"),
    "table elsewhere": ({"table": i32([[3, 1]]).to("meta")}, T, "meta"),
    "tuple of one": ({"table": (i32([0, 2]),)}, T, "1 entries"),
    "indptr too short": ({"table": (i32([0]), i32([3, 1]))}, S, "indptr of 1"),
    "indptr decreases": ({"table": (i32([2, 0]), i32([3, 1]))}, A, "from 2 to 0"),
    "indptr begins at 1": ({"table": (i32([1, 3]), i32([3, 1, 2]))}, A, "begin at 0"),
    "indptr negative": ({"table": (i32([-1, 1]), i32([3, 1]))}, A, "from -1"),
    "indptr past the indices": ({"table": (i32([0, 3]), i32([3, 1]))}, A, "2 indices"),
    "indptr too few pages": ({"table": (i32([0, 1]), i32([3, 1]))}, S, "1 pages for sequence 0"),
    "indices of int64": ({"table": (i32([0, 2]), torch.tensor([3, 1]))}, T, "int64"),
    "length negative": ({"lengths": [-1]}, A, "-1"),
    "length is a float": ({"lengths": [5.0]}, T, "5.0"),
    "length is a bool": ({"lengths": [True]}, T, "True"),
    "length huge": ({"lengths": [2**40]}, A, "2\\*\\*31"),
    "lengths is an int": ({"lengths": 5}, T, "int"),
    "queries past the keys": ({"queries": [6]}, A, "6 queries and 5 keys"),
    "queries of another number": ({"queries": [1, 1]}, S, "2 lengths"),
    "queries negative": ({"queries": [-1]}, A, "-1"),
    "k is a list": ({"k_pages": [1]}, T, "list"),
    "k is 3-D": ({"k_pages": K[0]}, S, r"k_pages \(2, 4, 8\)"),
    "v of other pages": ({"v_pages": V[:5]}, S, r"\(5, 2, 4, 6\)"),
    "v of other heads": ({"v_pages": V[:, :1]}, S, r"\(9, 1, 4, 6\)"),
    "v of another dtype": ({"v_pages": V.double()}, T, "float64"),
    "pages of int16": ({"k_pages": K.short(), "v_pages": V.short()}, T, "int16"),
    "pages without slots": ({"k_pages": K[:, :, :0], "v_pages": V[:, :, :0]}, S, "at least 1"),
    "rows with gaps": ({"k_pages": rows(1, 9, 2, 8, 4).transpose(2, 3)}, S, "gaps"),
    "on meta": ({"k_pages": K.to("meta"), "v_pages": V.to("meta")}, A, "meta"),
    "int8 without scales": ({"k_pages": K.char(), "v_pages": V.char(), "dtype": torch.float32}, A, "k_scale=None"),
    "scales without int8": ({"k_scale": torch.ones(9, 2, 4)}, A, "Leave out k_scale"),
    "dtype of another kind": ({"dtype": torch.int32}, T, "int32"),
    "dtype that is not the pool's": ({"dtype": torch.float64}, T, "Leave dtype out"),
}


@pytest.mark.parametrize("name", BAD_POOLS)
def test_malformed_pools(name: str) -> None:
    change, kind, words = BAD_POOLS[name]
    given = {"k_pages": K, "v_pages": V, "table": i32([[3, 1]]), "lengths": [5], **change}
    call = [given.pop(key) for key in ("k_pages", "v_pages", "table", "lengths")]
    with pytest.raises(kind, match=words) as error:
        stored(*call, **given)
    assert str(error.value).startswith("qkv.cache.stored(): ")


def test_malformed_scales() -> None:
    k, v, ones = K.char(), V.char(), torch.ones(9, 2, 4)
    table = i32([[3, 1]])
    for change, kind in (
        ({"dtype": None}, A),
        ({"dtype": "float32"}, T),
        ({"k_scale": ones.double()}, T),
        ({"v_scale": ones[..., None]}, S),
        ({"v_scale": 1.0}, T),
        ({"k_scale": ones.to("meta")}, T),
    ):
        with pytest.raises(kind):
            stored(k, v, table, [5], **{"k_scale": ones, "v_scale": ones, "dtype": torch.float32, **change})


# ---- constructors and calls


MAKE: dict[str, tuple[Any, dict[str, Any]]] = {
    "DenseCache": (DenseCache, {"sequences": 2, "num_kv_heads": 1, "head_dim": 4}),
    "RingCache": (RingCache, {"sequences": 2, "window": 8, "num_kv_heads": 1, "head_dim": 4}),
    "PagedCache": (PagedCache, {"pages": 4, "num_kv_heads": 1, "head_dim": 4}),
}


@pytest.mark.parametrize("kind", MAKE)
def test_malformed_sizes(kind: str) -> None:
    make, sizes = MAKE[kind]
    extra = {"DenseCache": ["capacity"], "RingCache": ["chunk", "page_size"], "PagedCache": ["window", "page_size"]}[
        kind
    ]
    for name in [*sizes, *extra, "value_dim", "layers"]:
        for wrong, error in ((0, A), (-3, A), (True, T), (2.0, T), ("4", T), (2**40, A), ([4], T)):
            with pytest.raises(error, match=name):
                make(**{**sizes, name: wrong})
    for name, wrong, error in (
        ("dtype", torch.int8, T), ("dtype", "float32", T), ("dtype", torch.float8_e4m3fn, T), ("dtype", None, T),
        ("storage", torch.bfloat16, T), ("storage", "int8", T), ("storage", torch.uint8, T), ("device", 0, T),
        ("device", "nowhere", A), ("device", "meta", A), ("debug", 1, T), ("debug", None, T),
    ):  # fmt: skip
        with pytest.raises(error, match=name if wrong != "meta" else "memory"):
            make(**{**sizes, name: wrong})


def test_a_pool_that_no_memory_holds() -> None:
    with pytest.raises(qkv.ArgumentError, match="must fit in memory"):
        PagedCache(pages=2**31 - 1, num_kv_heads=2**20, head_dim=2**20)
    with pytest.raises(qkv.ArgumentError, match="window"):
        PagedCache(pages=4, num_kv_heads=1, head_dim=4, sinks=2)
    with pytest.raises(qkv.ArgumentTypeError, match="identity"):
        PagedCache(pages=4, num_kv_heads=1, head_dim=4, identity=1.5)


GOOD = torch.ones(2, 1, 3, 4, dtype=torch.bfloat16)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "k is None": (lambda c, s: c.append(s, None, GOOD), T, "NoneType"),
    "v is a list": (lambda c, s: c.append(s, GOOD, [1]), T, "list"),
    "k of another dtype": (lambda c, s: c.append(s, GOOD.float(), GOOD), T, "float32"),
    "v of another dtype": (lambda c, s: c.append(s, GOOD, GOOD.half()), T, "float16"),
    "k elsewhere": (lambda c, s: c.append(s, GOOD.to("meta"), GOOD), T, "meta"),
    "k is sparse": (lambda c, s: c.append(s, GOOD.to_sparse(), GOOD), T, "sparse"),
    "k is 3-D": (lambda c, s: c.append(s, GOOD[0], GOOD), S, r"k \(1, 3, 4\)"),
    "k is 0-D": (lambda c, s: c.append(s, GOOD[0, 0, 0, 0], GOOD), S, r"k \(\)"),
    "batch of k": (lambda c, s: c.append(s, GOOD[:1], GOOD), S, r"k \(1, 1, 3, 4\)"),
    "batch of v": (lambda c, s: c.append(s, GOOD, GOOD[:1]), S, r"v \(1, 1, 3, 4\)"),
    "heads": (lambda c, s: c.append(s, GOOD.expand(2, 2, 3, 4), GOOD), S, r"k \(2, 2, 3, 4\)"),
    "head size": (lambda c, s: c.append(s, GOOD[..., :3], GOOD), S, r"k \(2, 1, 3, 3\)"),
    "length of v": (lambda c, s: c.append(s, GOOD, GOOD[:, :, :2]), S, r"v \(2, 1, 2, 4\)"),
    "ragged, not packed": (lambda c, s: c.append(s, GOOD, GOOD, lengths=[3, 3]), S, r"\(1, 1, 6, 4\)"),
    "ragged, wrong sum": (lambda c, s: c.append(s, GOOD[:1], GOOD[:1], lengths=[1, 1]), S, r"\(1, 1, 2, 4\)"),
    "ragged, wrong count": (lambda c, s: c.append(s, GOOD[:1], GOOD[:1], lengths=[3]), S, "1 lengths for 2"),
    "ragged, negative": (lambda c, s: c.append(s, GOOD[:1], GOOD[:1], lengths=[4, -1]), A, "-1"),
    "ragged, float": (lambda c, s: c.append(s, GOOD[:1], GOOD[:1], lengths=[2, 1.0]), T, "1.0"),
    "ragged, bool": (lambda c, s: c.append(s, GOOD[:1], GOOD[:1], lengths=[2, True]), T, "True"),
    "ragged, a number": (lambda c, s: c.append(s, GOOD[:1], GOOD[:1], lengths=3), T, "lengths=3"),
    "ragged, text": (lambda c, s: c.append(s, GOOD[:1], GOOD[:1], lengths="12"), T, "12"),
    "a bare sequence": (lambda c, s: c.append(s[0], GOOD[:1], GOOD[:1]), T, r"Pass \[seq\]"),
    "a sequence twice": (lambda c, s: c.append([s[0], s[0]], GOOD, GOOD), A, "twice"),
    "no sequence": (lambda c, s: c.append([s[0], 1], GOOD, GOOD), T, "entry 1"),
    "seqs is None": (lambda c, s: c.append(None, GOOD, GOOD), T, "None"),
    "seqs is a set": (lambda c, s: c.append(set(s), GOOD, GOOD), T, "set"),
    "too few sequences": (lambda c, s: c.append(s[:1], GOOD, GOOD), S, r"\(2, 1, 3, 4\)"),
    "layer out of order": (lambda c, s: c.append(s, GOOD, GOOD, layer=1), A, "expected layer=0"),
    "layer negative": (lambda c, s: c.append(s, GOOD, GOOD, layer=-1), A, "layer=-1"),
    "layer too large": (lambda c, s: c.append(s, GOOD, GOOD, layer=2), A, "layer=2"),
    "layer is a bool": (lambda c, s: c.append(s, GOOD, GOOD, layer=True), T, "layer=True"),
    "layer is a float": (lambda c, s: c.append(s, GOOD, GOOD, layer=0.0), T, "float"),
    "view of a bare sequence": (lambda c, s: c.view(s[0]), T, r"Pass \[seq\]"),
    "view twice": (lambda c, s: c.view([s[1], s[1]]), A, "twice"),
    "view of no layer": (lambda c, s: c.view(s, layer=5), A, "layer=5"),
    "view of text": (lambda c, s: c.view("ab"), T, "str"),
    "queries past the keys": (lambda c, s: c.view(s, lengths=[4, 1]), A, "4 queries"),
    "queries negative": (lambda c, s: c.view(s, lengths=[-1, 1]), A, "-1"),
    "queries of another number": (lambda c, s: c.view(s, lengths=[1]), S, "1 lengths"),
    "queries as floats, after ints": (lambda c, s: (c.view(s, lengths=[1, 1]), c.view(s, lengths=[1.0, 1])), T, "1.0"),
    "queries as bools, after ints": (lambda c, s: (c.view(s, lengths=[1, 1]), c.view(s, lengths=[1, True])), T, "True"),
    "queries are a number": (lambda c, s: c.view(s, lengths=1), T, "int"),
    "step of nothing": (lambda c, s: c.step(s), A, "neither"),
    "step of both": (lambda c, s: c.step(s, T=1, lengths=[1, 1]), A, "T=1 and lengths"),
    "step of a float": (lambda c, s: c.step(s, T=1.0), T, "1.0"),
    "step of -1": (lambda c, s: c.step(s, T=-1), A, "-1"),
    "layer of a step": (lambda c, s: c.step(s, T=1).layer(2), A, "i=2"),
    "truncate to more": (lambda c, s: c.truncate(s[0], 4), A, "length=4 and a sequence of 3"),
    "truncate to -1": (lambda c, s: c.truncate(s[0], -1), A, "-1"),
    "truncate to a float": (lambda c, s: c.truncate(s[0], 1.0), T, "1.0"),
    "truncate a list": (lambda c, s: c.truncate(s, 1), T, "list"),
    "free twice in a call": (lambda c, s: c.free([s[0], s[0]]), A, "twice"),
    "free nothing": (lambda c, s: c.free(None), T, "None"),
    "rollback of text": (lambda c, s: c.rollback("a"), T, "str"),
}  # fmt: skip


def _filled(kind: str) -> tuple[Any, list[Any]]:
    make, sizes = MAKE[kind]
    chunk = {"chunk": 3} if kind == "RingCache" else {}
    cache = make(**{**sizes, "layers": 2, **chunk})
    seqs = [cache.add(), cache.add()]
    for layer in range(2):
        cache.append(seqs, GOOD, GOOD, layer=layer)
    return cache, seqs


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", BAD_CALLS)
def test_malformed_calls(kind: str, name: str) -> None:
    cache, seqs = _filled(kind)
    call, error, words = BAD_CALLS[name]
    before = cache.stats(), [seq.length for seq in seqs], cache.clock.now
    with pytest.raises(error, match=words) as found:
        call(cache, seqs)
    assert (cache.stats(), [seq.length for seq in seqs], cache.clock.now) == before
    message = str(found.value)
    assert ": " in message
    assert " Got " in message
    assert message.endswith(".")


@pytest.mark.parametrize("kind", MAKE)
def test_sequences_must_be_alive_and_at_home(kind: str) -> None:
    calls = (
        lambda c, s: c.append(s, GOOD, GOOD),
        lambda c, s: c.append(s, GOOD, GOOD, layer=1),
        lambda c, s: c.view(s),
        lambda c, s: c.view(s, lengths=[1, 1]),
        lambda c, s: c.step(s, T=1),
        lambda c, s: c.rollback(s),
        lambda c, s: c.truncate(s[1], 0),
        lambda c, s: c.free(s[1]),
        lambda c, s: c.free(s),
    )
    for call in calls:
        (cache, seqs), (other, mine) = _filled(kind), _filled(kind)
        for both in (cache, other):
            both.append(seqs if both is cache else mine, GOOD, GOOD)  # unfinished steps
        with pytest.raises(qkv.ArgumentError, match="of this cache"):
            call(other, [mine[0], seqs[1]] if call is not calls[1] else seqs)
        cache.free(seqs[1])
        with pytest.raises(qkv.QKVError, match="freed" if call is not calls[1] else "freed|layer"):
            call(cache, seqs)


def test_pages_only_calls_are_checked_too() -> None:
    make, sizes = MAKE["PagedCache"]
    cache, other = make(**sizes), make(**sizes)
    a, b = cache.add(), other.add()
    cache.append([a], GOOD[:1], GOOD[:1])
    for call in (cache.fork, cache.swap_out, cache.swap_in):
        for wrong in (b, None, [a], 3):
            with pytest.raises(qkv.QKVError):
                call(wrong)
    for wrong in (-1, 1.0, True, "all"):
        with pytest.raises(qkv.QKVError, match="pages"):
            cache.evict(wrong)
    cache.free(a)
    for call in (cache.fork, cache.swap_out, cache.swap_in, cache.free):
        with pytest.raises(qkv.ArgumentError, match="freed"):
            call(a)
    assert "freed" in repr(a)


def test_nothing_is_a_batch_too() -> None:
    for make, sizes in MAKE.values():
        cache = make(**sizes, layers=2)
        for layer in range(2):
            cache.append([], GOOD[:0], GOOD[:0], layer=layer)
            assert list(cache.view([], layer=layer).layout.starts) == [0]
        cache.append([], GOOD[:1, :, :0], GOOD[:1, :, :0], lengths=[])
        cache.free([])
        cache.rollback([])
        seq = cache.add()
        for layer in range(2):
            cache.append([seq], GOOD[:1, :, :0], GOOD[:1, :, :0], layer=layer)
        assert seq.length == 0
        assert cache.step([], T=1).positions.shape == (0, 1)
