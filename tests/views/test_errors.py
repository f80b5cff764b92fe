"""Calls on a view that have no meaning: typed errors, fresh or after a good call of the same kind; and no crash.

An entry of a table is a name: (what is changed, the class, words that the message must contain).
"""

from __future__ import annotations

import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qkv
from qkv import ArgumentError, ArgumentTypeError, QKVError, ShapeError, UnsupportedError
from qkv.call.keys import Clock, KVLayout, KVView
from tests.kit import private

pytestmark = pytest.mark.usefixtures("one_thread")
S, A, T, U = ShapeError, ArgumentError, ArgumentTypeError, UnsupportedError
N, HKV, P, D = 6, 2, 4, 8


def layout(
    lengths: Any = (9, 5), tables: Any = (3, 0, 5, 1, 2), starts: Any = (0, 3, 5), queries: Any = None
) -> KVLayout:
    asked = None if queries is None else array("q", queries)
    return KVLayout(array("i", tables), array("q", starts), array("q", lengths), asked, Clock())


def view(own: KVLayout | None = None, dtype: torch.dtype = torch.float32, **other: Any) -> KVView:
    torch.manual_seed(4)
    k, v = torch.randn(2, N, HKV, P, D).to(dtype)
    return KVView(k, v, None, None, dtype, own or layout(), None)._replace(**other)


def stale() -> KVView:
    found = view()
    found.layout.clock.now += 1
    return found


def few() -> KVView:
    found = view()
    found.layout.most = 1
    return found


def q(*shape: int, **other: Any) -> torch.Tensor:
    return torch.ones(*(shape or (2, 4, 2, D)), **other)


def ragged(queries: Any = (2, 1)) -> KVView:
    return view(layout(queries=queries))


