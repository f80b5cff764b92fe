"""The shapes that docstrings name, bound against real calls: sizes differ, so a swapped symbol does not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import qkv
from tests.kit.numpydoc import Docstring, Shapes, parse, shapes_of

B, HQ, HKV, LQ, LK, D, DV = 2, 6, 3, 5, 7, 8, 11


class Example(NamedTuple):
    """A call: what is called, with what, and symbols that only the object it belongs to knows."""

    call: Callable[..., Any]
    given: dict[str, Any]
    known: Mapping[str, int] = MappingProxyType({})
    documented: Any = None  # where the docstring stands, if not at `call`


def qkv_of(lead: int = B) -> dict[str, Tensor]:
    return {"q": torch.randn(lead, HQ, LQ, D), "k": torch.randn(lead, HKV, LK, D), "v": torch.randn(lead, HKV, LK, DV)}


def _attention() -> Example:
    given = {"mask": torch.ones(B, 1, LQ, LK) > 0, "bias": torch.randn(HQ, LQ, LK), "sinks": torch.randn(HQ)}
    return Example(qkv.attention, qkv_of() | given | {"return_lse": True})


def _attention_with_positions() -> Example:
    positions = torch.arange(LQ).expand(B, LQ)
    return Example(qkv.attention, qkv_of() | {"positions": positions, "mask": qkv.causal(), "return_lse": True})


def _weights() -> Example:
    q, k, _ = qkv_of().values()
    return Example(qkv.weights, {"q": q, "k": k, "rows": [0, 1, 2, 3], "heads": [0, 5]}, {"rows": 4, "heads": 2})


def _indexer_tensors() -> dict[str, Tensor]:
    return {"q": torch.randn(B, 4, LQ, D), "k": torch.randn(B, 1, LK, D), "weights": torch.randn(B, LQ, 4)}


def _select_tokens() -> Example:
    return Example(qkv.select_tokens, _indexer_tensors() | {"top_k": 2})


def _index_scores() -> Example:
    keys = torch.zeros(B, 3, 9, dtype=torch.int64)
    return Example(qkv.index_scores, _indexer_tensors() | {"rows": [0, 2, 4], "keys": keys}, {"rows": 3})


def _indexer() -> Example:
    layer = qkv.nn.Indexer(24, 4, 10, 3, q_lora_rank=17, rope_dim=6)
    given = {"x": torch.randn(B, LQ, 24), "q_latent": torch.randn(B, LQ, 17)}
    return Example(layer, given, {"dim": 24, "q_lora_rank": 17, "Hi": 4, "Di": 10, "L": LQ}, layer.forward)


def _merge() -> Example:
    outs, lses = torch.randn(2, B, HQ, LQ, DV), torch.randn(2, B, HQ, LQ)
    return Example(qkv.merge, {"out1": outs[0], "out2": outs[1], "lse1": lses[0], "lse2": lses[1]})


def _alibi() -> Example:
    return Example(qkv.alibi, {"slopes": torch.rand(HQ)}, {"Hq": HQ})


def _relative() -> Example:
    return Example(qkv.relative, {"table": torch.randn(HQ, 9)}, {"Hq": HQ, "R": 4})


def _rotate() -> Example:
    turn = qkv.rotary.Rotary(D)
    return Example(turn.rotate, {"x": torch.randn(B, HQ, LQ, D), "positions": torch.arange(LQ).expand(B, LQ)})


def _layer() -> Example:
    layer = qkv.nn.Attention(24, 4, num_kv_heads=2, context_dim=17)
    known = {"dim": 24, "context_dim": 17}
    return Example(layer, {"x": torch.randn(B, LQ, 24), "context": torch.randn(B, LK, 17)}, known, layer.forward)


def _latent_layer() -> Example:
    sizes = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 9}
    layer = qkv.nn.LatentAttention(24, 4, **sizes)  # type: ignore[arg-type]
    given = {"x": torch.randn(B, LQ, 24), "positions": torch.arange(LQ).expand(B, LQ)}
    return Example(layer, given, {"dim": 24}, layer.forward)


def _multihead() -> Example:
    layer = qkv.nn.MultiheadAttention(24, 4, kdim=17, vdim=19, batch_first=True)
    given = {"query": torch.randn(B, LQ, 24), "key": torch.randn(B, LK, 17), "value": torch.randn(B, LK, 19)}
    given |= {"key_padding_mask": torch.zeros(B, LK) > 0, "attn_mask": torch.zeros(B * 4, LQ, LK) > 0}
    known = {"E": 24, "kdim": 17, "vdim": 19, "H": 4, "N": B, "S'": LK}
    return Example(layer, given | {"average_attn_weights": False}, known, layer.forward)


def _cache() -> tuple[Any, list[Any]]:
    cache = qkv.cache.PagedCache(pages=8, num_kv_heads=HKV, head_dim=D, value_dim=DV, dtype=torch.float32)
    return cache, [cache.add() for _ in range(B)]


def _append() -> Example:
    cache, seqs = _cache()
    given = {"seqs": seqs, "k": torch.randn(B, HKV, LQ, D), "v": torch.randn(B, HKV, LQ, DV)}
    return Example(cache.append, given, {"n": B, "Hkv": HKV, "D": D, "Dv": DV})


def _layer_append() -> Example:
    cache, seqs = _cache()
    layer = cache.step(seqs, T=LQ).layer(0)
    given = {"k": torch.randn(B, HKV, LQ, D), "v": torch.randn(B, HKV, LQ, DV)}
    return Example(layer.append, given, {"n": B, "Hkv": HKV, "T": LQ, "D": D, "Dv": DV})


def _sdpa() -> Example:
    lead = {"query": (2, 1, 4, 5, 8), "key": (1, 3, 4, 7, 8), "value": (2, 3, 4, 7, 11)}
    given = {name: torch.randn(shape) for name, shape in lead.items()}
    return Example(qkv.compat.sdpa, given | {"attn_mask": torch.ones(5, 7) > 0})


EXAMPLES: dict[str, Callable[[], Example]] = {
    "attention": _attention,
    "attention, positions": _attention_with_positions,
    "weights": _weights,
    "select_tokens": _select_tokens,
    "index_scores": _index_scores,
    "Indexer": _indexer,
    "merge": _merge,
    "alibi": _alibi,
    "relative": _relative,
    "rotary": _rotate,
    "Attention": _layer,
    "LatentAttention": _latent_layer,
    "MultiheadAttention": _multihead,
    "append": _append,
    "append of a layer": _layer_append,
    "sdpa": _sdpa,
}
PROMISED = {  # the tensors whose shapes have to be bound, by example
    "attention": 6, "attention, positions": 6, "weights": 3, "select_tokens": 3, "index_scores": 5, "Indexer": 5,
    "merge": 6, "alibi": 1, "relative": 1, "rotary": 3,
    "Attention": 3, "LatentAttention": 3, "MultiheadAttention": 6, "append": 2, "append of a layer": 2, "sdpa": 4,
}  # fmt: skip


def kinds(doc: Docstring, section: str) -> list[tuple[str, str]]:
    """Each name of a section, and what stands behind its colon."""
    return [(name, entry.kind) for entry in doc.entries(section) for name in entry.names]


def bind(example: Example, doc: Docstring) -> tuple[int, list[str]]:
    """How many tensors have shapes in the docstring, and those that do not fit."""
    shapes, bound, faults = Shapes(**example.known), 0, []
    found = example.call(**example.given)
    told = dict(kinds(doc, "Parameters"))
    pairs = [(name, told.get(name, ""), x) for name, x in example.given.items()]
    returned = zip(kinds(doc, "Returns"), found if isinstance(found, tuple) else (found,), strict=False)
    pairs += [(name or "what is returned", kind, x) for (name, kind), x in returned]
    for name, kind, x in pairs:
        if isinstance(x, Tensor) and (alternatives := shapes_of(kind)):
            bound += 1
            faults += [fault] if (fault := shapes.fit(name, alternatives, x.shape)) else []
    return bound, faults


@pytest.mark.parametrize("name", EXAMPLES)
def test_documented_shapes_are_those_of_a_call(name: str) -> None:
    example = EXAMPLES[name]()
    doc = parse(inspect.getdoc(example.documented or example.call) or "")
    bound, faults = bind(example, doc)
    assert not faults, "\n".join(faults)
    assert bound >= PROMISED[name], f"the shapes of {bound} tensors are documented, {PROMISED[name]} should be"


def test_plan_takes_what_attention_takes() -> None:
    """So the shapes are attention's."""
    mine, other = (parse(inspect.getdoc(f) or "") for f in (qkv.plan, qkv.attention))
    assert [name for name, _ in kinds(mine, "Parameters")] == [name for name, _ in kinds(other, "Parameters")]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("Lk, D)", "Lq, D)"), ("Lk, Dv)", "Lk, D)"), ("(B, Hkv, Lk", "(B, Hq, Lk"), ("(Hq,)", "(Hkv,)")],
)
def test_a_wrong_shape_is_seen(right: str, wrong: str) -> None:
    text = inspect.getdoc(qkv.attention) or ""
    assert right in text
    _, faults = bind(_attention(), parse(text.replace(right, wrong, 1)))
    assert faults
