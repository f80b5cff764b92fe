"""Native sparse attention over caches: as the layer without one, however sequences are cut, forked and truncated."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.cache import SparseCache
from qkv.cache.sparse import CompressedStorage, SparseLayerStep
from qkv.errors import ArgumentError, ArgumentTypeError, PagesExhausted, ShapeError, UnsupportedError
from qkv.nn import SparseAttention
from tests.kit.layers import sample
from tests.nn.test_cache import fed, plans
from tests.nn.test_sparse import LAYERS, TURN, near, sparse_layer

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 1e-11  # as the layers over other caches
LENGTHS = (53, 30, 4)
KINDS: dict[str, dict[str, Any]] = {
    "pages of 4": {"pages": 60, "page_size": 4, "debug": True},
    "pages of 16": {"pages": 12, "page_size": 16, "debug": True},
    "dense": {"sequences": 4, "capacity": 54, "debug": True},
    "growing": {"sequences": 4},
}


def tokens(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Loud tokens at the ends of blocks: whoever has another's, or none, is far off."""
    xs = [sample(n, 32, seed=n) for n in lengths]
    for x in xs:
        for at in (0, 3, 4, 7, 8, 15, 16, 31, len(x) - 1):
            if at < len(x):
                x[at] *= 3
    return xs


def check(layer: SparseAttention, cache: Any, plan: list[tuple[int, ...]], lengths: tuple[int, ...] = LENGTHS) -> None:
    xs = tokens(lengths)
    got = fed(layer, cache, [cache.add() for _ in xs], xs, plan)
    for one, x in zip(got, xs, strict=True):
        near(one, layer(x[None])[0], CLOSE)


@pytest.mark.parametrize("plan", plans(LENGTHS))
@pytest.mark.parametrize("kind", KINDS)
def test_every_cache_and_every_cut(kind: str, plan: str) -> None:
    layer = sparse_layer(num_kv_heads=2, rotary=TURN)
    check(layer, layer.cache(**KINDS[kind]), plans(LENGTHS)[plan])


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str) -> None:
    layer = sparse_layer(**LAYERS[name])
    check(layer, layer.cache(pages=60, page_size=8, debug=True), plans(LENGTHS)["ragged"])


@pytest.mark.parametrize("plan", ["one at a time", "ragged"])
def test_blocks_longer_than_pages(plan: str) -> None:
    layer = sparse_layer(num_kv_heads=2, block=24, stride=4, selected_block=12, top_k=3, window=7)
    check(layer, layer.cache(pages=60, page_size=4, debug=True), plans(LENGTHS)[plan])


def test_a_dense_cache_grows_with_its_entries() -> None:
    """It begins with 64 slots and doubles them, at a prompt and at single tokens; entries go along."""
    layer, lengths = sparse_layer(num_kv_heads=2, rotary=TURN), (141, 70)
    cache = layer.cache(sequences=2)
    check(layer, cache, [(60, 60), *[(1, 1)] * 10, (60, 0), (11, 0)], lengths)
    assert cache.page_size > 128


def test_twins_and_truncation_go_different_ways() -> None:
    """A random walk: fork, cut back, go on with other tokens; always as the tokens that a sequence has now."""
    layer = sparse_layer(num_kv_heads=2, rotary=TURN)
    rng = random.Random(5)
    cache = layer.cache(pages=300, page_size=8, debug=True)
    held: dict[Any, Tensor] = {cache.add(): torch.zeros(0, 32, dtype=torch.float64)}
    for number in range(60):
        seq = rng.choice(list(held))
        act = rng.random()
        if act < 0.15 and len(held) < 4:
            held[cache.fork(seq)] = held[seq]
        elif act < 0.35:
            keep = rng.randint(0, len(held[seq]))
            cache.truncate(seq, keep)
            held[seq] = held[seq][:keep]
        elif act < 0.42:
            cache.swap_out(seq)
            cache.swap_in(seq)
        else:
            some = rng.sample(list(held), rng.randint(1, len(held)))
            counts = [rng.choice((1, 1, 2, 5, 11)) for _ in some]
            if rng.random() < 0.5:
                counts = [counts[0]] * len(some)
            new = [sample(n, 32, seed=100 * number + i) for i, n in enumerate(counts)]
            got = fed(layer, cache, some, new, [tuple(counts)])
            for one, added, twin in zip(got, new, some, strict=True):
                held[twin] = torch.cat((held[twin], added))
                near(one, layer(held[twin][None])[0, -len(added) :], CLOSE)


