"""Layers whose sequences several ranks hold together give what one process gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import qkv
from qkv.cache import PagedCache
from qkv.distributed import Context, HeadParallel, Shards
from qkv.lm import Config, Decoder
from qkv.nn import Attention, LatentAttention, SparseAttention
from qkv.rotary import DynamicNTK, Rotary
from tests.distributed.test_tensor_parallel import BLOCKS, LATENT, _indexed
from tests.kit.ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

L = 23  # that 2, 3 and 4 ranks do not divide
UNEVEN = {2: [[(0, 3), (9, 11)], [(3, 9), (11, L)]], 3: [[], [(0, 20)], [(20, L)]], 4: [[(i, i + 1)] for i in range(3)]}
UNEVEN[4].append([(3, L)])

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "everything": lambda **made: Attention(
        32, 4, num_kv_heads=2, rotary=Rotary(8), mask=qkv.causal(), qk_norm=True, bias=True, sinks=True, gate=True,
        softcap=5.0, value_dim=6, **made,
    ),
    "mqa": lambda **made: Attention(32, 4, num_kv_heads=1, rotary=Rotary(8), mask=qkv.sliding_window(5), **made),
    "dynamic": lambda **made: Attention(
        32, 4, rotary=Rotary(8, scaling=DynamicNTK(2.0, original_length=8)), mask=qkv.causal(), **made
    ),
    "no mask": lambda **made: Attention(32, 4, **made),
    "mla": lambda **made: LatentAttention(32, 4, q_lora_rank=12, absorb=False, mask=qkv.causal(), **LATENT, **made),
    "absorbed": lambda **made: LatentAttention(
        32, 4, q_lora_rank=None, absorb=True, mask=qkv.causal(), **LATENT, **made
    ),
}  # fmt: skip
MASKS = {
    "none": None,
    "documents": qkv.documents([7, 0, 12, 4]),
    "bool": torch.rand(L, L, generator=torch.Generator().manual_seed(0)) > 0.2,
}


def _shards(kind: str, ranks: int) -> Shards:
    if kind == "uneven":
        return Shards(UNEVEN[ranks])
    return Shards.zigzag(L, ranks) if kind == "zigzag" else Shards.contiguous(L, ranks)


def _summed(t: Tensor | None, mesh: DeviceMesh) -> Tensor:
    """A parameter's gradient: the sum of the ranks' shares."""
    assert t is not None
    total = t.clone()
    torch.distributed.all_reduce(total, group=mesh.get_group())
    return total


def _made(name: str) -> Any:
    layer = LAYERS[name](dtype=torch.float64)
    rng = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=rng)
    return layer


def _tokens() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(7)
    return tuple(torch.randn(2, L, 32, dtype=torch.float64, generator=rng) for _ in range(2))  # type: ignore[return-value]


def _compared(mesh: DeviceMesh, name: str, kind: str, mask: str, more: dict[str, Any]) -> dict[str, float]:
    layer, across = _made(name), Context(mesh, _shards(kind, mesh.size()), method=more.pop("method", None))
    x, weight = _tokens()
    if "each" in more:  # positions of each row of each token
        at = torch.randint(40, (2, L), generator=torch.Generator().manual_seed(1))
        whole, own = {"positions": at}, {"positions": across.shard(at)}
    else:
        whole = own = more
    seen = {} if MASKS[mask] is None else {"mask": MASKS[mask]}
    mine, theirs = x.clone().requires_grad_(), across.shard(x).clone().requires_grad_()
    out = layer(mine, **seen, **whole)
    (out * weight).sum().backward()
    gradients = {n: p.grad for n, p in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    part = layer(theirs, **seen, **own, across=across)
    (part * across.shard(weight)).sum().backward()
    found = {n: (gradients[n] - _summed(p.grad, mesh)).abs().max().item() for n, p in layer.named_parameters()}
    assert mine.grad is not None
    assert theirs.grad is not None
    rows = theirs.shape[1]
    found["x"] = (across.shard(mine.grad) - theirs.grad).abs().max().item() if rows else 0.0
    found["out"] = (out - across.unshard(part)).abs().max().item()
    return found


def _equal(found: list[dict[str, float]]) -> None:
    for rank, each in enumerate(found):
        far = {name: error for name, error in each.items() if not error < 1e-12}
        assert not far, f"rank {rank}: {far}"


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_one_process(name: str) -> None:
    _equal(on_ranks(2, _compared, name, "zigzag", "none", {}))
    _equal(on_ranks(3, _compared, name, "uneven", "documents", {}))


@pytest.mark.parametrize(
    ("ranks", "name", "kind", "mask", "more"),
    [
        (4, "everything", "uneven", "bool", {"positions": 5}),
        (2, "everything", "contiguous", "none", {"each": True}),
        (4, "mla", "zigzag", "documents", {"positions": 3}),
        (2, "dynamic", "zigzag", "none", {"positions": 9}),
        (2, "everything", "zigzag", "none", {"method": "ulysses"}),
        (2, "absorbed", "uneven", "bool", {"method": "allgather"}),
        (1, "everything", "contiguous", "bool", {}),
    ],
)
def test_positions_masks_and_methods(ranks: int, name: str, kind: str, mask: str, more: dict[str, Any]) -> None:
    _equal(on_ranks(ranks, _compared, name, kind, mask, more))


def _both(mesh: DeviceMesh) -> dict[str, float]:
    """Heads divided among two ranks, rows among two."""
    grid = DeviceMesh("cpu", mesh.mesh.view(2, 2), mesh_dim_names=("context", "tensor"))
    one, two = _made("everything"), parallelize_module(_made("everything"), grid["tensor"], HeadParallel())
    across = Context(grid["context"], Shards.zigzag(L, 2))
    x, weight = _tokens()
    out = one(x)
    (out * weight).sum().backward()
    part = two(across.shard(x), across=across)
    (part * across.shard(weight)).sum().backward()
    known, found = dict(two.named_parameters()), {"out": (out - across.unshard(part)).abs().max().item()}
    for name, parameter in one.named_parameters():
        grad = known[name].grad
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        found[name] = (parameter.grad - _summed(whole, grid["context"])).abs().max().item()
    return found


def test_heads_and_rows_are_divided_at_once() -> None:
    _equal(on_ranks(4, _both))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = _made("everything"), nn.Linear(32, 3, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor, across: Context | None = None) -> Tensor:
        logits: Tensor = self.head(x + self.layer(x, across=across))
        return logits.tanh()  # FSDP warns of a module that returns a view


def _clipped(model: nn.Module) -> Tensor:
    """The norm of the gradients, which are clipped by it. It is made whole before: torch 2.9's clip_grad_norm_ adds its
    epsilon to each rank's part."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
    return norm