SCALED = {"k_scale": torch.ones(N, HKV, P), "v_scale": torch.ones(N, HKV, P)}
INT8 = {"k": torch.ones(N, HKV, P, D, dtype=torch.int8), "v": torch.ones(N, HKV, P, D, dtype=torch.int8)}
CALLS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "v is given": ({"v": q()}, A, ("keys and values", "without v")),
    "positions": ({"positions": "end"}, A, ("positions", "Leave positions out")),
    "positions as a number": ({"positions": 0}, A, ("positions=0",)),
    "a stale view": ({"k": stale}, A, ("lives until", "new view")),
    "q is None": ({"q": None}, T, ("q=None",)),
    "q is a list": ({"q": [1.0]}, T, ("list",)),
    "q is sparse": ({"q": q().to_sparse()}, T, ("plain tensor",)),
    "q is 3-D": ({"q": q(2, 4, D)}, S, ("(2, 4, 8)", "(sequences, Hq, T, D)")),
    "q is 5-D": ({"q": q(1, 2, 4, 2, D)}, S, ("(1, 2, 4, 2, 8)",)),
    "one sequence too many": ({"q": q(3, 4, 2, D)}, S, ("2 sequences", "(3, 4, 2, 8)")),
    "packed q, view of rows": ({"q": q(1, 4, 3, D)}, S, ("lengths=[...]",)),
    "rows of q, ragged view": ({"k": ragged}, S, ("(1, Hq, all queries, D)",)),
    "ragged sum too large": ({"q": q(1, 4, 2, D), "k": ragged}, S, ("[2, 1]", "sum to 3")),
    "ragged sum too small": ({"q": q(1, 4, 4, D), "k": ragged}, S, ("[2, 1]", "sum to 3")),
    "heads": ({"q": q(2, 3, 2, D)}, S, ("2 heads", "(2, 3, 2, 8)")),
    "head size": ({"q": q(2, 4, 2, D + 1)}, S, ("head size", "8 numbers")),
    "dtype": ({"q": q(dtype=torch.bfloat16)}, T, ("bfloat16", "float32", "dtype of its cache")),
    "integers": ({"q": torch.ones(2, 4, 2, D, dtype=torch.int64)}, T, ("int64",)),
    "device": ({"q": q(device="meta")}, T, ("meta", "cpu")),
    "more queries than keys": ({"q": q(2, 4, 6, D)}, S, ("6 queries", "length 5")),
    "more queries than keys, ragged": ({"q": q(1, 4, 6, D), "k": lambda: ragged((0, 6))}, S, ("6 queries",)),
    "more queries than were kept for": ({"k": few}, S, ("2 queries",)),
    "negative queries": ({"q": q(1, 4, 1, D), "k": lambda: ragged((-2, 3))}, A, ("queries",)),
    "dropout": ({"dropout_p": 0.1}, U, ("dropout_p=0.1", "inference")),
    "q learns": ({"q": q(requires_grad=True)}, U, ("gradients", "no_grad")),
    "sinks learn": ({"sinks": torch.zeros(4, requires_grad=True)}, U, ("gradients",)),
    "a bias learns": ({"bias": torch.zeros(4, 1, 1, requires_grad=True)}, U, ("gradients",)),
    "a table learns": ({"bias": qkv.relative(torch.zeros(4, 5, requires_grad=True))}, U, ("gradients",)),
    "unknown backend": ({"backend": "gpu"}, A, ("backend", "cpu:avx2")),
    "backend is a number": ({"backend": 3}, T, ("backend=3",)),
    "mask of another kind": ({"mask": "causal"}, T, ("mask",)),
    "mask of floats": ({"mask": torch.zeros(2, 9)}, T, ("bool",)),
    "mask of one length": ({"mask": torch.ones(2, 9, dtype=torch.bool)}, S, ("(2, 9)",)),
    "mask of other rows": ({"mask": torch.ones(3, 1, 1, 1, dtype=torch.bool)}, S, ("(3, 1, 1, 1)",)),
    "heads of a mask": ({"mask": qkv.per_head([qkv.causal()] * 3)}, S, ("3 masks", "Hq=4")),
    "rows of a prefix": ({"mask": qkv.prefix([1, 2, 3])}, S, ("3",)),
    "documents of another sum": ({"mask": qkv.documents([4, 4])}, S, ("documents", "sum")),
    "bias of one length": ({"bias": torch.zeros(2, 4, 2, 9)}, S, ("bias",)),
    "bias of other rows": ({"bias": torch.zeros(3, 4, 1, 1)}, S, ("bias",)),
    "bias of a dtype": ({"bias": torch.zeros(2, 4, 1, 1, dtype=torch.float16)}, T, ("bias",)),
    "slopes of heads": ({"bias": qkv.alibi(torch.ones(3))}, S, ("3",)),
    "sinks": ({"sinks": torch.zeros(2)}, S, ("(Hq,)",)),
    "sinks are numbers": ({"sinks": 1.0}, T, ("sinks",)),
    "scale": ({"scale": float("nan")}, A, ("scale",)),
    "softcap": ({"softcap": -1.0}, A, ("softcap",)),
    "return_lse": ({"return_lse": 1}, T, ("return_lse",)),
    "a page too large": ({"k": lambda: view(layout(tables=(3, 0, 6, 1, 2)))}, A, ("page 6", "6 pages")),
    "a page below -1": ({"k": lambda: view(layout(tables=(3, -2, 5, 1, 2)))}, A, ("page table",)),
    "a table too short": ({"k": lambda: view(layout(starts=(0, 2, 5)))}, A, ("page table",)),
    "tables end early": ({"k": lambda: view(layout(tables=(3, 0, 5)))}, A, ("page table",)),
    "starts go back": ({"k": lambda: view(layout(starts=(3, 0, 5)))}, A, ("page table",)),
    "a negative start": ({"k": lambda: view(layout(starts=(-1, 3, 5)))}, A, ("page table",)),
    "starts are missing": ({"k": lambda: view(layout(starts=(0, 3)))}, S, ("2 lengths", "2 starts")),
    "a negative length": ({"k": lambda: view(layout(lengths=(9, -5)))}, QKVError, ("-5",)),
    "a huge length": ({"k": lambda: view(layout(lengths=(2**63 - 1, 5)))}, A, ("page table",)),
    "queries are missing": ({"q": q(1, 4, 3, D), "k": lambda: view(layout(queries=(3,)))}, QKVError, ()),
    "strides of scales": (
        {"k": lambda: view(**INT8, k_scale=SCALED["k_scale"], v_scale=torch.ones(N, P, HKV).transpose(1, 2))},
        A,
        ("strides",),
    ),
}  # fmt: skip
BASE: dict[str, Any] = {"mask": qkv.causal()}


