"""The layers over caches: against themselves without one, on the whole sequence, however it is cut and packed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.cache import DenseCache, LatentCache, LayerStep, PagedCache, PagesExhausted, RingCache, Step
from qkv.errors import ArgumentError, ArgumentTypeError, QKVError, ShapeError, UnsupportedError
from qkv.nn import Attention, LatentAttention
from qkv.rotary import DynamicNTK, LongRoPE, Rotary
from tests.kit.layers import LAYERS, built, close, sample

pytestmark = pytest.mark.usefixtures("one_thread")

# float64: a few hundred roundings, and the rotary angles of another table
CLOSE = 1e-11
LENGTHS = (37, 21, 4)
WINDOW, SINKS = 6, 3
TURN = Rotary(8, 50.0)
MASKS = {
    "ring": qkv.sliding_window(WINDOW),
    "ring, sinks": qkv.causal() & (qkv.prefix(SINKS) | qkv.sliding_window(WINDOW)),
}
KINDS: dict[str, Callable[..., Any]] = {
    "dense": lambda **sizes: DenseCache(sequences=4, capacity=40, debug=True, **sizes),
    "dense, growing": lambda **sizes: DenseCache(sequences=4, **sizes),
    "ring": lambda **sizes: RingCache(sequences=4, window=WINDOW, chunk=40, page_size=4, debug=True, **sizes),
    "ring, sinks": lambda **sizes: RingCache(
        sequences=4, window=WINDOW, sinks=SINKS, chunk=40, page_size=4, debug=True, **sizes
    ),
    "pages of 1": lambda **sizes: PagedCache(pages=140, page_size=1, debug=True, **sizes),
    "pages of 5": lambda **sizes: PagedCache(pages=40, page_size=5, debug=True, **sizes),
}


def made(kind: str, layer: Attention, **options: Any) -> Any:
    sizes = {"num_kv_heads": layer.num_kv_heads, "head_dim": layer.head_dim, "value_dim": layer.value_dim}
    return KINDS[kind](**{**sizes, "dtype": layer.q_proj.weight.dtype, **options})


def inputs(lengths: tuple[int, ...] = LENGTHS, dim: int = 32) -> list[Tensor]:
    """Some tokens are loud: whoever sees one it should not, or misses one, is far off."""
    xs = [sample(n, dim, seed=n) for n in lengths]
    for x in xs:
        for at in (0, 4, 5, 6, 15, 16, len(x) - 1):
            if at < len(x):
                x[at] *= 5
    return xs


def plans(lengths: tuple[int, ...] = LENGTHS) -> dict[str, list[tuple[int, ...]]]:
    """Ways to cut the sequences: a list of steps, each with a count for every sequence."""
    rng, left, ragged = random.Random(3), list(lengths), []
    while any(left):
        step = tuple(min(n, rng.choice((0, 1, 1, 2, 7))) for n in left)
        ragged.append(step)
        left = [n - m for n, m in zip(left, step, strict=True)]
    single = [tuple(int(n > t) for n in lengths) for t in range(max(lengths))]
    prompt = [tuple(n - 1 for n in lengths), tuple(1 for _ in lengths)]  # the last step is not ragged
    return {"whole": [lengths], "prompt and one": prompt, "one at a time": single, "ragged": ragged}


def fed(layer: Any, cache: Any, seqs: Any, xs: list[Tensor], plan: list[tuple[int, ...]]) -> list[Tensor]:
    """What the layer returns for each sequence, in steps: batched where all counts are equal, else packed."""
    at, outs = [0] * len(xs), [[x[:0]] for x in xs]
    with torch.inference_mode():
        for counts in plan:
            parts = [x[a : a + n] for x, a, n in zip(xs, at, counts, strict=True)]
            if len(set(counts)) == 1:
                got = layer(torch.stack(parts), cache=cache.step(seqs, T=counts[0]).layer(0)).unbind()
            else:
                packed = layer(torch.cat(parts)[None], cache=cache.step(seqs, lengths=list(counts)).layer(0))
                got = packed[0].split(list(counts))
            for out, part in zip(outs, got, strict=True):
                out.append(part)
            at = [a + n for a, n in zip(at, counts, strict=True)]
    return [torch.cat(parts) for parts in outs]


def check(layer: Any, cache: Any, plan: list[tuple[int, ...]], tolerance: float = CLOSE) -> None:
    xs = [x.to(next(layer.parameters()).dtype) for x in inputs()]
    got = fed(layer, cache, [cache.add() for _ in xs], xs, plan)
    for one, x in zip(got, xs, strict=True):
        assert one.dtype == x.dtype
        close(one.double(), layer(x[None])[0].double(), tolerance)


@pytest.mark.parametrize("plan", plans())
@pytest.mark.parametrize("kind", KINDS)
def test_every_cache_and_every_cut(kind: str, plan: str) -> None:
    layer = built(32, 4, num_kv_heads=2, rotary=TURN, mask=MASKS.get(kind, qkv.causal()))
    check(layer, made(kind, layer), plans()[plan])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("plan", ["prompt and one", "ragged"])
def test_every_layer(name: str, plan: str) -> None:
    layer = built(32, 4, mask=qkv.causal(), **LAYERS[name])
    check(layer, made("pages of 5", layer), plans()[plan])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Against float64: some 40 roundings, as without a cache; and as far from the layer without a cache."""
    layer = built(32, 4, mask=qkv.causal(), **LAYERS["all"])
    half = copy.deepcopy(layer).to(dtype)
    check(half, made("pages of 5", half), plans()["ragged"], 40 * torch.finfo(dtype).eps)
    xs = [x.to(dtype).double() for x in inputs()]
    cache = made("pages of 5", half)
    got = fed(half, cache, [cache.add() for _ in xs], [x.to(dtype) for x in xs], plans()["ragged"])
    for one, x in zip(got, xs, strict=True):
        close(one.double(), layer(x[None])[0], 60 * torch.finfo(dtype).eps)