def _sharded(mesh: DeviceMesh, inner: str) -> dict[str, float]:
    """Weights divided by FSDP2 over two data ranks, heads or rows over two more: three steps of clipped SGD."""
    grid = DeviceMesh("cpu", mesh.mesh.view(2, 2), mesh_dim_names=("data", inner))
    one, two = _Model(), _Model()
    two.load_state_dict(one.state_dict())
    across = None
    if inner == "tensor":
        plan = {"layer": HeadParallel(), "head": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(two, grid["tensor"], plan)
        over = grid["data"]
    else:  # a gradient is a sum over data and context alike
        across, over = Context(grid["context"], Shards.zigzag(L, 2)), mesh
    fully_shard(two, mesh=over)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (one, two)]
    x, _ = _tokens()
    mine, found = x[grid["data"].get_local_rank()][None], {}
    if across is not None:
        mine = across.shard(mine)
    for step in range(3):
        loss = one(x).square().mean()
        share = two(mine, across).square().sum() / (x.shape[0] * L * 3)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        (share * over.size()).backward()  # FSDP takes the mean over its ranks
        norms = [_clipped(model) for model in (one, two)]
        for optimizer in optimizers:
            optimizer.step()
        found[f"norm {step}"] = (norms[0] - norms[1]).abs().item()
    known = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        held = known[name]
        found[name] = (parameter - held.full_tensor()).abs().max().item()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("inner", ["tensor", "context"])
def test_weights_divided_by_fsdp_learn_as_in_one_process(inner: str) -> None:
    _equal(on_ranks(4, _sharded, inner))


def _decoder(mesh: DeviceMesh, attention: str) -> float:
    model = Decoder(Config(attention=attention, dim=32, layers=2, heads=4, window=5)).double()
    across = Context(mesh, Shards.zigzag(L, mesh.size()))
    tokens = torch.randint(256, (2, L), generator=torch.Generator().manual_seed(1))
    return (model(tokens) - across.unshard(model(across.shard(tokens), across=across))).abs().max().item()


@pytest.mark.parametrize("attention", ["gqa", "window", "mla"])
def test_a_decoder_reads_windows_across_ranks(attention: str) -> None:
    assert max(on_ranks(2, _decoder, attention)) < 1e-12