def arguments(changed: dict[str, Any]) -> dict[str, Any]:
    given = {"q": q(), "k": view, **BASE, **changed}
    for name in ("k",):
        given[name] = given[name]() if isinstance(given[name], Callable) else given[name]  # type: ignore[arg-type]
    return given


@pytest.mark.parametrize("function", [qkv.attention, qkv.plan])
@pytest.mark.parametrize("name", CALLS)
def test_calls_without_meaning_raise(name: str, function: Callable[..., Any]) -> None:
    changed, kind, words = CALLS[name]
    for prepared in (False, True):
        private.forget()
        if prepared:  # what good calls leave behind must not let a bad one through
            qkv.attention(q(), view(), **BASE)
            qkv.attention(q(1, 4, 3, D), ragged(), **BASE)
            qkv.attention(q(1, 4, 6, D), ragged((2, 4)), **BASE)
            qkv.attention(q(1, 4, 4, D), ragged((2, 2)), **BASE)
            qkv.attention(q(2, 4, 5, D), view(), **BASE)
        with pytest.raises(kind) as caught:
            function(**arguments(changed))
        assert isinstance(caught.value, QKVError)
        text = str(caught.value)
        assert not [word for word in words if word not in text], text
        assert re.match(rf"qkv\.{function.__name__}\(\): .+\. Got .+\. .+\.", text, re.DOTALL), text


def test_the_base_of_the_table_is_right() -> None:
    out = qkv.attention(**arguments({}))
    assert out.shape == (2, 4, 2, D)
    assert out.isfinite().all()


def test_what_needs_no_gradient_may_require_one_where_none_is_recorded() -> None:
    given = arguments({"q": q(requires_grad=True)})
    with torch.no_grad():
        assert not qkv.attention(**given).requires_grad
    with torch.inference_mode():
        assert qkv.attention(**given).is_inference()


def test_a_view_goes_stale_between_calls_of_a_kind() -> None:
    """The second call takes the short way, and still looks at the clock."""
    own, given = view(), {"q": q(), **BASE}
    first = qkv.attention(k=own, **given)
    assert torch.equal(first, qkv.attention(k=own, **given))
    own.layout.clock.now += 1
    for _ in range(2):
        with pytest.raises(ArgumentError, match="lives until"):
            qkv.attention(k=own, **given)
    assert torch.equal(first, qkv.attention(k=view(), **given))


def test_entries_past_the_used_part_are_not_looked_at() -> None:
    junk = layout(tables=(3, 0, 5, 99, -9, 1, 2, 2**31 - 1), starts=(0, 5, 8))
    assert torch.equal(qkv.attention(q(), view(junk), **BASE), qkv.attention(q(), view(), **BASE))


