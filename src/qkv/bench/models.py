"""`qkv bench --models`: decoding with a Hugging Face model, transformers' `sdpa` and `qkv` in turn, ms a token.

A Llama of one billion parameters in shape (16 layers, hidden 2,048, 32/8 heads of 64, intermediate 8,192) with random
bfloat16 weights. Its vocabulary is small (4,096), so that the output layer, which is the same for both, does not
dilute the difference: a vocabulary of 128,256 would add 0.5 GB to the 1.95 GB of weights that every token reads. The
cache is filled with random keys; the prefill is not run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qkv.bench import machine, turns
from qkv.bench.turns import Quartiles, Terms

CONTEXTS, QUICK_CONTEXTS = (512, 4096, 8192, 16384), (512, 8192)
CACHES = ("DynamicCache", "StaticCache", "GrowingCache")  # the last is ours
# How many times as fast as sdpa with its DynamicCache, the default of transformers, this project set out to be.
NEEDED = {
    **{(512, kind): 1.0 for kind in CACHES},
    (8192, "DynamicCache"): 2.5,
    (8192, "StaticCache"): 2.9,
    (8192, "GrowingCache"): 2.9,
}
_KEY_SIZE = 2.0  # scores get a standard deviation of about 1.8: some keys weigh more than others
# Of logits, relative root mean square. Rounding to bfloat16 in 16 layers parts sdpa from eager by 0.06 here, and us
# from sdpa by 0.04; a wrong head map or a quarter of the keys left out by more than 1.
_AGREE = 0.1


@dataclass(frozen=True)
class Shape:
    """The model's; the default is the one that is measured."""

    layers: int = 16
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 8192
    vocabulary: int = 4096


@dataclass(frozen=True)
class Decoding:
    """One context and cache: medians over rounds, ratios within a round as quartiles."""

    context: int
    cache: str
    ours: float  # ms a token
    theirs: float
    ratio: Quartiles  # to sdpa with the same cache
    to_default: Quartiles  # to sdpa with a DynamicCache
    difference: float  # of the logits: relative root mean square
    rounds: int
    needed: float | None = field(init=False)  # of to_default, at least

    def __post_init__(self) -> None:
        object.__setattr__(self, "needed", NEEDED.get((self.context, self.cache)))

    @property
    def agrees(self) -> bool:
        return self.difference <= _AGREE

    @property
    def verdict(self) -> str:
        """As `turns.verdict` says; empty where nothing is needed."""
        if not self.agrees:
            return "wrong result"
        return "" if self.needed is None else turns.verdict([(self.needed, self.to_default)])

    def __str__(self) -> str:
        same, default = (f"{m:.2f}× ({low:.2f} to {high:.2f})" for low, m, high in (self.ratio, self.to_default))
        goal = f", ≥ {self.needed}×" if self.needed else ""
        return (
            f"  {self.context:>6,} tokens, {self.cache:<12}: {self.ours:6.1f} ms a token, sdpa {self.theirs:6.1f}: "
            f"{same}; to sdpa with DynamicCache {default}{goal}  {self.verdict}"
        ).rstrip()