def _refused(mesh: DeviceMesh) -> list[str]:
    across, said = Context(mesh, Shards.contiguous(8, mesh.size())), []
    x = torch.randn(1, 4, 32)

    def refuse(call: Callable[[], Any], kind: type[Exception] = qkv.UnsupportedError) -> None:
        with pytest.raises(kind) as caught:
            call()
        said.append(str(caught.value))

    layer = Attention(32, 4, rotary=Rotary(8, scaling=DynamicNTK(2.0, original_length=8)))
    cache = PagedCache(pages=4, num_kv_heads=4, head_dim=8, dtype=torch.float32)
    step = cache.step([cache.add()], T=4).layer(0)
    refuse(lambda: layer(x, cache=step, across=across))
    refuse(lambda: layer(x, x, across=across))
    refuse(lambda: layer(x, positions=torch.arange(4), across=across))
    refuse(lambda: layer(x[:, :3], across=across), qkv.ShapeError)
    refuse(lambda: _indexed()(x, across=across))
    refuse(lambda: SparseAttention(32, 4, **BLOCKS)(x, across=across))
    refuse(lambda: Decoder(Config(attention="v-is-x", dim=32, layers=1))(x[..., 0].long(), across=across))
    refuse(lambda: Context(mesh, Shards.contiguous(8, 3)), qkv.ArgumentError)
    refuse(lambda: Context(mesh, [[(0, 8)]]), qkv.ArgumentTypeError)  # type: ignore[arg-type]
    return said


def test_what_needs_whole_sequences_says_so() -> None:
    wanted = [
        "a cache's step is of whole sequences",
        "give every rank the whole context, and pass positions=across.positions",
        "DynamicNTK needs the length",
        "x must be this rank's rows of the sequence. Got x (1, 3, 32) and 4 of 8 rows here",
        "across.shard(layer(across.unshard(x)))",
        "a choice of blocks is of whole sequences",
        "layers for comparison take whole sequences",
        "shards must be made for the mesh",
        "shards must be a qkv.distributed.Shards",
    ]
    for said in on_ranks(2, _refused):
        assert len(said) == len(wanted)
        for told, want in zip(said, wanted, strict=True):
            assert want in told


def _gathered(mesh: DeviceMesh) -> dict[str, float]:
    """The way that the error for a choice of blocks names, and the one for a context."""
    across = Context(mesh, Shards.zigzag(L, mesh.size()))
    x, weight = _tokens()
    layer = SparseAttention(32, 4, **BLOCKS, dtype=torch.float64)
    cross = Attention(32, 4, rotary=Rotary(8), mask=qkv.causal(), dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), across.shard(x).clone().requires_grad_()
    out = layer(mine)
    (out * weight).sum().backward()
    part = across.shard(layer(across.unshard(theirs)))
    (part * across.shard(weight)).sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    each = cross(across.shard(x), weight, positions=across.positions)
    return {
        "out": (across.shard(out) - part).abs().max().item(),
        "x": (across.shard(mine.grad) - theirs.grad).abs().max().item(),
        "cross": (across.shard(cross(x, weight)) - each).abs().max().item(),
    }


def test_the_ways_that_errors_name_are_right() -> None:
    _equal(on_ranks(2, _gathered))


def _compiled(mesh: DeviceMesh) -> tuple[float, int, int]:
    """A step of a compiled decoder: its graphs, and how many more after three further steps on other tokens."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    config = Config(attention="gqa", dim=32, layers=2, heads=4)
    one, two = Decoder(config).double(), Decoder(config).double()
    counter = CompileCounterWithBackend("aot_eager")
    step, across = torch.compile(two, backend=counter), Context(mesh, Shards.zigzag(L, mesh.size()))
    graphs = []
    for seed in range(4):
        for model in (one, two):
            model.zero_grad(set_to_none=True)
        tokens = torch.randint(256, (2, L), generator=torch.Generator().manual_seed(seed))
        one(tokens).square().sum().backward()
        with warnings.catch_warnings():  # dynamo asks what a graph begins with for its gradient
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            step(across.shard(tokens), across=across).square().sum().backward()
        graphs.append(counter.frame_count)
    known = dict(two.named_parameters())
    error = max((p.grad - _summed(known[n].grad, mesh)).abs().max().item() for n, p in one.named_parameters())  # type: ignore[operator]
    return error, graphs[0], graphs[-1] - graphs[0]


def test_a_compiled_step_is_right_and_compiled_once() -> None:
    for error, graphs, more in on_ranks(2, _compiled):
        assert error < 1e-11
        assert graphs <= 6  # what stands before, between and after the attention of two layers
        assert more == 0
