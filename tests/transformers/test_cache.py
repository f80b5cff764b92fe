"""The caches of transformers under qkv: what is not filled is not read, and `GrowingCache` is a `DynamicCache`."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import qkv.integrations.transformers as adapter
from tests.kit import hf_models as hf

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()
_BOUND = 1e-5


def test_a_static_cache_is_not_read_past_what_is_filled() -> None:
    """NaN in the slots to come changes nothing."""
    model, ids = hf.build("llama"), hf.tokens()
    with torch.no_grad(), hf.running(model, "qkv"):
        want = model(input_ids=ids).logits[:, -1]
        cache = StaticCache(config=model.config, max_cache_len=64)
        held = {adapter.cache_keyword(model): cache}
        model(input_ids=ids[:, :-1], **held)
        for layer in cache.layers:
            for store in (layer.keys, layer.values):
                store[:, :, hf.LENGTH :] = math.nan
        found = model(input_ids=ids[:, -1:], **held).logits[:, -1]
    assert (found - want).abs().max() <= _BOUND


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("gemma2", {}), ("deepseek_v3", {}), ("mistral", {"num_beams": 3}),
     ("llama", {"prompt_lookup_num_tokens": 3}), ("t5", {"num_beams": 2})],
)  # fmt: skip
@pytest.mark.parametrize("implementation", ["qkv", "eager"])
def test_a_growing_cache_is_a_dynamic_cache(name: str, options: dict[str, Any], implementation: str) -> None:
    model = hf.build(name)
    config = model.config.get_text_config(decoder=True)
    cache: Any = adapter.GrowingCache(config=config)
    if name == "t5":
        cache = EncoderDecoderCache(cache, adapter.GrowingCache(config=config))
    batch, side = (1, "none") if "prompt_lookup_num_tokens" in options else (2, "left")
    want = hf.greedy(model, "eager", batch, side, **options)
    held = {adapter.cache_keyword(model): cache}
    assert torch.equal(hf.greedy(model, implementation, batch, side, **held, **options), want)


def test_a_growing_cache_copies_seldom() -> None:
    g = torch.Generator().manual_seed(0)
    cache, plain = adapter.GrowingCache(), DynamicCache()
    places = set()
    for n in [3] + [1] * 400:
        k, v = (torch.randn(2, 2, n, d, generator=g) for d in (4, 6))
        found, want = cache.update(k, v, 0), plain.update(k, v, 0)
        assert all(map(torch.equal, found, want))
        places.add(found[0].data_ptr())
    assert len(places) <= 4  # 3 + 64, 134, 268, 536 slots
    for c in (cache, plain):  # steps back, and what was forgotten is written over
        c.crop(-7)
        c.reorder_cache(torch.tensor([1, 1]))
    k, v = (torch.randn(2, 2, 2, d, generator=g) for d in (4, 6))
    assert all(map(torch.equal, cache.update(k, v, 0), plain.update(k, v, 0)))
    assert cache.get_seq_length() == 398
    for c in (cache, plain):
        c.reset()
    assert all(map(torch.equal, cache.update(k, v, 0), plain.update(k, v, 0)))


@pytest.mark.parametrize("first", ["original", "copy"])
def test_shallow_copies_of_a_growing_cache_go_their_own_ways(first: str) -> None:
    """Both hold what was there; what one appends, or writes over after a crop, the other does not see."""
    g = torch.Generator().manual_seed(0)

    def made(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (torch.randn(1, 2, n, 4, generator=g) for _ in range(2))
        return k, v

    cache, begun, mine, theirs = adapter.GrowingCache(), made(5), made(2), made(3)
    cache.update(*begun, 0)
    twin = copy.copy(cache)
    layer = copy.copy(cache.layers[0])
    for held in (cache.layers[0], twin.layers[0], layer):
        assert torch.equal(held.keys, begun[0])
        assert torch.equal(held.values, begun[1])
    if first == "original":
        cache.crop(-4)
        found = cache.update(*mine, 0), twin.update(*theirs, 0)
    else:
        ours = twin.update(*theirs, 0)
        cache.crop(-4)
        found = cache.update(*mine, 0), ours
    for i in range(2):
        assert torch.equal(found[0][i], torch.cat([begun[i][:, :, :1], mine[i]], 2))
        assert torch.equal(found[1][i], torch.cat([begun[i], theirs[i]], 2))
    assert torch.equal(layer.keys, begun[0])
    assert (cache.get_seq_length(), twin.get_seq_length(), layer.get_seq_length()) == (3, 8, 5)
    again = copy.copy(twin)
    twin.reset()
    assert torch.equal(again.layers[0].keys, torch.cat([begun[0], theirs[0]], 2))


def test_a_growing_cache_may_leave_inference_mode() -> None:
    cache = adapter.GrowingCache()
    k, v = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    with torch.inference_mode():
        cache.update(k, v, 0)
    with torch.no_grad():
        assert torch.equal(cache.update(k, v, 0)[0], torch.ones(1, 1, 4, 4))


def test_a_growing_cache_leaves_gradients_alone() -> None:
    cache = adapter.GrowingCache()
    w = torch.ones(1, requires_grad=True)
    for n in range(3):
        k, _ = cache.update(w * torch.ones(1, 1, 2, 4), w * torch.ones(1, 1, 2, 4), 0)
        (k * k).sum().backward(retain_graph=True)
        assert w.grad == sum(2 * 8 * (i + 1) for i in range(n + 1))
