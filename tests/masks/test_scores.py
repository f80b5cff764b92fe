"""Score terms: their values, their gradients, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError, QKVError, ShapeError, UnsupportedError

BACKENDS = ("reference", "tiled")


def inputs(
    B: int = 2, Hq: int = 4, Hkv: int = 2, Lq: int = 6, Lk: int = 9, D: int = 8, seed: int = 0, **options: Any
) -> Any:
    gen = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(B, H, L, D, generator=gen, dtype=torch.float64).to(options.get("dtype", torch.float32)) * 2
        for H, L in ((Hq, Lq), (Hkv, Lk), (Hkv, Lk))
    )


def same_as_tensor(term: Any, dense: torch.Tensor, leaves: list[torch.Tensor], backend: str, **options: Any) -> None:
    """The term acts as the tensor it stands for, and so do its gradients through its own definition."""
    q, k, v = inputs(Lq=dense.shape[2], Lk=dense.shape[3], dtype=dense.dtype)
    d_out = torch.randn(2, 4, dense.shape[2], 8, generator=torch.Generator().manual_seed(8)).to(dense.dtype)
    near = 1e-10 if dense.dtype == torch.float64 else 1e-4
    results = []
    for bias in (term, dense):
        out = qkv.attention(q, k, v, bias=bias, backend=backend, **options)
        results.append((out, *torch.autograd.grad(out, leaves, d_out, retain_graph=True)))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=near, rtol=near)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0, 3, -50])
@pytest.mark.parametrize("sizes", [(6, 9), (150, 300)])
def test_alibi_and_relative(offset: int, sizes: tuple[int, int], backend: str) -> None:
    Lq, Lk = sizes
    distance = torch.arange(Lk) - (torch.arange(Lq)[:, None] + offset)
    slopes = (torch.rand(4, dtype=torch.float64) / 10).requires_grad_()
    dense = -slopes[:, None, None] * distance.abs()
    same_as_tensor(qkv.alibi(slopes), dense.expand(1, 4, Lq, Lk), [slopes], backend, positions=offset)
    table = torch.randn(4, 7, dtype=torch.float64).requires_grad_()
    dense = table[:, distance.clamp(-3, 3) + 3][None]
    same_as_tensor(qkv.relative(table), dense, [table], backend, positions=offset)
    both = (table[:, distance.clamp(-3, 3) + 3] - slopes[:, None, None] * distance.abs())[None]
    same_as_tensor(qkv.relative(table) + qkv.alibi(slopes), both, [table, slopes], backend, positions=offset)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "positions", [[5, -2], torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])], ids=["rows", "tensor"]
)
def test_positions_of_each_batch_row(positions: Any, backend: str) -> None:
    p = positions if isinstance(positions, torch.Tensor) else torch.tensor(positions)[:, None] + torch.arange(6)
    distance = torch.arange(9) - p[:, :, None]
    table, slopes = torch.randn(4, 5).requires_grad_(), torch.rand(4).requires_grad_()
    dense = (table[:, distance.clamp(-2, 2) + 2] - slopes[:, None, None, None] * distance.abs()).transpose(0, 1)
    same_as_tensor(qkv.relative(table) + qkv.alibi(slopes), dense, [table, slopes], backend, positions=positions)


def t5_bucket(n: int, buckets: int, far: int, both: bool) -> int:
    """T5's rule for one relative position, in plain Python."""
    start = 0
    if both:
        buckets //= 2
        start = buckets if n > 0 else 0
        n = abs(n)
    else:
        n = max(-n, 0)
    exact = buckets // 2
    if n < exact:
        return start + n
    return start + min(buckets - 1, exact + int(math.log(n / exact) / math.log(far / exact) * (buckets - exact) + 1e-9))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_t5_buckets(backend: str, both: bool) -> None:
    table = torch.randn(4, 8).requires_grad_()
    term = qkv.relative(table, buckets="t5", max_distance=20, bidirectional=both)
    index = torch.tensor([[t5_bucket(j - i, 8, 20, both) for j in range(60)] for i in range(50)])
    same_as_tensor(term, table[:, index][None], [table], backend, positions=0)


