"""A call in parts: pieces of its queries on pieces of its keys, each with the mask's portion, merged, are the call."""

from __future__ import annotations

import random
from functools import reduce
from itertools import pairwise
from typing import Any

import pytest
import torch

import qkv
from qkv.masks import portion
from tests.kit.backends import promising
from tests.kit.mask_specs import KINDS, Sizes, expression, seeds, truth


def borders(rng: random.Random, n: int) -> list[tuple[int, int]]:
    at = sorted({0, n, rng.randint(0, n), rng.randint(0, n)})
    return list(pairwise(at))


@pytest.mark.parametrize("backend", promising())
@seeds(25)
def test_a_call_in_parts_is_the_call(backend: str, seed: int) -> None:
    """Hidden keys hold NaN; alibi tells where a key or a query is taken for another."""
    rng, gen = random.Random(f"call in parts {seed}"), torch.Generator().manual_seed(seed)
    s = Sizes(rng.choice([1, 2]), rng.choice([2, 4]), rng.choice([3, 20, 130]), rng.choice([17, 90, 200]))
    spec = expression(rng, s, rng.randint(0, 2), KINDS)
    if backend.startswith("cpu") and not spec.lowers:
        return
    first = rng.choice([0, s.Lk - s.Lq, -5])
    seen = truth(spec, s, [[first + i for i in range(s.Lq)]] * s.B)
    q, k, v = (torch.randn(s.B, H, L, 8, generator=gen) * 2 for H, L in ((s.Hq, s.Lq), (2, s.Lk), (2, s.Lk)))
    hidden = ~seen.view(s.B, 2, s.Hq // 2, s.Lq, s.Lk).any(3).any(2)
    clean = [x.double().masked_fill(hidden[..., None], 0) for x in (k, v)]
    k[hidden], v[hidden] = torch.nan, torch.nan
    slopes = torch.tensor([0.1 * (h + 1) for h in range(s.Hq)])
    bias = -slopes.double()[:, None, None] * (first + torch.arange(s.Lq)[:, None] - torch.arange(s.Lk)).abs()
    scores = q.double() @ clean[0].repeat_interleave(s.Hq // 2, 1).mT * 8**-0.5 + bias
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    want = weights @ clean[1].repeat_interleave(s.Hq // 2, 1)
    for a, b in borders(rng, s.Lq):
        parts = []
        for lo, hi in borders(rng, s.Lk):
            mask = portion(spec.mask, first_key=lo, first_query=a, Lq=s.Lq, Lk=s.Lk)
            place: dict[str, Any] = dict(mask=mask, positions=first + a - lo, bias=qkv.alibi(slopes.tolist()))
            pieces = q[:, :, a:b], k[:, :, lo:hi], v[:, :, lo:hi]
            parts.append(qkv.attention(*pieces, return_lse=True, backend=backend, **place))
        out, _ = reduce(lambda one, two: qkv.merge(*one, *two), parts)
        assert torch.allclose(out.double(), want[:, :, a:b], atol=3e-5, rtol=3e-5), f"{spec.text} {s} {first} {a, b}"