def test_a_shared_prefix_brings_its_entries() -> None:
    layer = sparse_layer(num_kv_heads=2, rotary=TURN)
    cache, x = layer.cache(pages=40, page_size=8, debug=True), tokens()[0]
    ids = list(range(53))
    fed(layer, cache, [cache.add(tokens=ids)], [x], [(53,)])
    second = cache.add(tokens=[*ids[:29], *[99] * 9])
    assert second.cached_tokens == 24
    y = torch.cat((x[:29], sample(9, 32, seed=5)))
    near(fed(layer, cache, [second], [y[24:]], [(6,), (1,), (7,)])[0], layer(y[None])[0, 24:], CLOSE)


def test_two_layers_of_one_cache_and_rollback() -> None:
    layers = [sparse_layer(num_kv_heads=2, rotary=TURN), sparse_layer(num_kv_heads=2)]
    cache, x = layers[0].cache(pages=40, page_size=8, layers=2, debug=True), tokens()[0][None]
    want = layers[1](layers[0](x))
    seqs, got, at = [cache.add()], [], 0
    with torch.inference_mode():
        for count in (10, 1, 1, 13, 1, 27):
            part = x[:, at : at + count]
            step = cache.step(seqs, T=count)  # begun and given up
            layers[0](part * 2, cache=step.layer(0))
            cache.rollback(seqs)
            step = cache.step(seqs, T=count)
            got.append(layers[1](layers[0](part, cache=step.layer(0)), cache=step.layer(1)))
            at += count
    near(torch.cat(got, 1), want, CLOSE)


@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_stored_in_8_bits(storage: torch.dtype) -> None:
    """As close as the stored numbers are: most rows; a block may change places with one that is as important."""
    layer = sparse_layer(num_kv_heads=2, rotary=TURN, compress="mean").float()
    x = tokens()[0].float()[None] / 3
    cache, want = layer.cache(pages=40, page_size=8, storage=storage), layer(x)
    got = fed(layer, cache, [cache.add()], [x[0]], plans((53,))["ragged"])[0]
    off = (got - want[0]).abs().amax(-1).sort().values
    assert off[: int(0.8 * len(off))].max() <= (0.03 if storage == torch.int8 else 0.2) * (1 + want.abs().max())


def test_no_sequences_and_no_tokens() -> None:
    layer = sparse_layer(num_kv_heads=2, rotary=TURN)
    cache = layer.cache(pages=4)
    with torch.inference_mode():
        assert layer(sample(0, 3, 32), cache=cache.step([], T=3).layer(0)).shape == (0, 3, 32)
        assert layer(sample(1, 0, 32), cache=cache.step([cache.add()], T=0).layer(0)).shape == (1, 0, 32)
        assert layer(sample(1, 0, 32), cache=cache.step([cache.add()], lengths=[0]).layer(0)).shape == (1, 0, 32)


def test_a_compiled_layer_leaves_the_cache_to_python() -> None:
    torch._dynamo.reset()
    layer = sparse_layer(num_kv_heads=2, rotary=TURN)
    compiled, cache, x = torch.compile(layer, backend="eager"), layer.cache(pages=8), tokens()[1]
    near(fed(compiled, cache, [cache.add()], [x], [(19,), (1,), (1,), (9,)])[0], layer(x[None])[0], CLOSE)


def test_what_a_cache_holds() -> None:
    """Keys and values of three branches for each token, compressed ones for every fourth."""
    layer = sparse_layer(num_kv_heads=2)
    cache = layer.cache(pages=8, page_size=16, layers=3)
    assert cache.stats().bytes_per_token == 3 * 8 * (3 * 2 * 16 + 2 * 16 // 4)
    seq = cache.add()
    k = torch.randn(1, 6, 23, 8, dtype=torch.float64)
    entries = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    for i in range(3):
        cache.append([seq], k, k, i, compressed=(entries + i, entries - i))
    for i in range(3):
        view = cache.entries([seq], i)
        assert list(view.layout.lengths) == [5]
        held = [t[list(view.layout.tables)].transpose(0, 1).flatten(1, 2)[:, :5] for t in (view.k, view.v)]
        assert torch.equal(held[0], entries[0] + i)
        assert torch.equal(held[1], entries[0] - i)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "on pages or dense"),
        ({"pages": 4, "sequences": 2}, "on pages or dense"),
        ({"pages": 4, "page_size": 6}, "stride must divide page_size"),
        ({"pages": 4, "capacity": 9}, "capacity is of a dense cache"),
        ({"sequences": 4, "identity": "x"}, "identity are of a cache on pages. Got identity="),
        ({"sequences": 4, "page_size": 32}, "are of a cache on pages. Got page_size=32"),
    ],
)
def test_caches_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        SparseCache(stride=4, num_kv_heads=1, head_dim=8, **options)


