"""The tiled backend: what tiles promise beyond the values that test_oracle checks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import qkv
from qkv.backends.tiled import walk
from qkv.call.problem import dense_strides
from qkv.numerics import softcap_slope
from tests.kit import skips

MASKS: dict[str, Any] = {
    "none": lambda Lk: None,
    "causal": lambda Lk: qkv.causal(),
    "window": lambda Lk: qkv.sliding_window(70),
    "documents": lambda Lk: qkv.documents([Lk // 3, 0, Lk - Lk // 3]) & qkv.causal(),
    "padding": lambda Lk: qkv.padding([Lk // 2, Lk]),
    "heads": lambda Lk: qkv.per_head([qkv.causal(), qkv.chunked(100), qkv.prefix(30), ~qkv.causal()]),
    "mask_mod": lambda Lk: qkv.mask_mod(lambda b, h, p, j: (p - j) % (h + 2) == b),
}


def inputs(Lq: int, Lk: int, B: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    gen = torch.Generator().manual_seed(Lq + Lk)
    return [
        (torch.randn(B, H, L, 16, generator=gen, dtype=torch.float64) * 2).to(dtype).requires_grad_()
        for H, L in ((4, Lq), (2, Lk), (2, Lk))
    ]


def run(tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k, v."""
    out, lse = qkv.attention(*tensors, return_lse=True, **{"backend": "tiled"} | options)
    d_out = torch.cos(torch.arange(out[0].numel()).float()).view(out[0].shape).to(out.dtype).expand_as(out)
    d_lse = torch.where(torch.isfinite(lse), 1.0, 0.0).to(lse.dtype)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], tensors, [d_out, d_lse])]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", [(1, 300), (127, 129), (128, 256), (129, 257), (300, 513), (16, 2049), (17, 600)])
def test_every_edge_of_a_tile(mask: str, sizes: tuple[int, int]) -> None:
    Lq, Lk = sizes
    options = dict(mask=MASKS[mask](Lk), positions="end")
    got, want = (run(inputs(Lq, Lk), backend=backend, **options) for backend in ("tiled", "reference"))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("sizes", [(3, 5), (40, 40), (4, 1)])
