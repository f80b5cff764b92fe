"""torch.compile without graph breaks or recompiles, and torch.export into another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import qkv

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")
SEED = 40
LENGTHS = range(5, 25)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def normal(*shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(SEED + sum(n * 31**i for i, n in enumerate(shape)))
    return torch.randn(*shape, generator=gen) * 2


def tensors(L: int) -> list[Tensor]:
    """q, k and v of L tokens: 2 batch rows, 4 query heads, 2 key/value heads."""
    return [normal(2, 4, L, 8), normal(2, 2, L, 8), normal(2, 2, L, 6)]


def one_graph(fn: Callable[..., Any], calls: list[list[Any]], *, backend: str = "aot_eager") -> None:
    """fn compiles as one graph, once for all calls, and gives the bits of the plain call."""
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    for number, given in enumerate(calls):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = compiled(*given)
        want = fn(*given)
        for x, y in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
            assert torch.equal(x, y), f"call {number}, seed {SEED}"
            assert x.stride() == y.stride()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


CAUSAL = qkv.causal()
RULES = {
    "none": lambda L: None,
    "causal": lambda L: CAUSAL,
    "other windows": lambda L: qkv.sliding_window(L - 2),
    "streaming": lambda L: CAUSAL & (qkv.prefix(L % 4 + 1) | qkv.sliding_window(3)),
    "other padding": lambda L: qkv.padding([L, L - 3]) & CAUSAL,
    "other documents": lambda L: qkv.documents([2, L - 2]) & CAUSAL,
    "other segments": lambda L: qkv.documents(segment_ids=torch.arange(L) // 3) | qkv.prefix([1, 2]),
    "not": lambda L: ~qkv.chunked(3) | qkv.strided(2, 1),
    "blocks": lambda L: qkv.blocks(torch.eye(-(-L // 2)).bool(), 2),
    "bigbird": lambda L: qkv.bigbird(4, seed=L),
    "dense": lambda L: qkv.dense(normal(L, L) > 0),
    "selected blocks": lambda L: qkv.selected_blocks(torch.arange(L)[None, None, :, None] // 2, 2),
    "a tensor": lambda L: normal(L, L) > 0,
    "heads": lambda L: qkv.per_head([CAUSAL, qkv.prefix(2), qkv.global_tokens([0, L - 1]), qkv.dilated(2, 2)]),
}


@pytest.mark.parametrize("rule", RULES)
def test_one_graph_for_every_length_and_mask_of_a_kind(rule: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        return qkv.attention(q, k, v, mask=mask, return_lse=True)

    one_graph(call, [[*tensors(L), RULES[rule](L)] for L in LENGTHS])


OPTIONS: dict[str, tuple[Callable[..., Any], Callable[[int], list[Any]]]] = {
    "numbers": (lambda q, k, v: qkv.attention(q, k, v, scale=0.3, softcap=5.0), lambda L: []),
    "terms": (
        lambda q, k, v, s, t: qkv.attention(q, k, v, bias=qkv.alibi(s) + qkv.relative(t), sinks=s),
        lambda L: [normal(4), normal(4, 7)],
    ),
    "bias": (lambda q, k, v, b: qkv.attention(q, k, v, bias=b), lambda L: [normal(4, 1, L)]),
    "t5": (lambda q, k, v, t: qkv.attention(q, k, v, bias=qkv.relative(t, buckets="t5")), lambda L: [normal(4, 32)]),
    "the last queries": (
        lambda q, k, v: qkv.attention(q[:, :, -3:], k, v, mask=CAUSAL, positions="end"), lambda L: [],
    ),
    "decode": (lambda q, k, v, p: qkv.attention(q[:, :, :1], k, v, mask=CAUSAL, positions=p), lambda L: [L - 1]),
    "starts": (
        lambda q, k, v, p: qkv.attention(q[:, :, :2], k, v, mask=CAUSAL, positions=p),
        lambda L: [torch.tensor([L - 4, L - 2])],
    ),
    "positions": (
        lambda q, k, v, p: qkv.attention(q, k, v, mask=CAUSAL, positions=p), lambda L: [torch.arange(L).flip(0)[None]],
    ),
    "heads last": (
        lambda q, k, v: qkv.attention(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))),
        lambda L: [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_one_graph_for_every_option(option: str) -> None:
    fn, more = OPTIONS[option]
    one_graph(fn, [[*tensors(L), *more(L)] for L in LENGTHS])


MADE_INSIDE: dict[str, tuple[Callable[..., Any], Callable[[int], list[Any]]]] = {
    "rules": (lambda: qkv.causal() & (qkv.prefix(2) | qkv.sliding_window(3)), lambda L: []),
    "lengths": (lambda n: qkv.padding(n) & qkv.causal(), lambda L: [torch.tensor([L, L - 3])]),
    "documents": (lambda n: qkv.documents(n) & qkv.causal(), lambda L: [torch.tensor([2, L - 2])]),
    "segments": (lambda ids: qkv.documents(segment_ids=ids), lambda L: [torch.arange(L) // 3]),
    "a list": (lambda: qkv.padding([2, 5]), lambda L: []),
    "mask and tensor": (lambda t: (qkv.causal() & t) | t.T, lambda L: [normal(L, L) > 0]),
    "tensor and mask": (lambda t: t & qkv.causal(), lambda L: [normal(L, L) > 0]),
}


@pytest.mark.parametrize("made", MADE_INSIDE)
def test_masks_made_inside(made: str) -> None:
    make, more = MADE_INSIDE[made]
    one_graph(lambda q, k, v, *given: qkv.attention(q, k, v, make(*given)), [[*tensors(L), *more(L)] for L in LENGTHS])


def test_terms_and_tensors_add_inside() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bias: Tensor) -> Any:
        return qkv.attention(q, k, v, bias=bias + qkv.alibi(slopes))

    one_graph(call, [[*tensors(L), normal(4), normal(L, L)] for L in LENGTHS])


class Layer(nn.Module):
    """A mask as an attribute, projections around it, and something for a compiler to fuse."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.project, self.mask = nn.Linear(16, 48), mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return qkv.attention(q, k, v, mask=self.mask).transpose(1, 2).flatten(2).sigmoid() * x