class Contest:
    """A model, and decoding steps on caches that hold `context` tokens."""

    def __init__(self, shape: Shape | None = None, dtype: torch.dtype | None = None) -> None:
        """`dtype`: bfloat16 unless given, but float32 where the layers, products of one row, are slow in it."""
        dtype = dtype or machine.product_type(torch.bfloat16, rows=1)
        self.transformers = transformers = _transformers()
        from qkv.integrations.transformers import cache_keyword

        s = shape or Shape()
        self.config: Any = transformers.LlamaConfig(
            vocab_size=s.vocabulary,
            hidden_size=s.hidden,
            intermediate_size=s.intermediate,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads,
            max_position_embeddings=2 * max(CONTEXTS),
        )
        torch.manual_seed(0)
        make = transformers.AutoModelForCausalLM.from_config
        self.model: Any = make(self.config, dtype=dtype, attn_implementation="sdpa").eval()
        self.dtype = dtype
        self.keyword = cache_keyword(self.model)
        self.token = torch.randint(s.vocabulary, (1, 1))

    def filled(self, kind: str, context: int, room: int) -> Any:
        """A cache with `context` random tokens; a static one has room for `room` more."""
        from qkv.integrations.transformers import GrowingCache

        make = GrowingCache if kind == "GrowingCache" else getattr(self.transformers, kind)
        more = {"max_cache_len": context + room} if kind == "StaticCache" else {}
        cache = make(config=self.config, **more)
        heads, dim = self.config.num_key_value_heads, self.config.head_dim
        g = torch.Generator().manual_seed(context)
        for layer in range(self.config.num_hidden_layers):
            k, v = (torch.randn(1, heads, context, dim, generator=g, dtype=self.dtype) for _ in range(2))
            cache.update(_KEY_SIZE * k, v, layer)
        return cache

    def step(self, cache: Any, token: Tensor, seen: Tensor) -> Tensor:
        """The logits after one more token; `seen` is the 2-D mask that generate() passes as well."""
        found: Tensor = self.model(input_ids=token, attention_mask=seen, **{self.keyword: cache}).logits[:, -1]
        return found

    def decode(self, name: str, cache: Any, context: int, count: int) -> float:
        """Seconds a token of `count` greedy tokens by that attention; the cache is as before afterwards."""
        self.model.set_attn_implementation(name)
        token, seen = self.token, torch.ones(1, context + count, dtype=torch.int64)
        started = time.perf_counter()
        for n in range(count):
            token = self.step(cache, token, seen[:, : context + n + 1]).argmax(-1)[:, None]
        taken = time.perf_counter() - started
        forget(cache, count)
        return taken / count

    @torch.inference_mode()
    def compare(self, context: int, terms: Terms, count: int) -> list[Decoding]:
        """Check one step of each against sdpa, then time all in turn, `count` tokens each, on the same caches."""
        caches = {kind: self.filled(kind, context, room=count + 1) for kind in CACHES}
        contenders = [(name, kind) for kind in CACHES for name in ("sdpa", "qkv")]
        first: dict[tuple[str, str], Tensor] = {}
        for name, kind in contenders:
            self.model.set_attn_implementation(name)
            seen = torch.ones(1, context + 1, dtype=torch.int64)
            first[name, kind] = self.step(caches[kind], self.token, seen).float()
            forget(caches[kind], 1)
        steps = {(name, kind): partial(self.decode, name, caches[kind], context, count) for name, kind in contenders}
        taken = turns.take_turns(steps, terms, lambda decode: 1e3 * decode())
        found = []
        for kind in CACHES:
            ours, theirs = taken["qkv", kind], taken["sdpa", kind]
            want = first["sdpa", kind]
            apart = float((first["qkv", kind] - want).norm() / want.norm())
            ratios = turns.ratios(theirs, ours), turns.ratios(taken["sdpa", "DynamicCache"], ours)
            found.append(
                Decoding(context, kind, statistics.median(ours), statistics.median(theirs), *ratios, apart, len(ours))
            )
        return found


def _transformers() -> Any:
    from qkv.integrations.transformers import register  # says how to install transformers where it is missing

    register()
    import transformers

    return transformers


def forget(cache: Any, count: int) -> None:
    """Take back the last `count` tokens of a cache."""
    for layer in cache.layers:
        if hasattr(layer, "max_cache_len"):
            layer.cumulative_length.sub_(count)
        else:
            layer.crop(-count)


@dataclass(frozen=True)
class Context:
    """Steps behind so many tokens, with all kinds of cache."""

    tokens: int
    contest: Callable[[], Contest]
    count: int

    @property
    def name(self) -> str:
        return f"{self.tokens:,} tokens"

    def compare(self, terms: Terms) -> list[Decoding]:
        """Check one step of each, then time all in turn."""
        return self.contest().compare(self.tokens, terms, self.count)


def measurement(*, shape: Shape | None = None, contexts: Sequence[int] = CONTEXTS, count: int = 4) -> turns.Measurement:
    """`qkv bench --models`, of steps of `count` tokens."""
    contest = cache(partial(Contest, shape))

    def begin(say: turns.Say) -> str:
        say("making the model")
        kind = str(contest().dtype).removeprefix("torch.")
        return f"\nGreedy decoding, batch 1, Hugging Face Llama (16 layers, 32/8 heads of 64, hidden 2,048), {kind}:"

    return turns.Measurement(
        "models",
        seconds=600.0,
        quick_seconds=120.0,
        calls=lambda quick: [Context(n, contest, count) for n in contexts if not quick or n in QUICK_CONTEXTS],
        begin=begin,
        rounds=7,
        quick_rounds=3,
        packages=("transformers",),
    )
