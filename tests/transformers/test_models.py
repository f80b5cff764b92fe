"""attn_implementation="qkv" in models of transformers: the same logits, gradients and tokens as `eager`, in float32.

The scores of every layer have a standard deviation above 2, so a wrong mask, head map or scale moves logits by 1e-2 and
more (the mutants below prove it), where rounding moves them by 3e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import qkv
import qkv.integrations.transformers as adapter
from tests.kit import hf_models as hf

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()
_BOUND = 1e-5  # the issue's, for logits of a standard deviation near 1


def difference(name: str, side: str, implementation: str = "qkv", **changes: Any) -> float:
    """The largest difference to eager's logits, over real tokens."""
    model, ids, mask = hf.build(name, **changes), hf.tokens(), hf.padded(side)
    with torch.no_grad():
        want = hf.real_rows(model, mask, hf.logits(model, ids, mask))
        with hf.running(model, implementation):
            found = hf.real_rows(model, mask, hf.logits(model, ids, mask))
    assert want.std() > 0.5
    return float((found - want).abs().max())


# -------------------------------------------------------------------------------------------------------------- logits
@pytest.mark.parametrize("name", hf.MODELS)
def test_scores_are_peaky(name: str) -> None:
    found = hf.score_std(hf.build(name), hf.tokens())
    assert len(found) >= 2
    assert min(found) > 2


@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", hf.MODELS)
def test_logits_are_those_of_eager(name: str, side: str) -> None:
    assert difference(name, side) <= _BOUND


@pytest.mark.filterwarnings("ignore:qkv. the model uses its attention mask as a tensor")  # its indexer does
@pytest.mark.parametrize("name", hf.INDEXED)
def test_models_whose_layers_select_keys(name: str) -> None:
    """Logits and greedy tokens, as eager; to attend to all keys shows."""
    model, ids = hf.build(name), hf.tokens()
    assert min(hf.score_std(model, ids)) > 2
    for side in ("none", "right", "left", "holes"):
        assert difference(name, side) <= _BOUND, side
    with torch.no_grad():
        found = hf.logits(model, ids, None)
        model.config.index_topk, kept = hf.LENGTH, model.config.index_topk
        for layer in model.model.layers:
            layer.self_attn.indexer.index_topk = hf.LENGTH
        full = hf.logits(model, ids, None)
        model.config.index_topk = kept
        for layer in model.model.layers:
            layer.self_attn.indexer.index_topk = kept
    assert (found - full).abs().max() > 1e-2
    for cache in (None, "static"):
        want = hf.greedy(model, "eager", 3, "left", cache_implementation=cache)
        assert torch.equal(hf.greedy(model, "qkv", 3, "left", cache_implementation=cache), want), cache


def test_cross_attention_hides_padding_and_follows_other_lengths() -> None:
    model, ids, mask = hf.build("t5"), hf.tokens(), hf.padded("right")
    decoder = hf.tokens(length=11, seed=3)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
        with hf.running(model, "qkv"):
            found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
    assert (found - want).abs().max() <= _BOUND


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["bool", "zero and min", "zero and -inf", "bias"])
def test_a_users_own_mask(name: str, kind: str) -> None:
    """4-D masks reach every layer as they are: a prefix that sees itself both ways, a hole, and nothing later."""
    model, ids = hf.build(name, attn_logit_softcapping=None) if name == "gemma2" else hf.build(name), hf.tokens()
    i, j = torch.arange(hf.LENGTH)[:, None], torch.arange(hf.LENGTH)
    seen = (((j <= i) | ((j < 9) & (i < 9))) & ((j != 4) | (i == 4)))[None, None].expand(2, 1, -1, -1)
    low = torch.finfo(torch.float32).min
    added = torch.zeros(seen.shape).masked_fill(~seen, low)
    if kind == "bias":
        added = torch.where(seen, -0.3 * (i - j).abs(), low)
    given = {"bool": seen, "zero and -inf": added.masked_fill(~seen, -math.inf)}.get(kind, added)
    with torch.no_grad():
        want = hf.logits(model, ids, added)
        causal_only = hf.logits(model, ids, None)
        with hf.running(model, "qkv"):
            found = hf.logits(model, ids, given)
    assert (found - want).abs().max() <= _BOUND
    assert (want - causal_only).abs().max() > 1e-2  # it matters