def test_autocast() -> None:
    layer = built(32, 4, rotary=TURN, num_kv_heads=2, mask=qkv.causal()).float()
    cache, x = made("pages of 5", layer, dtype=torch.bfloat16), inputs()[0].float()[None]
    want, seqs = layer(x), [cache.add()]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        got = torch.cat([layer(part, cache=cache.step(seqs, T=part.shape[1]).layer(0)) for part in x.split(9, 1)], 1)
    assert got.dtype == torch.bfloat16
    close(got.float(), want, 40 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("own", [qkv.sliding_window(7), None], ids=["layer", "call"])
def test_masks_of_layer_and_call_speak_of_true_positions(own: Any) -> None:
    """Both join; neither is about the step's own tokens 0 .. T - 1."""
    layer = built(32, 4, rotary=TURN, mask=own)
    call = qkv.causal() & (qkv.chunked(8) | qkv.prefix(2))
    cache, x = made("pages of 5", layer), inputs()[0][None]
    seqs, parts = [cache.add()], []
    with torch.inference_mode():
        for part in x.split([3, 1, 17, 1, 15], dim=1):
            parts.append(layer(part, mask=call, cache=cache.step(seqs, T=part.shape[1]).layer(0)))
    close(torch.cat(parts, dim=1), layer(x, mask=call), CLOSE)
    got = torch.cat(parts, dim=1)
    if own is None:
        assert (got - layer(x, mask=qkv.causal())).abs().max() > 0.1  # the mask matters here


def test_a_bool_tensor_is_a_mask_by_index() -> None:
    layer = built(32, 4, rotary=TURN, mask=qkv.causal())
    cache, x = made("dense", layer), inputs()[1][None]
    seen = torch.rand(21, 21, generator=torch.Generator().manual_seed(0)) > 0.4
    seqs = [cache.add()]
    with torch.inference_mode():
        layer(x[:, :15], cache=cache.step(seqs, T=15).layer(0))
        got = layer(x[:, 15:], mask=seen[15:], cache=cache.step(seqs, T=6).layer(0))
    close(got, layer(x, mask=seen)[:, 15:], CLOSE)


def test_twins_go_different_ways() -> None:
    """A fork shares all pages, the partly filled one too; what each twin adds is its own, also in a batch of both."""
    layer = built(32, 4, num_kv_heads=2, rotary=TURN, mask=qkv.causal())
    cache = made("pages of 5", layer)
    x, other = inputs()[0], inputs((31,))[0]
    seq = cache.add()
    fed(layer, cache, [seq], [x[:13]], [(13,)])
    twin = cache.fork(seq)
    both = fed(layer, cache, [seq, twin], [x[13:19], other[13:19]], [(1, 1), (0, 2), (4, 1), (1, 2)])
    again = cache.fork(twin)
    cache.free(twin)
    late = fed(layer, cache, [again, seq], [other[19:31], x[19:31]], [(3, 12), (9, 0)])
    mixed = torch.cat((x[:13], other[13:]))
    close(torch.cat((both[0], late[1])), layer(x[None, :31])[0, 13:], CLOSE)
    close(torch.cat((both[1], late[0])), layer(mixed[None])[0, 13:], CLOSE)


def test_a_shared_prefix_is_not_computed_again() -> None:
    layer = built(32, 4, num_kv_heads=2, rotary=TURN, mask=qkv.causal())
    cache, x = made("pages of 5", layer), inputs()[0]
    tokens = list(range(37))
    first = cache.add(tokens=tokens)
    fed(layer, cache, [first], [x], [(37,)])
    second = cache.add(tokens=[*tokens[:23], *[99] * 9])
    assert second.cached_tokens == 20
    y = torch.cat((x[:23], sample(9, 32, seed=5)))
    close(fed(layer, cache, [second], [y[20:]], [(4,), (1,), (7,)])[0], layer(y[None])[0, 20:], CLOSE)


def test_a_sequence_of_nan_stays_alone() -> None:
    layer = built(32, 4, num_kv_heads=2, rotary=TURN, mask=qkv.causal())
    cache, xs = made("pages of 5", layer), inputs()
    xs[1][:] = torch.nan
    got = fed(layer, cache, [cache.add() for _ in xs], xs, plans()["ragged"])
    assert got[1].isnan().all()
    for i in (0, 2):
        close(got[i], layer(xs[i][None])[0], CLOSE)


def test_no_sequences_and_no_tokens() -> None:
    layer = built(32, 4, rotary=TURN, mask=qkv.causal())
    cache = made("pages of 5", layer)
    with torch.inference_mode():
        assert layer(sample(0, 3, 32), cache=cache.step([], T=3).layer(0)).shape == (0, 3, 32)
        assert layer(sample(1, 0, 32), cache=cache.step([cache.add()], T=0).layer(0)).shape == (1, 0, 32)


@pytest.mark.parametrize("latent", [False, True], ids=["attention", "latent"])
def test_a_compiled_model_leaves_the_cache_to_python(latent: bool) -> None:
    layer: Any = latent_layer() if latent else built(32, 4, num_kv_heads=2, rotary=TURN, mask=qkv.causal())
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    cache = latent_cache() if latent else made("pages of 5", layer)
    x = inputs()[1]
    close(fed(compiled, cache, [cache.add()], [x], [(9,), (1,), (1,), (10,)])[0], layer(x[None])[0], CLOSE)


# ------------------------------------------------------------------------------------------------ wrong in small ways


def _from_zero(step: Step) -> Tensor:
    rows = [torch.arange(n) for n in (step.lengths if step.lengths is not None else [step.T] * len(step.seqs))]
    return torch.cat(rows)[None] if step.lengths is not None else torch.stack(rows)


def _running_on(step: Step) -> Tensor:
    """The packed row's own places: right for one sequence only."""
    count = step.T if step.lengths is None else sum(step.lengths)
    rows = 1 if step.lengths is not None else len(step.seqs)
    return torch.arange(count).expand(rows, count) + (step._starts[0] if step._starts else 0)


def _one_late(step: Step) -> Tensor:
    return step.right + (torch.tensor(step._starts) > 0).any().long()  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [_from_zero, _running_on, _one_late])
