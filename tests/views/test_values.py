"""Attention on pages: random calls against the oracle, and what must not change a bit. See `tests.gates.view_calls`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import qkv
from tests.gates import gate, glue
from tests.gates.view_calls import VIEWS, Question
from tests.kit import backends, views
from tests.kit.bits import bits, differ
from tests.kit.view_variants import by_row, contiguous, joined, run, variants
from tests.kit.views import ViewConfig, random_view_config

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = backends.promising()
NATIVE = tuple(name for name in BACKENDS if name.startswith("cpu"))
FIXED, FRESH = 30, 20

_LONG = {"lengths": (1700, 1600, 1540, 700, 513), "queries": (1,) * 5, "D": 32, "Dv": 32}
_TREE = ((0, 0), (0, 64), (1, 70), (0, 33), (3, 32))
# What random calls reach now and then, here in every run
CASES = {
    "tree of prefixes": ViewConfig(**_LONG, share=_TREE, Hq=4, Hkv=2),
    "tree of prefixes, many rows": ViewConfig(**_LONG, share=_TREE, Hq=12, Hkv=1, dtype="bf16"),
    "tree, two tokens": ViewConfig(**_LONG | {"queries": (2,) * 5}, share=_TREE, Hq=2, Hkv=2, dtype="bf16"),
    "tree, window": ViewConfig(**_LONG, share=_TREE, mask=("sliding_window", 1300)),
    "tree, no mask": ViewConfig(**_LONG, share=_TREE, mask=None, softcap=20.0, sinks="f32"),
    "tree, streaming": ViewConfig(
        **_LONG, share=_TREE, held=("or", ("window", 600, None), ("prefix", 520)), scale=-0.1, dtype="f16"
    ),
    "tree in int8": ViewConfig(**_LONG, share=_TREE, Hq=4, storage="int8", dtype="bf16"),
    "tree in float8": ViewConfig(**_LONG, share=_TREE, Hq=4, storage="f8"),
    "tree of odd pages": ViewConfig(**_LONG, P=24, share=tuple((i, m * 2 // 3) for i, m in _TREE), dtype="bf16"),
    "one slot a page": ViewConfig(P=1, lengths=(600, 530, 3), queries=(1, 1, 1), share=((0, 0), (0, 525), (1, 2))),
    "released": ViewConfig(P=5, lengths=(90, 200), queries=(3, 3), held=("window", 20, None), Hq=4, storage="int8"),
    "latent": ViewConfig(
        lengths=(600, 40), queries=(1, 1), Hq=24, D=72, Dv=64, latent=True, dtype="bf16", share=((0, 0), (0, 2))
    ),
    "latent in int8": ViewConfig(
        P=8, lengths=(600, 41), queries=(2, 2), Hq=16, D=72, Dv=64, latent=True, dtype="bf16", storage="int8"
    ),
    "a prompt": ViewConfig(P=24, lengths=(100, 60), queries=(60, 60), Hq=2, D=64, Dv=48, dtype="bf16"),
    "ragged with none": ViewConfig(lengths=(40, 0, 33, 9), queries=(20, 0, 0, 1), ragged=True, Hq=2, dtype="f64"),
    "nobody asks": ViewConfig(lengths=(5, 0), queries=(0, 0), ragged=True),
}  # fmt: skip
CASES = {name: replace(config, seed=n) for n, (name, config) in enumerate(CASES.items())}


@cache
def question(name: str, pools: tuple[str, str] = ("pages", "pages")) -> Question:
    return VIEWS.question(replace(CASES[name], pools=pools))


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    asked = question(name)
    outcomes = [VIEWS.ask(asked, backend) for backend in BACKENDS]
    faults = [f"{o.backend}: {fault}" for o in outcomes for fault in (*o.faults, o.refused) if fault]
    assert not faults, f"{asked.config}\n" + "\n".join(faults)


@pytest.mark.parametrize("kind", ["fixed", "fresh"])
def test_random_configurations(kind: str) -> None:
    """Every backend under the error rule; one native backend a configuration must give the same bits (see below)."""
    first, count = (0, FIXED) if kind == "fixed" else (gate.fresh_seed(), FRESH)
    faults = []
    for seed in range(first, first + count):
        for outcome in VIEWS.ask_all(random_view_config(seed), BACKENDS):
            faults += [
                f"{outcome.backend}: {f}   (python -m tests.gates.gate views --replay {seed})" for f in outcome.faults
            ]
    assert not faults, f"{len(faults)} faults from seed {first}\n" + "\n".join(faults[:20])


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("name", [name for name in CASES if name != "nobody asks"])
def test_same_bits(name: str, backend: str) -> None:
    """Any page order, pages shared or not, batch, threads, repetition; and as on contiguous keys."""
    asked = question(name)
    checks = dict(variants(asked.inputs, backend))
    assert any(key.endswith("alone") for key in checks)
    changed = {key: found for key, check in checks.items() if (found := check())}
    assert not changed, f"{asked.config}\n{changed}"


@pytest.mark.parametrize("name", ["tree of prefixes", "latent in int8", "ragged with none"])
def test_same_bits_of_copies(name: str) -> None:
    """The same where keys are copied first."""
    checks = dict(variants(question(name).inputs, "tiled"))
    changed = {key: found for key, check in checks.items() if (found := check())}
    assert not changed, f"{CASES[name]}\n{changed}"


@pytest.mark.parametrize("pools", [p for p in dict.fromkeys(views.POOLS) if p != "pages"])
@pytest.mark.parametrize("name", ["tree of prefixes", "tree in int8", "a prompt", "released"])
def test_order_in_memory_changes_no_bit(name: str, pools: str) -> None:
    for backend in NATIVE:
        one = run(question(name).inputs, backend)
        if pools == "fused" and CASES[name].Dv != CASES[name].D:
            continue
        two = run(question(name, (pools, pools)).inputs, backend)
        assert not differ(one, two), f"{backend} {pools}"


def test_page_sizes_of_sixteens_give_the_same_bits() -> None:
    """Page 16 against pages of 32, 48 and all keys on one."""
    torch.manual_seed(2)
    k, v, q = torch.randn(1, 2, 720, 24), torch.randn(1, 2, 720, 40), torch.randn(1, 6, 3, 24)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tensors = [x.to(dtype) for x in (q, k, v)]
        for backend in NATIVE:
            plain = qkv.attention(*tensors, mask=qkv.sliding_window(600), positions="end", backend=backend)
            for P in (16, 48, 80, 720):
                pages = [x.unflatten(2, (-1, P))[0].transpose(0, 1) for x in tensors[1:]]
                table = views.KVLayout(
                    views.array("i", range(720 // P)), views.array("q", [0, 720 // P]), views.array("q", [720]), None,
                    views.Clock(),
                )  # fmt: skip
                view = views.KVView(pages[0], pages[1], None, None, dtype, table, None)
                paged = qkv.attention(tensors[0], view, mask=qkv.sliding_window(600), backend=backend)
                assert torch.equal(plain, paged), f"{backend} {dtype} {P}"


# ----------------------------------------------------------------------------------------------- the judge, judged
@cache
def asked() -> list[Question]:
    return [VIEWS.question(random_view_config(seed)) for seed in range(30)]


@pytest.mark.parametrize("name", ["", *glue.GLUE_MUTANTS])
def test_mistakes_between_view_and_kernel_are_noticed(name: str) -> None:
    found = glue.killer(name, asked(), (None, "tiled"))
    if name:
        assert found is not None, f"nothing noticed: {glue.GLUE_MUTANTS[name][0]}"
    else:
        assert found is None, f"{found[0].config}: {found[1]}"


def test_configurations_replay() -> None:
    for seed in (2, 71, 828):
        one, two = (views.materialise(random_view_config(seed)) for _ in range(2))
        assert str(one.config) == str(two.config)
        assert one.view.layout.tables == two.view.layout.tables
        for x, y in zip((one.q, *one.view[:4]), (two.q, *two.view[:4]), strict=True):
            assert x is None or (x.stride() == y.stride() and bits(x.float()) == bits(y.float()))


def test_the_oracle_reads_pages_as_the_definition_does() -> None:
    """The tables, scales and rows of `views.materialise`, against plain attention in float64 on keys put in order."""
    checked = 0
    for q in asked():
        c = q.config
        if c.visible_nan or c.bias or c.sinks or c.dtype == "f64" or c.real_scale == 0:
            continue
        for i in range(c.n):
            if not c.queries[i] or by_row(c):
                continue
            checked += 1
            view = q.inputs.view
            rows, _, _ = contiguous(q.inputs, i)
            wide = [
                x.double() if s is None else x.double() * s.double()[..., None]
                for x, s in zip(view[:2], view[2:4], strict=True)
            ]
            own = replace(q.inputs, view=view._replace(k=wide[0], v=wide[1], k_scale=None, v_scale=None))
            rows, k, v = (x.double().nan_to_num(0, 0, 0).clamp(-1e5, 1e5) for x in (rows, *contiguous(own, i)[1:]))
            seen = joined(q.inputs)
            want = qkv.attention(
                rows, k, v, mask=seen, positions="end", scale=c.scale, softcap=c.softcap, backend="reference"
            )
            first = sum(c.queries[:i])
            got = q.truth.out[:, :, first : first + c.queries[i]] if c.ragged else q.truth.out[i : i + 1]
            assert np.allclose(want.numpy(), got, rtol=1e-9, atol=1e-9), str(c)
    assert checked >= 10


def test_the_generator_covers_what_it_promises() -> None:
    configs = [random_view_config(seed) for seed in range(500)]
    assert {c.P for c in configs} >= set(views.PAGE_SIZES)
    assert {c.dtype for c in configs} == {"f64", "f32", "bf16", "f16"}
    assert {c.storage for c in configs} == {"plain", "int8", "f8"}
    assert {x for c in configs for x in c.pools} == set(views.POOLS)
    text = " ".join(map(repr, configs))
    for kind in ("causal", "prefix", "sliding_window", "chunked", "strided", "dilated", "global_tokens", "documents",
                 "padding", "per_head", "blocks", "dense", "selected_blocks", "random_blocks", "mask_mod", "segments",
                 "window", "alibi", "relative", "tensor", "score_mod", "t5"):  # fmt: skip
        assert f"('{kind}'" in text, kind
    split = [c for c in configs if max(c.lengths) > 512]
    shared = [c for c in split if any(pages * c.P >= 512 for _, pages in c.share)]
    assert min(len(split), 3 * len(shared)) > 60, (len(split), len(shared))
    assert any(c.latent for c in configs)
    assert any(c.ragged and 0 in c.queries for c in configs)
    released = poisoned = needles = 0
    for c in configs[:60]:
        inputs = views.materialise(c)
        released += -1 in inputs.view.layout.tables
        bad = inputs.view.k_scale if inputs.view.k_scale is not None else inputs.view.k
        poisoned += not bool(bad.isfinite().all())
        truth = inputs.truth()
        with np.errstate(all="ignore"):
            alone = (truth.seen > 3) & (abs(truth.lse) > 6)
        needles += bool(alone.any())
    assert min(released, poisoned, needles) >= 10, (released, poisoned, needles)