def test_t5_defaults_are_those_of_t5() -> None:
    table = torch.arange(32.0)[None]
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 300, 2)
    p = qkv.weights(q, k, bias=qkv.relative(table / 100, buckets="t5"), positions=100)
    got = ((p / p[..., :1]).log() * 100).round()[0, 0, 0] + t5_bucket(-100, 32, 128, True)
    assert got.int().tolist() == [t5_bucket(j - 100, 32, 128, True) for j in range(300)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (9,), (6, 1), (4, 1, 1), (2, 1, 6, 9), (2, 4, 6, 9), (1, 4, 1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_tensor_gradients_have_their_own_shape(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    q, k, v = inputs(dtype=dtype)
    for kind in {dtype, torch.float32}:
        bias = torch.randn(shape).to(kind).requires_grad_()
        out = qkv.attention(q, k, v, bias=bias, backend=backend)
        (grad,) = torch.autograd.grad(out, bias, torch.randn_like(out))
        assert grad.shape == bias.shape
        assert grad.dtype == kind
        if bias.numel() > 1 and shape[-1] != 1:
            assert grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_apply_from_left_to_right(backend: str) -> None:
    q, k, v = inputs(Lq=9)
    double = qkv.score_mod(lambda s, b, h, p, j: 2 * s)
    row = torch.randn(9)
    scores = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) / math.sqrt(8)

    def softmax(s: torch.Tensor) -> torch.Tensor:
        return torch.softmax(s, -1) @ v.repeat_interleave(2, 1)

    for bias, want in (
        (double + row, 2 * scores + row),
        (row + double, 2 * (scores + row)),
        (
            qkv.score_mod(lambda s, b, h, p, j: s + h * (p - j)),
            scores + torch.arange(4)[:, None, None] * (torch.arange(9)[:, None] - torch.arange(9)),
        ),
    ):
        assert torch.allclose(qkv.attention(q, k, v, bias=bias, backend=backend), softmax(want), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_comes_before_bias_and_mask(backend: str) -> None:
    q, k, v = inputs(Lq=9)
    s = 2 * torch.tanh(
        torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) / math.sqrt(8) / 2
    ) + 30 * torch.eye(9)
    s = s.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    want = torch.softmax(s, -1) @ v.repeat_interleave(2, 1)
    got = qkv.attention(q, k, v, bias=30 * torch.eye(9), softcap=2.0, mask=qkv.causal(), backend=backend)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_mod_sees_global_indices_in_every_tile(backend: str) -> None:
    q, k, v = inputs(Lq=150, Lk=300)
    picks = qkv.score_mod(lambda s, b, h, p, j: torch.where(j == (7 * p + 3 * h + b) % 300, 1e4, 0.0) + 0 * s)
    v = torch.arange(300.0)[None, None, :, None].expand(2, 2, 300, 1)
    out = qkv.attention(q, k, v, bias=picks, positions=11, backend=backend)[..., 0]
    b, h, p = torch.arange(2)[:, None, None], torch.arange(4)[:, None], torch.arange(150) + 11
    assert torch.equal(out, ((7 * p + 3 * h + b) % 300).float())


def test_score_mod_gradients_agree_with_autograd() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(Lq=130, Lk=270))
    fn = qkv.score_mod(lambda s, b, h, p, j: torch.where(j % 3 == 0, s.sin() * 3, s * s.sigmoid()))
    grads = []
    for backend in BACKENDS:
        out = qkv.attention(
            q, k, v, bias=fn, softcap=5.0, mask=qkv.causal() | qkv.prefix(2), positions=4, backend=backend
        )
        grads.append(torch.autograd.grad(out, (q, k, v), torch.cos(torch.arange(out.numel()).float()).view(out.shape)))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_score_mod_does_not_drop_the_gradient_of_what_it_captures() -> None:
    q, k, v = inputs(Lq=9)
    strength = torch.ones((), requires_grad=True)
    bias = qkv.score_mod(lambda s, b, h, p, j: s * strength)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        qkv.attention(q, k, v, bias=bias, backend="tiled")
    with torch.no_grad():
        qkv.attention(q, k, v, bias=bias, backend="tiled")
    qkv.attention(q, k, v, bias=bias, backend="reference").square().sum().backward()
    assert strength.grad.abs() > 0


def test_a_hidden_score_may_be_anything() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(Lq=9))
    bad = qkv.score_mod(lambda s, b, h, p, j: torch.where(j > p, torch.log(-s * s), s))  # nan, with nan derivatives
    for backend in BACKENDS:
        results = []
        for bias in (None, bad):
            out = qkv.attention(q, k, v, bias=bias, mask=qkv.causal(), backend=backend)
            results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_a_term_is_used_in_the_dtype_of_the_scores() -> None:
    q, k, v = inputs(Lq=9, dtype=torch.float64)
    exact = qkv.attention(q, k, v, bias=qkv.alibi([0.1, 0.2, 0.3, 1 / 3]))
    doubles = qkv.attention(q, k, v, bias=qkv.alibi(torch.tensor([0.1, 0.2, 0.3, 1 / 3], dtype=torch.float64)))
    assert torch.equal(exact, doubles)


