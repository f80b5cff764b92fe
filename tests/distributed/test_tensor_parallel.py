"""Layers whose heads are divided among ranks give what one process gives, or say why they do not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import qkv
from qkv.cache import LatentCache, PagedCache
from qkv.distributed import HeadParallel, key_heads
from qkv.nn import Attention, Indexer, LatentAttention, MultiheadAttention, SparseAttention
from qkv.rotary import Rotary
from tests.kit.ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "bias": True}
BLOCKS: dict[str, Any] = {"block": 4, "stride": 2, "selected_block": 4, "top_k": 3, "window": 4}


def _indexed(**made: Any) -> LatentAttention:
    indexer = Indexer(32, 3, 8, top_k=5, q_lora_rank=12, rope_dim=4, **made)
    return LatentAttention(32, 4, q_lora_rank=12, indexer=indexer, mask=qkv.causal(), **LATENT, **made)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mha": lambda **made: Attention(32, 4, mask=qkv.causal(), **made),
    "everything": lambda **made: Attention(
        32,
        4,
        num_kv_heads=2,
        rotary=Rotary(8),
        mask=qkv.causal(),
        qk_norm=True,
        bias=True,
        sinks=True,
        gate=True,
        softcap=5.0,
        **made,
    ),
    "twelve heads": lambda **made: Attention(
        48,
        12,
        num_kv_heads=6,
        rotary=Rotary(4),
        mask=qkv.causal(),
        qk_norm=True,
        bias=True,
        sinks=True,
        gate="headwise",
        value_dim=6,
        **made,
    ),
    "groups of three": lambda **made: Attention(48, 12, num_kv_heads=4, mask=qkv.causal(), **made),
    "mqa": lambda **made: Attention(
        32, 4, num_kv_heads=1, rotary=Rotary(8), mask=qkv.sliding_window(3), qk_norm=True, out_bias=True, **made
    ),
    "mla": lambda **made: LatentAttention(32, 4, q_lora_rank=12, absorb=False, mask=qkv.causal(), **LATENT, **made),
    "absorbed": lambda **made: LatentAttention(
        32, 4, q_lora_rank=None, absorb=True, mask=qkv.causal(), **LATENT, **made
    ),
    "indexed": _indexed,
    "sparse": lambda **made: SparseAttention(32, 4, num_kv_heads=4, rotary=Rotary(8), **BLOCKS, **made),
    "shared sparse": lambda **made: SparseAttention(
        32, 8, num_kv_heads=4, shared_kv=True, compress="mean", **BLOCKS, **made
    ),
}
PLAN = {name: ColwiseParallel for name in ("q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj")}


def _plan(layer: nn.Module, *, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """PyTorch's own styles on the projections, as its tutorial writes them."""
    return {name: style() for name, style in {**PLAN, "o_proj": RowwiseParallel}.items()
            if hasattr(layer, name) and name not in leave}  # fmt: skip