def test_packed_sequences_do_not_see_each_other() -> None:
    """position_ids that begin anew: as eager, and each sequence as if alone."""
    model = hf.build("mistral")
    ids = hf.tokens(batch=1)
    position_ids = torch.cat([torch.arange(n) for n in (11, 3, 26)])[None]
    with torch.no_grad():
        want = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
        with hf.running(model, "qkv"):
            found = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
            alone = [model(input_ids=part).logits for part in ids.split([11, 3, 26], dim=1)]
            ends = torch.tensor([0, 11, 14, 40], dtype=torch.int32)
            flash = model(
                input_ids=ids, position_ids=position_ids, use_cache=False, cu_seq_lens_q=ends, cu_seq_lens_k=ends,
                max_length_q=26, max_length_k=26,
            ).logits  # fmt: skip
    assert (found - want).abs().max() <= _BOUND
    assert (flash - want).abs().max() <= _BOUND
    assert (torch.cat(alone, 1) - want).abs().max() <= _BOUND


def test_bfloat16_and_autocast() -> None:
    model = hf.build("qwen3")  # its norms leave q and k in float32 under autocast, and v in bfloat16
    ids = hf.tokens()
    with torch.no_grad():
        want = hf.logits(model, ids, None)
        with hf.running(model, "qkv"), torch.autocast("cpu", torch.bfloat16):
            found = hf.logits(model, ids, None)
    assert found.dtype == torch.bfloat16
    assert 1e-4 < (found - want).abs().mean() < 0.05


# ---------------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("name", hf.DECODERS)
def test_greedy_tokens_are_those_of_eager(name: str) -> None:
    """Left padding, 24 tokens, past every window; growing and preallocated caches."""
    model = hf.build(name)
    want = hf.greedy(model, "eager", 3, "left")
    assert want.shape == (3, 24)
    assert len(want.unique()) > 12  # no rows that repeat one token
    for cache in (None, "static"):
        assert torch.equal(hf.greedy(model, "qkv", 3, "left", cache_implementation=cache), want), cache


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mistral", {"num_beams": 3}),
        ("gpt_oss", {"num_beams": 2, "cache_implementation": "static"}),
        ("gemma2", {"prefill_chunk_size": 5}),
        ("llama", {"prompt_lookup_num_tokens": 3}),  # speculative: several new tokens at once, and steps back
        ("llama", {"use_cache": False}),
        ("t5", {}),
    ],
)
def test_other_ways_to_generate(name: str, options: dict[str, Any]) -> None:
    model = hf.build(name)
    batch, side = (1, "none") if "prompt_lookup_num_tokens" in options else (2, "left")
    want = hf.greedy(model, "eager", batch, side, **options)
    assert torch.equal(hf.greedy(model, "qkv", batch, side, **options), want)


def test_compiled_decoding() -> None:
    """torch.compile takes the model with one break, at the mask; the graph of a step serves the steps after it."""
    torch._dynamo.reset()
    model, ids = hf.build("llama", num_hidden_layers=1), hf.tokens(2, 9)
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    found, counts = [], []
    with torch.no_grad():
        for implementation in ("eager", "qkv"):
            seen = torch.ones(2, 9, dtype=torch.int64)
            seen[1, :3] = 0
            held = {adapter.cache_keyword(model): StaticCache(config=model.config, max_cache_len=32)}
            with hf.running(model, implementation):
                step = torch.compile(model, backend=backend) if implementation == "qkv" else model
                out = [model(input_ids=ids, attention_mask=seen, **held).logits[:, -1]]
                for _ in range(5):
                    seen, token = torch.nn.functional.pad(seen, (0, 1), value=1), out[-1].argmax(-1)[:, None]
                    out.append(step(input_ids=token, attention_mask=seen, **held).logits[:, -1])
                    counts.append(len(graphs))
            found.append(torch.stack(out))
    assert (found[0] - found[1]).abs().max() <= _BOUND
    assert counts[-1] == counts[-2] == counts[-3] > 0