MASK = qkv.sliding_window(4) | qkv.prefix([2, 3])


def trained(model: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *parameters], normal(*out.shape))]


def test_training_compiles_once() -> None:
    layer = Layer(MASK)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for L in LENGTHS:
        x = normal(2, L, 16)
        with torch._dynamo.config.patch(error_on_recompile=LENGTHS[0] != L):
            got = trained(compiled, x, list(layer.parameters()))
        for a, b in zip(got, trained(layer, x, list(layer.parameters())), strict=True):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)  # the projections' own sums may be ordered otherwise
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_inductor() -> None:
    layer = Layer(MASK)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for L in (6, 9):
            x = normal(2, L, 16)
            assert torch.allclose(compiled(x), layer(x), atol=1e-5, rtol=1e-5)  # sigmoid by another polynomial


def test_autocast() -> None:
    def call(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q = (x @ w).unflatten(-1, (2, 8)).transpose(1, 2)
            return qkv.attention(q, q, q, mask=CAUSAL)

    one_graph(call, [[normal(2, L, 16), normal(16, 16)] for L in (5, 9, 12)])


def test_dropout_draws_anew_and_from_the_seed() -> None:
    q, k, v = tensors(30)
    compiled = torch.compile(lambda: qkv.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(compiled())
        torch.manual_seed(seed)
        assert torch.equal(qkv.attention(q, k, v, dropout_p=0.5), found[-1])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert not torch.equal(compiled(), found[2])


def test_transforms_compile() -> None:
    c = normal(2, 4, 7, 6)

    def loss(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return (qkv.attention(q[None], k[None], v[None], mask=CAUSAL)[0] * c).sum()

    one_graph(lambda *x: torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*x), [[*tensors(7), c]])


def test_functions_fall_back_to_python() -> None:
    """A mask that is a function breaks the graph, as the error says with fullgraph=True; the result is the same."""
    q, k, v = tensors(6)
    even = qkv.mask_mod(lambda b, h, p, j: j % 2 == 0)

    def call(q: Tensor) -> Tensor:
        return qkv.attention(q * 2, k, v, mask=even) + 1

    assert torch.equal(torch.compile(call, backend="aot_eager")(q), call(q))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(q)


RELOAD = """
import sys, torch, qkv
folder = sys.argv[1]
model = torch.export.load(folder + "/model.pt2").module()
for x, want in torch.load(folder + "/samples.pt"):
    assert torch.equal(model(x), want), x.shape
"""


class WithLse(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return qkv.attention(q, k, v, mask=CAUSAL, positions="end", return_lse=True)


def test_a_program_that_returns_lse_is_saved(tmp_path: Path) -> None:
    """Its result is a named tuple, which a file names; here and in a process that only imports qkv."""
    lengths = {2: torch.export.Dim("L", min=3, max=4096)}
    program = torch.export.export(WithLse(), tuple(tensors(10)), dynamic_shapes=(lengths,) * 3)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for L in (9, 33):
        got, want = loaded(*tensors(L)), WithLse()(*tensors(L))
        assert type(got) is type(want)
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse, want.lse)
    read = "import sys, qkv, torch; x = [torch.ones(2, h, 4, d) for h, d in ((4, 8), (2, 8), (2, 6))]; "
    read += "print(torch.export.load(sys.argv[1]).module()(*x))"
    command = [sys.executable, "-c", read, str(tmp_path / "model.pt2")]
    told = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout
    assert told.startswith("OutputWithLse(out=")


@pytest.mark.parametrize("strict", [False, True])
def test_export(tmp_path: Path, strict: bool) -> None:
    """A program of any length, saved and loaded in a process that never saw the model."""
    layer = Layer(MASK & qkv.padding([9, 5]) if strict else MASK)
    lengths = {1: torch.export.Dim("L", min=9, max=4096)}
    program = torch.export.export(layer, (normal(2, 10, 16),), dynamic_shapes=(lengths,), strict=strict)
    assert [str(n.target) for n in program.graph.nodes if "qkv" in str(n.target)] == ["qkv.attention.default"]
    samples = [(x, layer(x).detach()) for x in (normal(2, L, 16) for L in (9, 10, 33))]
    if strict:  # the other one in this process: a second start costs seconds
        torch.export.save(program, tmp_path / "model.pt2")
        torch.save(samples, tmp_path / "samples.pt")
        subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=120)
    for x, want in samples:
        assert torch.equal(program.module()(x), want)