def _pair(mesh: DeviceMesh, name: str, plan: Any, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The layer as one process has it, and parallelized."""
    one = LAYERS[name](dtype=dtype)
    for parameter in one.parameters():
        nn.init.normal_(parameter, std=0.3)
    two = copy.deepcopy(one)
    if mesh.get_local_rank() and not callable(plan):  # HeadParallel gives everybody rank 0's weights
        for parameter in two.parameters():
            nn.init.zeros_(parameter)
    return one, parallelize_module(two, mesh, plan(one) if callable(plan) else plan)


def _tokens(layer: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(7)
    return tuple(torch.randn(2, 21, layer.dim, dtype=dtype, generator=rng) for _ in range(2))  # type: ignore[return-value]


def _whole(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _differences(one: nn.Module, two: nn.Module) -> dict[str, float]:
    """The largest difference of outputs and of each gradient."""
    x, weight = _tokens(one)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, parallel = one(mine), two(theirs)
    (out * weight).sum().backward()
    (parallel * weight).sum().backward()
    assert not isinstance(parallel, DTensor)
    pairs = {"out": (out, parallel), "x": (mine.grad, theirs.grad)}
    known = dict(two.named_parameters())
    pairs |= {name: (p.grad, _whole(known[name].grad)) for name, p in one.named_parameters()}
    return {name: 0.0 if a is b is None else (a - b).abs().max().item() for name, (a, b) in pairs.items()}


def _compared(mesh: DeviceMesh, name: str, style: bool) -> dict[str, float]:
    return _differences(*_pair(mesh, name, HeadParallel() if style else _plan))


def _equal(found: list[dict[str, float]]) -> None:
    for rank, each in enumerate(found):
        far = {name: error for name, error in each.items() if not error < 1e-12}
        assert not far, f"rank {rank}: {far}"


@pytest.mark.parametrize(
    ("ranks", "name"),
    [(n, name) for name in LAYERS for n in (2, 4)] + [(3, "twelve heads"), (3, "groups of three"), (1, "everything")],
)
def test_outputs_and_gradients_are_those_of_one_process(ranks: int, name: str) -> None:
    _equal(on_ranks(ranks, _compared, name, True))


@pytest.mark.parametrize("name", ["mha", "everything", "twelve heads", "groups of three", "mla", "absorbed"])
def test_plans_of_one_style_a_projection_are_right_too(name: str) -> None:
    """Norms, gates and sinks that such a plan leaves alone, and the rotated key of a latent, get all their gradient."""
    _equal(on_ranks(2, _compared, name, False))


def _refused(mesh: DeviceMesh, name: str, leave: tuple[str, ...]) -> str:
    one, two = _pair(mesh, name, lambda layer: _plan(layer, leave=leave))
    with pytest.raises(qkv.QKVError) as caught:
        two(_tokens(one)[0])
    return str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "name", "leave", "told"),
    [
        (3, "mha", (), "q_proj must give whole heads of 8 numbers"),
        (2, "mqa", (), "k_proj must give whole heads of 8 numbers"),
        (3, "mla", (), "q_b_proj must give whole heads of 10 numbers"),
        (2, "mha", ("o_proj",), "o_proj must be, too. Got 2 of 4 heads"),
        (2, "mha", ("q_proj", "k_proj", "v_proj"), "o_proj must take the heads that are here. Got 4 of 4"),
        (2, "everything", ("v_proj",), "1 heads of keys, 2 of values on one of 2 ranks"),
        (2, "everything", ("q_proj",), "num_heads=4, num_kv_heads=2, and 1 heads of keys, 1 of values here"),
        (2, "absorbed", ("kv_b_proj",), "kv_b_proj must give the heads that are here. Got 44 rows for 2 heads of 11"),
        (2, "mla", ("kv_b_proj",), "for H=2, dn=6, dv=5"),
        (2, "sparse", (), "6 heads of keys, 6 of values on one of 2 ranks"),
    ],
)
def test_a_plan_that_would_be_wrong_is_refused_on_every_rank(
    ranks: int, name: str, leave: tuple[str, ...], told: str
) -> None:
    found = on_ranks(ranks, _refused, name, leave)
    assert all(told in each for each in found), found


def _left_whole(mesh: DeviceMesh) -> list[dict[str, float]]:
    """Queries divided, keys and values computed by every rank, as one writes for fewer key/value heads than ranks."""
    return [
        _differences(*_pair(mesh, name, lambda layer: _plan(layer, leave=("k_proj", "v_proj"))))
        for name in ("mqa", "everything", "groups of three")
    ]


def test_keys_that_every_rank_computes_get_their_whole_gradient() -> None:
    for found in on_ranks(2, _left_whole):
        _equal(found)


def _norms_of_pytorch(mesh: DeviceMesh) -> dict[str, float]:
    """Styles for norms, as torchtitan has them: their gradients are summed by DTensor, and not once more."""
    norms = {name: SequenceParallel(sequence_dim=2, use_local_output=True) for name in ("q_norm", "k_norm")}
    return _differences(*_pair(mesh, "everything", lambda layer: {**_plan(layer), **norms}))


def test_norms_with_a_style_of_their_own_are_summed_once() -> None:
    _equal(on_ranks(2, _norms_of_pytorch))


def _by_rows(mesh: DeviceMesh, prepared: bool) -> dict[str, float]:
    """Between layers each rank has its rows of the sequence."""
    if prepared:  # PyTorch's module style says where the rows are, and hands on a DTensor
        one, two = _pair(mesh, "everything", PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1)))
        two.load_state_dict(one.state_dict())
        two = parallelize_module(two, mesh, HeadParallel(output_layouts=Shard(1)))
    else:
        one, two = _pair(mesh, "everything", HeadParallel(input_layouts=Shard(1), output_layouts=Shard(1)))
    x, weight = (t[:, :20] for t in _tokens(one))
    start = 10 * mesh.get_local_rank()
    mine, theirs = x.clone().requires_grad_(), x[:, start : start + 10].clone().requires_grad_()
    out, part = one(mine), two(theirs)
    (out * weight).sum().backward()
    (part * weight[:, start : start + 10]).sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    known = dict(two.named_parameters())
    found = {name: (p.grad - _whole(known[name].grad)).abs().max().item() for name, p in one.named_parameters()}  # type: ignore[operator]
    found["out"] = (out[:, start : start + 10] - part).abs().max().item()
    found["x"] = (mine.grad[:, start : start + 10] - theirs.grad).abs().max().item()
    return found


@pytest.mark.parametrize("prepared", [False, True])
def test_ranks_hold_rows_between_layers(prepared: bool) -> None:
    _equal(on_ranks(2, _by_rows, prepared))


def _decoded(mesh: DeviceMesh, name: str, style: bool) -> float:
    """Two sequences in steps of several and of one token, on a cache of the rank's own heads, against one call."""
    one, two = _pair(mesh, name, HeadParallel() if style else _plan)
    x = _tokens(one)[0]
    held: dict[str, Any] = {"pages": 16, "dtype": torch.float64}
    if isinstance(two, SparseAttention):
        cache = two.cache(**held)
    elif isinstance(two, LatentAttention):
        index = 0 if two.indexer is None else two.indexer.head_dim
        cache = LatentCache(rank=two.kv_lora_rank, rope_dim=two.qk_rope_head_dim, index_dim=index, **held)
    else:
        assert isinstance(two, Attention)
        cache = PagedCache(num_kv_heads=key_heads(two), head_dim=two.head_dim, value_dim=two.value_dim, **held)
    seqs, parts, at = [cache.add(), cache.add()], [], 0
    with torch.no_grad():
        for T in (12, 1, 1, 7):
            parts.append(two(x[:, at : at + T], cache=cache.step(seqs, T=T).layer(0)))
            at += T
        return (torch.cat(parts, 1) - one(x)).abs().max().item()


@pytest.mark.parametrize(
    ("name", "style"),
    [(name, True) for name in LAYERS] + [("everything", False), ("mla", False), ("absorbed", False)],
)
def test_decoding_on_a_cache_of_the_ranks_own_heads(name: str, style: bool) -> None:
    assert max(on_ranks(2, _decoded, name, style)) < 1e-12


def test_more_ranks_than_key_value_heads_decode() -> None:
    assert max(on_ranks(4, _decoded, "everything", True)) < 1e-12


def _reads_latents(mesh: DeviceMesh) -> list[tuple[int, ...]]:
    """The shapes of kv_b_proj's outputs while a step of decode runs: none, since it is absorbed."""
    two = _pair(mesh, "mla", HeadParallel())[1]
    assert isinstance(two, LatentAttention)
    seen: list[tuple[int, ...]] = []
    expanded = two._materialised

    def noted(*args: Any, **more: Any) -> Any:
        seen.append(tuple(args[0].shape))
        return expanded(*args, **more)

    two._materialised = noted  # type: ignore[method-assign]
    cache = LatentCache(rank=10, rope_dim=4, pages=8, dtype=torch.float64)
    with torch.no_grad():
        two(_tokens(two)[0], cache=cache.step([cache.add(), cache.add()], T=21).layer(0))
        quiet = list(seen)
        two.kv_b_proj.register_forward_hook(lambda *_: None)  # somebody looks on: now only a call will do
        two(_tokens(two)[0], cache=cache.step([cache.add(), cache.add()], T=21).layer(0))
    return [*quiet, (-1,), *seen]


def test_a_divided_latent_layer_decodes_in_the_absorbed_form() -> None:
    for seen in on_ranks(2, _reads_latents):
        assert seen[0] == (-1,)
        assert len(seen) == 2


def _index_loss(mesh: DeviceMesh) -> dict[str, float]:
    one, two = _pair(mesh, "indexed", HeadParallel())
    assert isinstance(one, LatentAttention)
    assert isinstance(two, LatentAttention)
    x = _tokens(one)[0]
    losses = [layer.index_loss(x, full=full) for layer in (one, two) for full in (False, True)]
    for loss in losses:
        loss.backward()
    known = dict(two.named_parameters())
    found = {name: (p.grad - _whole(known[name].grad)).abs().max().item()  # type: ignore[operator]
             for name, p in one.named_parameters() if p.grad is not None}  # fmt: skip
    assert len(found) == 5
    return found | {"loss": abs(losses[0].item() - losses[2].item()) + abs(losses[1].item() - losses[3].item())}


def test_an_indexer_learns_from_the_heads_of_all_ranks() -> None:
    _equal(on_ranks(2, _index_loss))


def _float32(mesh: DeviceMesh, name: str) -> tuple[float, float]:
    """How far one process and the ranks are from float64, in float32."""
    one, two = _pair(mesh, name, HeadParallel(), torch.float32)
    x = _tokens(one, torch.float32)[0]
    exact = copy.deepcopy(one).double()(x.double())
    return tuple((layer(x) - exact).abs().max().item() for layer in (one, two))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["everything", "mla", "absorbed"])