def test_the_tile_sizes_do_not_matter(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tiles: many of them are empty, full, or start a row with nothing visible."""
    tensors = inputs(23, 37)
    mask = (qkv.causal() & qkv.sliding_window(9)) | qkv.prefix(2)
    options = dict(
        mask=mask, positions=6, softcap=4.0, bias=qkv.alibi([0.1] * 4) + torch.randn(23, 1), sinks=torch.ones(4)
    )
    torch.manual_seed(0)
    want = run(tensors, backend="reference", dropout_p=0.2, **options)
    monkeypatch.setattr(walk, "tile_sizes", lambda problem: sizes)
    torch.manual_seed(0)
    got = run(tensors, dropout_p=0.2, **options)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=2e-4, rtol=2e-4)


def test_empty_tiles_are_never_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[tuple[int, int, bool]] = []
    scores = walk.Walk.scores

    def counted(self: Any, q: Any, k: Any, tile: Any, key: Any) -> Any:
        visited.append((tile.here[2].start, key.start, key.full))
        return scores(self, q, k, tile, key)

    monkeypatch.setattr(walk.Walk, "scores", counted)
    q, k, v = (x.detach() for x in inputs(1024, 1024, B=1))
    qkv.attention(q, k, v, mask=qkv.causal(), backend="tiled")
    assert len(visited) == 8 * 4 - 12
    assert [v for v in visited if v[2]] == [
        (i, j, True) for i in range(0, 1024, 128) for j in range(0, 1024, 256) if j + 255 <= i
    ]
    visited.clear()
    qkv.attention(q, k, v, mask=qkv.sliding_window(64), backend="tiled")
    assert len(visited) == 11
    visited.clear()
    qkv.attention(q, k, v, mask=qkv.padding([0]), backend="tiled")
    assert not visited


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mask", ["causal", "heads", "padding"])
def test_sameness(mask: str, dtype: torch.dtype) -> None:
    """Bitwise the same for any thread count, batch neighbours and repetition, gradients too."""
    tensors = inputs(150, 300, dtype=dtype)
    options = dict(mask=MASKS[mask](300), positions="end")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(tensors, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    if mask != "padding":
        alone = run([x[1:].detach().requires_grad_() for x in tensors], **options)
        assert all(torch.equal(a[1:], b) for a, b in zip(results[0], alone, strict=True))


def test_no_quadratic_memory() -> None:
    """16,000 tokens of a window, forward and backward: the score matrix alone would be 1 GB."""
    skips.on_linux_only()
    resource = importlib.import_module("resource")
    q, k, v = (torch.randn(1, 1, 16_000, 8, requires_grad=True) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = qkv.attention(q, k, v, mask=qkv.sliding_window(128), backend="tiled")
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def test_long_rows_lose_no_precision() -> None:
    """The error does not grow with the number of keys."""
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16, generator=gen), torch.randn(1, 1, 200_000, 16, generator=gen)
    v = torch.rand(1, 1, 200_000, 4, generator=gen) + 1
    out, lse = qkv.attention(q, k, v, backend="tiled", return_lse=True)
    exact, exact_lse = qkv.attention(q.double(), k.double(), v.double(), backend="reference", return_lse=True)
    assert torch.allclose(out.double(), exact, rtol=2e-6)
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale", [1e3, 1e4, 1e5, 1e6, 2.0**90])
def test_gradients_of_saturated_rows(scale: float, dtype: torch.dtype) -> None:
    """Scores of 3e4 and more: the weights of the backward pass still add up to 1, and delta cancels."""
    tensors = [x.detach()[:, :2] for x in inputs(300, 300, dtype=dtype)]
    d_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(attend: Any, kind: torch.dtype) -> Any:
        leaves = [x.to(kind).requires_grad_() for x in tensors]
        return torch.autograd.grad(attend(*leaves), leaves, d_out.to(kind))

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q @ k.mT) * scale).softmax(-1) @ v

    found = gradients(lambda *x: qkv.attention(*x, scale=scale, backend="tiled"), dtype)
    want = gradients(dense, torch.float64)
    beside = gradients(dense, torch.float32)
    for name, x, y, exact in zip("qkv", found, beside, want, strict=True):
        largest = exact.abs().max().clamp(min=1e-30)
        error, other = (float((t.double() - exact).abs().max() / largest) for t in (x, y))
        assert error <= 1.25 * other + 4 * torch.finfo(dtype).eps, f"d{name} errs by {error:.1e}, dense by {other:.1e}"


def test_magnet_and_needle_at_tile_edges() -> None:
    """A hidden key that would take all the weight must not; the visible needle beside it must."""
    Lk = 600
    for j in (0, 127, 128, 255, 256, 511, 512, Lk - 2):
        k = torch.zeros(1, 1, Lk, 4)
        k[0, 0, j, 0], k[0, 0, j + 1, 0] = 50, 500
        v = torch.arange(Lk).float()[None, None, :, None]
        q = torch.ones(1, 1, 1, 4) * 2
        assert qkv.attention(q, k, v, mask=qkv.causal(), positions=j, backend="tiled").item() == j


def test_softcap_slope() -> None:
    x = torch.linspace(-60, 60, 1001, dtype=torch.float64)
    for c in (0.5, 3.0, 50.0):
        want = 1 / torch.cosh(x / c) ** 2
        assert torch.allclose(softcap_slope(x, c), want, rtol=1e-12, atol=0)
        assert torch.allclose(softcap_slope(x.float(), c).double(), want, rtol=1e-3, atol=1e-38)
    assert softcap_slope(torch.tensor([torch.inf, -torch.inf]), 1.0).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("size", "like", "want"),
    [
        ((2, 3, 4, 5), (60, 20, 5, 1), (60, 20, 5, 1)),
        ((2, 3, 4, 7), (60, 5, 15, 1), (84, 7, 21, 1)),
        ((2, 3, 4, 5), (0, 20, 5, 1), (60, 20, 5, 1)),
        ((2, 3, 4, 5), (0, 0, 0, 0), (60, 20, 5, 1)),
        ((2, 3, 4, 5), (1, 2, 6, 24), (1, 2, 6, 24)),
        ((2, 3, 0, 5), (60, 20, 5, 1), (15, 5, 5, 1)),
    ],
)
def test_dense_strides(size: Any, like: Any, want: Any) -> None:
    assert dense_strides(size, like) == want