class TestWeights:
    def test_one_sequence(self) -> None:
        one = layout((9,), (3, 0, 5), (0, 3))
        asked = torch.randn(1, 4, 2, D)
        own = view(one)
        k = torch.stack([own.k[one.tables[j // P], :, j % P] for j in range(9)], 1)[None]
        found = qkv.weights(asked, own, mask=qkv.causal())
        want = qkv.weights(asked, k, mask=qkv.causal(), positions="end")
        assert torch.equal(found, want)
        v = torch.stack([own.v[one.tables[j // P], :, j % P] for j in range(9)], 1)[None]
        out = found.double() @ v.double().repeat_interleave(2, 1)
        assert torch.allclose(out.float(), qkv.attention(asked, own, mask=qkv.causal()), atol=1e-6)

    def test_equal_lengths_and_rows(self) -> None:
        own = view(layout((8, 8), (3, 0, 1, 2), (0, 2, 4)), held=qkv.window(4, None))
        found = qkv.weights(torch.randn(2, 4, 3, D), own, rows=[1], mask=qkv.causal())
        assert found.shape == (2, 4, 1, 8)
        hidden = torch.tensor([j < 6 - 4 or j > 6 for j in range(8)])  # row 1 stands on 6
        assert (found[..., hidden] == 0).all()
        assert (found[..., ~hidden] > 0).all()

    @pytest.mark.parametrize(
        ("changed", "kind", "word"),
        [
            ({}, A, "one sequence"),
            ({"k": lambda: view(layout((8, 8), (3, 0, 1, 2), (0, 2, 4), (1, 1))), "q": q(1, 4, 2, D)}, A, "one seq"),
            ({"k": stale}, A, "lives until"),
            ({"positions": "end"}, A, "positions"),
            ({"q": q(1, 4, 2, D)}, S, "2 sequences"),
            ({"q": q(dtype=torch.float64)}, T, "dtype"),
        ],
    )
    def test_wrong(self, changed: dict[str, Any], kind: type[Exception], word: str) -> None:
        with pytest.raises(kind, match=word) as caught:
            qkv.weights(**arguments(changed))
        assert str(caught.value).startswith("qkv.weights()")


_FUZZ = """
import random, sys, torch, qkv
from array import array
from qkv import QKVError
from qkv.call.keys import Clock, KVLayout, KVView
torch.set_num_threads(1)
random.seed(int(sys.argv[1])); torch.manual_seed(0)
FAR = (2**31 - 1, 2**62, 2**63 - 1, -(2**63), 2**40)
masks = (None, qkv.causal(), qkv.sliding_window(3), torch.ones(1, 1, dtype=torch.bool), qkv.prefix(2))
right = wrong = 0
for trial in range(int(sys.argv[2])):
    N, P, n, T = random.randint(1, 6), random.choice((1, 3, 16)), random.randint(1, 3), random.randint(0, 3)
    k, v = torch.randn(2, N, 1, P, 4)
    lengths = [random.randint(T, 3 * P + T) for _ in range(n)]
    need = [-(-x // P) for x in lengths]
    tables = [random.randrange(N) for _ in range(sum(need))]
    starts = [sum(need[:i]) for i in range(n + 1)]
    queries = None if random.random() < 0.5 else [random.randint(0, x) for x in lengths]
    rows = T if queries is None else sum(queries)
    truth = [list(x) if x is not None else None for x in (tables, starts, lengths, queries)]
    lists = [x for x in (tables, starts, lengths, queries) if x]
    for _ in range(random.choice((0, 1, 1, 2))):  # spoil
        x = random.choice([x for x in lists if x])
        at = random.randrange(len(x))
        far = FAR[:1] if x is tables else FAR
        x[at] = random.choice((x[at] + 1, x[at] - 1, -1, -2, -99, N, 10**6, *far))
        if random.random() < 0.1:
            x.pop()
    same = truth == [tables, starts, lengths, queries]
    q = torch.randn(n if queries is None else 1, 2, rows, 4)
    def look(t, s, l, asked):
        asked = None if asked is None else array("q", asked)
        own = KVLayout(array("i", t), array("q", s), array("q", l), asked, Clock())
        return KVView(k, v, None, None, torch.float32, own, None)
    mask = random.choice(masks)
    want = qkv.attention(q, look(*truth), mask=mask)  # prepares calls of this kind
    try:
        out = qkv.attention(q, look(tables, starts, lengths, queries), mask=mask, backend=None)
        plain = qkv.attention(q, look(tables, starts, lengths, queries), mask=mask, backend="reference")
        assert torch.allclose(out, plain, atol=1e-5), trial
        assert not same or torch.equal(out, want), trial
        right += 1
    except (QKVError, ValueError):
        assert not same, trial
        wrong += 1
print("survived", right, wrong)
"""


def test_layouts_of_wrong_numbers_never_crash() -> None:
    """Random layouts with spoilt numbers, in a process of their own: a typed error, or what the definition says."""
    command = [sys.executable, "-c", _FUZZ, "6", "500"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    assert "survived" in ran.stdout, f"exit code {ran.returncode}\n{ran.stderr[-2000:]}"
    right, wrong = map(int, ran.stdout.split()[1:])
    assert min(right, wrong) > 60, ran.stdout