@pytest.mark.parametrize(
    ("kind", "text", "make"),
    [
        (ArgumentTypeError, "slopes", lambda: qkv.alibi(1.0)),
        (ArgumentTypeError, "slopes", lambda: qkv.alibi("ab")),
        (ArgumentTypeError, "slopes", lambda: qkv.alibi([True])),
        (ArgumentTypeError, "slopes", lambda: qkv.alibi(torch.tensor([1, 2]))),
        (ShapeError, r"\(Hq,\)", lambda: qkv.alibi(torch.zeros(2, 2))),
        (ArgumentError, "finite", lambda: qkv.alibi([1.0, math.nan])),
        (ArgumentTypeError, "table", lambda: qkv.relative([1.0])),
        (ArgumentTypeError, "table", lambda: qkv.relative(torch.zeros(2, 3).long())),
        (ShapeError, "shape", lambda: qkv.relative(torch.zeros(3))),
        (ShapeError, "odd", lambda: qkv.relative(torch.zeros(2, 4))),
        (ArgumentError, "t5", lambda: qkv.relative(torch.zeros(2, 4), buckets="log")),
        (ArgumentError, "t5", lambda: qkv.relative(torch.zeros(2, 3), max_distance=64)),
        (ArgumentError, "t5", lambda: qkv.relative(torch.zeros(2, 3), bidirectional=False)),
        (ArgumentError, "buckets", lambda: qkv.relative(torch.zeros(2, 32), buckets="t5", max_distance=8)),
        (ArgumentError, "buckets", lambda: qkv.relative(torch.zeros(2, 2), buckets="t5")),
        (ArgumentTypeError, "int", lambda: qkv.relative(torch.zeros(2, 32), buckets="t5", max_distance=8.5)),
        (ArgumentTypeError, "bool", lambda: qkv.relative(torch.zeros(2, 32), buckets="t5", bidirectional=1)),
        (ArgumentTypeError, "callable", lambda: qkv.score_mod(3)),
        (ArgumentTypeError, "score term", lambda: qkv.alibi([1.0]) + 3),
        (ArgumentTypeError, "score term", lambda: 3 + qkv.alibi([1.0])),
    ],
)
def test_errors(kind: type[QKVError], text: str, make: Any) -> None:
    with pytest.raises(kind, match=text) as error:
        make()
    assert type(error.value) is kind


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_fn_returns_is_checked(backend: str) -> None:
    q, k, v = inputs(Lq=9)
    for fn, kind in (
        (lambda s, b, h, p, j: None, ArgumentTypeError),
        (lambda s, b, h, p, j: j > p, ArgumentTypeError),
        (lambda s, b, h, p, j: s[..., :2].repeat(1, 1, 1, 2), ShapeError),
    ):
        with pytest.raises(kind, match="score_mod"):
            qkv.attention(q, k, v, bias=qkv.score_mod(fn), backend=backend)


def test_sums_of_terms_and_tensors() -> None:
    q, k, v = inputs(Lq=9)
    row = torch.randn(9)
    term = qkv.alibi([0.1] * 4)
    assert torch.equal(qkv.attention(q, k, v, bias=term + row), qkv.attention(q, k, v, bias=row + term))
    assert repr(term + row) == "alibi + tensor (9,)"
    assert torch.equal(qkv.attention(q, k, v, bias=term), qkv.attention(q, k, v, bias=term + torch.zeros(())))