def test_what_does_not_fit_changes_nothing() -> None:
    layer = sparse_layer(num_kv_heads=2, rotary=TURN)
    cache, x = layer.cache(pages=5, page_size=8), tokens()[0][None]
    seq = cache.add()
    with torch.no_grad():
        prompt = layer(x[:, :21], cache=cache.step([seq], T=21).layer(0))
        with pytest.raises(PagesExhausted):
            layer(x[:, 21:], cache=cache.step([seq], T=32).layer(0))
        other = qkv.cache.PagedCache(pages=4, num_kv_heads=6, head_dim=8, dtype=torch.float64)
        with pytest.raises(ArgumentTypeError, match=r"needs a cache that keeps its entries.*layer\.cache\(pages="):
            layer(x[:, :3], cache=other.step([other.add()], T=3).layer(0))
        wide = SparseCache(stride=8, pages=4, num_kv_heads=6, compressed_heads=2, head_dim=8, dtype=torch.float64)
        with pytest.raises(ArgumentError, match="stride=4 and a cache with stride=8"):
            layer(x[:, :3], cache=wide.step([wide.add()], T=3).layer(0))
        k = torch.randn(1, 6, 3, 8, dtype=torch.float64)
        with pytest.raises(ShapeError, match=r"k_cmp must be \(1, 2, 1, 8\)"):
            cache.append([seq], k, k)
        with pytest.raises(ShapeError, match="pair of tensors"):
            cache.append([seq], k, k, compressed=(k,))
        with pytest.raises((ArgumentError, ArgumentTypeError, ShapeError), match="index"):
            cache.append([seq], k[:, :, :1], k[:, :, :1], index=k)
        with pytest.raises(ArgumentError, match="says where its tokens stand"):
            layer(x[:, 21:22], positions=3, cache=cache.step([seq], T=1).layer(0))
        after = layer(x[:, 21:40], cache=cache.step([seq], T=19).layer(0))
    with pytest.raises(UnsupportedError, match="no gradients"):
        layer(x[:, :3], cache=cache.step([seq], T=3).layer(0))
    near(torch.cat((prompt, after), 1), layer(x[:, :40]), CLOSE)


# ------------------------------------------------------------------------------------------------ wrong in small ways
def _shifted_entries(self: CompressedStorage, layer: int, rows: Any, places: Any, filled: Any) -> None:
    """Each entry one place late."""
    coming = self.coming
    assert coming is not None
    self.coming = tuple(t.roll(1, 2) for t in coming)
    _WRITE(self, layer, rows, places, filled)
    self.coming = coming


def _uncopied(self: CompressedStorage) -> Any:
    """Copies on write forget the entries."""
    return super(CompressedStorage, self)._tensors()


def _no_past(self: SparseLayerStep, k: Tensor, v: Tensor, block: int) -> Any:
    """Blocks of the step's own tokens alone."""
    found = _BLOCKS(self, k, v, block)
    _, places, _ = self._step._blocks(block)
    own = places >= len(self._step.seqs) * (block - 1)
    return None if found is None else tuple(torch.where(own[..., None], t, 0) for t in found)


_WRITE, _BLOCKS = CompressedStorage.write, SparseLayerStep.blocks
WRONG: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "entries one late": (CompressedStorage, "write", _shifted_entries),
    "entries not copied": (CompressedStorage, "_tensors", _uncopied),
    "no tokens before the step": (SparseLayerStep, "blocks", _no_past),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_caches_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, method, wrong = WRONG[name]
    monkeypatch.setattr(kind, method, wrong)
    with pytest.raises(AssertionError, match="off by"):
        test_twins_and_truncation_go_different_ways()