def test_float32_is_as_near_as_in_one_process(name: str) -> None:
    for alone, ranks in on_ranks(2, _float32, name):
        assert ranks < 2 * alone + 1e-7


def _compiled(mesh: DeviceMesh, name: str, style: bool) -> tuple[float, int]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    one, two = _pair(mesh, name, HeadParallel() if style else _plan)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(nn.Sequential(two), backend=counter)  # hooks of the outermost are a graph of their own
    x, weight = _tokens(one)
    for _ in range(3):
        for layer in (one, two):
            layer.zero_grad(set_to_none=True)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        (one(mine) * weight).sum().backward()
        with warnings.catch_warnings():  # dynamo asks parts of DTensors for a gradient that they do not have
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            (step(theirs) * weight).sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    known, error = dict(two.named_parameters()), (mine.grad - theirs.grad).abs().max().item()
    for n, p in one.named_parameters():
        error = max(error, (p.grad - _whole(known[n].grad)).abs().max().item())  # type: ignore[operator]
    return error, counter.frame_count


@pytest.mark.parametrize(("name", "style"), [("everything", True), ("mla", True), ("mha", False)])
def test_a_compiled_layer_is_one_graph_that_is_made_once(name: str, style: bool) -> None:
    for error, graphs in on_ranks(2, _compiled, name, style):
        assert error < 1e-12
        assert graphs == 1