# ------------------------------------------------------------------------------------------- nothing is quadratic
class NoLargeTensor(TorchDispatchMode):
    """Refuses every tensor of `limit` elements or more that anybody makes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
                assert t.numel() < self.limit, f"{func} made a tensor {tuple(t.shape)}"
        return found


_NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bert"])
def test_no_tensor_of_all_pairs_is_made(name: str, side: str) -> None:
    long = 2048
    changes = {**_NARROW, "max_position_embeddings": long}
    if name != "bert":
        changes |= {"num_key_value_heads": 2, "head_dim": 8, "layer_types": None}
    model = hf.build(name, **{k: v for k, v in changes.items() if k != "layer_types" or name == "gemma2"})
    ids, mask = hf.tokens(2, long), hf.padded(side, 2, long)
    with torch.no_grad(), hf.running(model, "qkv"), NoLargeTensor(long * long) as watched:
        hf.logits(model, ids, mask)
    assert watched.largest > 2 * long * 32 - 1  # it saw the model's own tensors


def test_the_watch_sees_sdpas_mask() -> None:
    long = 2048
    model = hf.build("mistral", **_NARROW, num_key_value_heads=2, head_dim=8, max_position_embeddings=long)
    with (
        torch.no_grad(),
        hf.running(model, "sdpa"),
        NoLargeTensor(long * long),
        pytest.raises(AssertionError, match="2048, 2048"),
    ):
        hf.logits(model, hf.tokens(2, long), None)


# ---------------------------------------------------------------------------------------------------- wrong adapters
def _attention(**changed: Any) -> Callable[..., Any]:
    """The adapter with some arguments replaced."""

    def wrong(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
        return adapter.attention_forward(module, q, k, v, mask, **{**given, **changed})

    return wrong


def _ignores_the_mask(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
    return adapter.attention_forward(module, q, k, v, None, **{**given, "is_causal": False, "sliding_window": None})


def _only_causal(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
    return adapter.attention_forward(module, q, k, v, None, **{**given, "is_causal": True, "sliding_window": None})


def _tiled_heads(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
    """Query head h reads key head h % Hkv."""
    n = q.shape[1] // k.shape[1]
    return adapter.attention_forward(module, q, k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1), mask, **given)


def _not_transposed(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
    out, _ = adapter.attention_forward(module, q, k, v, mask, **given)
    return out.transpose(1, 2).reshape(out.shape), None


def _swaps_the_padding(**given: Any) -> Any:
    real = given["attention_mask"]
    return adapter.model_mask(**{**given, "attention_mask": None if real is None else real.flip(1)})


def _drops_the_padding(**given: Any) -> Any:
    return adapter.model_mask(**{**given, "attention_mask": None})


def _window_by(step: int) -> Callable[..., Any]:
    def wrong(**given: Any) -> Any:
        found = adapter.model_mask(**given)
        if "sliding_window" in repr(found.mask):
            found.mask = eval(repr(found.mask).replace("window(7)", f"window({7 + step})"), vars(qkv).copy())
        return found

    return wrong


def _stands_on_the_next(**given: Any) -> Any:
    found = adapter.model_mask(**given)
    found.start += 1
    return found


_WRONG: dict[str, tuple[str, str, Callable[..., Any] | None, Callable[..., Any] | None]] = {
    "mask ignored": ("llama", "none", _ignores_the_mask, None),
    "mask ignored, encoder": ("bert", "right", _ignores_the_mask, None),
    "only causal": ("mistral", "none", _only_causal, None),
    "window one longer": ("mistral", "none", None, _window_by(1)),
    "window one shorter": ("gemma2", "none", None, _window_by(-1)),
    "padding side swapped, left": ("llama", "left", None, _swaps_the_padding),
    "padding side swapped, encoder": ("bert", "right", None, _swaps_the_padding),
    "padding dropped": ("qwen3", "left", None, _drops_the_padding),
    "padding dropped, encoder": ("bert", "right", None, _drops_the_padding),
    "padding dropped, holes": ("llama", "holes", None, _drops_the_padding),
    "one position on": ("llama", "none", None, _stands_on_the_next),
    "scale missing": ("gemma2", "none", _attention(scaling=None), None),
    "scale of 1": ("deepseek_v3", "none", _attention(scaling=1.0), None),
    "head order": ("llama", "none", _tiled_heads, None),
    "sinks dropped": ("gpt_oss", "none", _attention(s_aux=None), None),
    "softcap dropped": ("gemma2", "none", _attention(softcap=None), None),
    "position bias dropped": ("t5", "none", _attention(position_bias=None), None),
    "output not transposed": ("llama", "none", _not_transposed, None),
}


@pytest.mark.parametrize("wrong", _WRONG)
def test_a_wrong_adapter_is_noticed(wrong: str) -> None:
    name, side, attention, mask = _WRONG[wrong]
    with hf.adapted(attention, mask) as registered:
        assert difference(name, side, registered) > 1e3 * _BOUND


def test_the_same_judge_passes_the_right_adapter() -> None:
    with hf.adapted() as registered:
        assert difference("gemma2", "left", registered) <= _BOUND