def test_wrong_positions_show(wrong: Callable[[Step], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "right", Step.positions, raising=False)
    monkeypatch.setattr(Step, "positions", property(wrong))
    layer = built(32, 4, num_kv_heads=2, rotary=TURN, mask=qkv.causal())
    with pytest.raises(AssertionError, match="off by"):
        check(layer, made("pages of 5", layer), plans()["ragged"])
    latent = latent_layer()
    with pytest.raises(AssertionError, match="off by"):
        check(latent, latent_cache(), plans()["ragged"])


def test_keys_that_come_too_late_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over what the cache held before the step."""
    append, view = LayerStep.append, LayerStep.view
    before: list[Any] = []
    monkeypatch.setattr(LayerStep, "append", lambda self, k, v: (before.append(view(self)), append(self, k, v))[1])
    monkeypatch.setattr(LayerStep, "view", lambda self: before.pop())
    layer = built(32, 4, num_kv_heads=2, rotary=TURN, mask=qkv.causal())
    with pytest.raises((AssertionError, QKVError)):
        check(layer, made("pages of 5", layer), plans()["prompt and one"])
    monkeypatch.undo()
    cache, x = made("pages of 5", layer), inputs()[0]
    seq = cache.add()
    fed(layer, cache, [seq], [x[:8]], [(8,)])
    monkeypatch.setattr(LayerStep, "append", lambda self, k, v: (before.append(view(self)), append(self, k, v))[1])
    monkeypatch.setattr(LayerStep, "view", lambda self: before.pop())
    late = fed(layer, cache, [seq], [x[8:9]], [(1,)])[0]  # here no check of lengths helps: only the values tell
    with pytest.raises(AssertionError, match="off by"):
        close(late, layer(x[None, :9])[0, 8:], CLOSE)


@pytest.mark.parametrize("kind", ["ring", "ring, sinks"])
def test_a_ring_of_another_window_shows(kind: str) -> None:
    layer = built(32, 4, num_kv_heads=2, rotary=TURN, mask=MASKS[kind])
    cache = made(kind, layer)
    layer.mask = qkv.sliding_window(WINDOW + 1) | (
        qkv.prefix(SINKS) & qkv.causal() if "sinks" in kind else qkv.window(0, 0)
    )
    with pytest.raises(AssertionError, match="off by"):
        check(layer, cache, plans()["one at a time"])


def test_keys_without_rotation_show(monkeypatch: pytest.MonkeyPatch) -> None:
    append = LayerStep.append
    layer = built(32, 4, rotary=TURN, mask=qkv.causal())

    def plain(self: LayerStep, k: Tensor, v: Tensor) -> None:
        append(self, TURN.rotate(k, -self.positions), v)

    monkeypatch.setattr(LayerStep, "append", plain)
    with pytest.raises(AssertionError, match="off by"):
        check(layer, made("dense", layer), plans()["prompt and one"])


# ---------------------------------------------------------------------------------------------------- latent attention
# All sizes differ, so that no two can be taken for each other.
SIZES: dict[str, Any] = {
    "q_lora_rank": 14, "kv_lora_rank": 10, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 7,
}  # fmt: skip
LATENT_KINDS: dict[str, dict[str, Any]] = {
    "dense": {"sequences": 3, "capacity": 40, "debug": True},
    "growing": {"sequences": 3},
    "pages of 1": {"pages": 70, "page_size": 1},
    "pages of 16": {"pages": 9, "debug": True},
}


def latent_layer(**options: Any) -> LatentAttention:
    """A float64 layer with sharp scores, whose every parameter is random."""
    given = {"dtype": torch.float64, "mask": qkv.causal(), "rotary": Rotary(4, 30.0, interleaved=True)}
    layer = LatentAttention(32, 3, **{**SIZES, **given, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            gain = 3.0 if name in ("q_proj.weight", "q_b_proj.weight") else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size * gain)
    return layer


def latent_cache(kind: str = "pages of 16", dtype: torch.dtype = torch.float64) -> LatentCache:
    return LatentCache(rank=10, rope_dim=4, dtype=dtype, **LATENT_KINDS[kind])


@pytest.mark.parametrize("plan", plans())
@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_latent_attention_on_every_cache(kind: str, plan: str) -> None:
    """The absorbed form over the cache, against the materialised one."""
    check(latent_layer(absorb=False), latent_cache(kind), plans()[plan])


@pytest.mark.parametrize(
    "options",
    [
        {"q_lora_rank": None},
        {"bias": True, "rotary": Rotary(4, 30.0)},
        {"scale": 0.6, "softcap": 4.0},
        {"absorb": True, "mask": qkv.sliding_window(7)},
    ],
    ids=["no query compression", "bias", "scores", "window"],
)
def test_every_latent_layer(options: dict[str, Any]) -> None:
    check(latent_layer(**options), latent_cache(), plans()["ragged"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latent_attention_in_other_dtypes(dtype: torch.dtype) -> None:
    """The rounded latent is multiplied up after the sum, not before: some 60 roundings between the two forms."""
    layer = latent_layer().to(dtype)
    check(layer, latent_cache(dtype=dtype), plans()["ragged"], 80 * torch.finfo(dtype).eps)


def test_what_the_latent_cache_holds() -> None:
    layer, cache, x = latent_layer(), latent_cache("dense"), inputs()[1]
    seq = cache.add()
    fed(layer, cache, [seq], [x], [(20,), (1,)])
    view = cache.view([seq])
    close(view.k[0, :, :21], layer.latent(x[None])[0])
    assert view.v.shape[-1] == 10
    assert cache.stats().bytes_per_token == (10 + 4) * 8


# ---------------------------------------------------------------------------------------------------------- refusals
def attended(cache: Any, x: Tensor | None = None, **call: Any) -> Any:
    """A good layer and step, but for what is given."""
    layer = built(32, 4, num_kv_heads=2, **call.pop("layer", {}))
    return layer(sample(2, 3, 32) if x is None else x, cache=cache, **call)


def paged(**options: Any) -> PagedCache:
    return PagedCache(**{"pages": 9, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.float64, **options})


def latent(cache: Any, **options: Any) -> Any:
    call = {name: options.pop(name) for name in ("positions",) if name in options}
    return latent_layer(**options)(sample(2, 3, 32), cache=cache, **call)


def latents(rank: int, rope_dim: int) -> Any:
    return LatentCache(rank=rank, rope_dim=rope_dim, pages=9, dtype=torch.float64)


def begun(cache: Any = None, n: int = 2, **step: Any) -> Any:
    cache = paged() if cache is None else cache
    return cache.step([cache.add() for _ in range(n)], **(step or {"T": 3}))


@pytest.mark.parametrize(
    ("kind", "text", "make"),
    [
        (ArgumentTypeError, r"Pass step\.layer\(i\)", lambda: attended({})),
        (ArgumentTypeError, r"type PagedCache.*step\.layer\(i\)", lambda: attended(paged())),
        (ArgumentTypeError, r"type Step.*step\.layer\(i\)", lambda: attended(begun())),
        (ArgumentTypeError, "type KVView", lambda: attended(paged().view([]))),
        (ArgumentError, "context and cache", lambda: attended(begun().layer(0), context=sample(2, 3, 32))),
        (ArgumentError, "Leave positions out", lambda: attended(begun().layer(0), positions=0)),
        (ShapeError, r"x \(2, 4, 32\) and a step of \(2, 3\)", lambda: attended(begun().layer(0), sample(2, 4, 32))),
        (ShapeError, r"\(1, sum T, dim\)", lambda: attended(begun(lengths=[3, 3]).layer(0))),
        (ShapeError, r"x must be \(B, L, dim\)", lambda: attended(begun().layer(0), sample(3, 32))),
        (ArgumentTypeError, "mask", lambda: attended(begun().layer(0), mask=torch.zeros(3, 3))),
        (UnsupportedError, r"model\.eval\(\)", lambda: attended(begun().layer(0), layer={"dropout_p": 0.5})),
        (ShapeError, r"k must be \(2, 3, 3, 8\)", lambda: attended(begun(paged(num_kv_heads=3)).layer(0))),
        (ShapeError, r"k must be \(2, 2, 3, 6\)", lambda: attended(begun(paged(head_dim=6)).layer(0))),
        (ShapeError, r"v must be \(2, 2, 3, 5\)", lambda: attended(begun(paged(value_dim=5)).layer(0))),
        (ArgumentTypeError, "dtype=torch.float64", lambda: attended(begun(paged(dtype=torch.float32)).layer(0))),
        (ShapeError, r"latent must be \(2, 3, 10\)", lambda: attended(begun(latent_cache()).layer(0))),
        (ShapeError, r"latent must be \(2, 3, 9\)", lambda: latent(begun(latents(9, 4)).layer(0))),
        (ShapeError, r"rope must be \(2, 3, 6\)", lambda: latent(begun(latents(10, 6)).layer(0))),
        (ShapeError, "k must be", lambda: latent(begun().layer(0))),
        (ArgumentTypeError, r"Pass step\.layer\(i\)", lambda: latent(latents(10, 4))),
        (ArgumentError, "Leave positions out", lambda: latent(begun().layer(0), positions=3)),
        (UnsupportedError, "dropout", lambda: latent(begun().layer(0), dropout_p=0.1)),
        (ArgumentTypeError, "mask", lambda: latent(begun().layer(0), mask=3)),
    ],
)  # fmt: skip
def test_refusals(kind: type[Exception], text: str, make: Any) -> None:
    with torch.no_grad(), pytest.raises(kind, match=text) as error:
        make()
    assert str(error.value).startswith(("qkv.nn.", "PagedCache.append()", "LatentCache.append()"))


@pytest.mark.parametrize("make", [built, latent_layer], ids=["attention", "latent"])
def test_nothing_is_trained_through_a_cache(make: Any) -> None:
    """Refused before a key is stored; the message says what to do, and doing it works."""
    layer = make(32, 4) if make is built else make()
    cache = paged(num_kv_heads=4) if make is built else latent_cache()
    seqs, x = [cache.add(), cache.add()], sample(2, 3, 32)
    for requires in (False, True):
        with pytest.raises(UnsupportedError, match=r"torch\.inference_mode\(\).*for training leave cache out"):
            layer(x.clone().requires_grad_(requires), cache=cache.step(seqs, T=3).layer(0))
    frozen = copy.deepcopy(layer).requires_grad_(False)
    with pytest.raises(UnsupportedError, match="require grad"):
        frozen(x.clone().requires_grad_(), cache=cache.step(seqs, T=3).layer(0))
    assert [seq.length for seq in seqs] == [0, 0]
    frozen(x, cache=cache.step(seqs, T=3).layer(0))
    with torch.no_grad():
        layer(x, cache=cache.step(seqs, T=3).layer(0))
    assert [seq.length for seq in seqs] == [6, 6]


def test_an_exhausted_pool_leaves_all_as_it_was() -> None:
    layer = built(32, 4, num_kv_heads=2, rotary=TURN, mask=qkv.causal())
    cache = paged(pages=3, page_size=4)
    x = inputs()[0]
    first, second = cache.add(), cache.add()
    fed(layer, cache, [first, second], [x[:5], x[:3]], [(5, 3)])
    with torch.inference_mode(), pytest.raises(PagesExhausted, match="all its pages or none"):
        layer(x[None, 3:7], cache=cache.step([second], T=4).layer(0))
    assert (first.length, second.length) == (5, 3)
    cache.free(first)
    close(fed(layer, cache, [second], [x[3:7]], [(4,)])[0], layer(x[None, :7])[0, 3:], CLOSE)


@pytest.mark.parametrize(
    "scaling", [DynamicNTK(4.0, 8), LongRoPE((1.0,) * 4, (1.0, 2.0, 3.0, 4.0), 4.0, 8)], ids=["ntk", "longrope"]
)
def test_frequencies_that_change_with_the_length(scaling: Any) -> None:
    """Up to the original length all is as without a cache; then stored keys would need other frequencies."""
    layer = built(32, 4, rotary=Rotary(8, 50.0, scaling=scaling), mask=qkv.causal())
    cache, x = made("pages of 5", layer), inputs()[0]
    seq = cache.add()
    close(fed(layer, cache, [seq], [x[:8]], [(7,), (1,)])[0], layer(x[None, :8])[0], CLOSE)
    with pytest.raises(UnsupportedError, match="original_length"):
        fed(layer, cache, [seq], [x[8:9]], [(1,)])
    assert seq.length == 8