def _misuse(mesh: DeviceMesh) -> list[str]:
    said = []

    def refused(layer: nn.Module, kind: type[Exception], over: DeviceMesh = mesh) -> None:
        with pytest.raises(kind) as caught:
            parallelize_module(layer, over, HeadParallel())
        said.append(str(caught.value))

    refused(MultiheadAttention(32, 4), qkv.UnsupportedError)
    refused(nn.Linear(4, 4), qkv.ArgumentTypeError)
    refused(Attention(30, 5), qkv.ArgumentError)
    refused(SparseAttention(32, 4, num_kv_heads=1, **BLOCKS), qkv.ArgumentError)
    refused(Attention(32, 4), qkv.ArgumentError, DeviceMesh("cpu", [[0, 1]]))
    refused(parallelize_module(Attention(32, 4), mesh, HeadParallel()), qkv.ArgumentError)
    pruned = Attention(32, 4)
    pruned.q_proj = nn.Linear(32, 16)
    with pytest.raises(qkv.ShapeError) as caught:
        pruned(torch.randn(1, 3, 32))
    said.append(str(caught.value))
    kept = parallelize_module(Attention(32, 4), mesh, {"q_proj": ColwiseParallel(use_local_output=False)})
    with pytest.raises(qkv.ArgumentTypeError) as wrong:
        kept(torch.randn(1, 3, 32))
    return [*said, str(wrong.value)]


def test_errors_say_the_sizes_and_the_fix() -> None:
    wanted = [
        "Use qkv.nn.Attention(dim, num_heads, bias=True)",
        "a style for layers of qkv.nn. Got Linear",
        "Got num_heads=5 and 2 ranks. Use a mesh of 1, 5 ranks.",
        "Got num_kv_heads=1 and 2 ranks",
        "Got a mesh of (1, 2)",
        "a layer is divided once",
        "Got 2 heads where num_heads=4",
        "a DTensor from q_proj",
    ]
    for said in on_ranks(2, _misuse):
        assert len(said) == len(wanted)
        for told, want in zip(said, wanted, strict=True):
            assert want in told
