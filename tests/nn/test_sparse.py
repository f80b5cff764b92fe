"""Native sparse attention: against dense float64 formulas, its gradients, its choice, and flash-linear-attention's."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.nn import SparseAttention, choice
from qkv.nn.choice import Pattern, chosen_blocks
from qkv.rotary import Rotary
from tests.kit.layers import sample
from tests.kit.skips import NO_FLA
from tests.kit.sparse_truth import SIZES, layer_truth, sparse

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 2e-12  # float64: a few hundred roundings
TURN = Rotary(8, 50.0)
# What is not said is as in SIZES. The first is l = d = l', as in flash-linear-attention.
PATTERNS: dict[str, dict[str, int]] = {
    "one size": {"block": 8, "stride": 8},
    "overlapping": {},
    "wide selected": {"block": 4, "stride": 2, "selected_block": 16, "top_k": 3},
    "wide compressed": {"block": 24, "stride": 4, "selected_block": 4, "top_k": 6, "window": 3},
    "none forced": {"initial": 0, "local": 0, "top_k": 2},
    "only forced": {"initial": 2, "local": 1, "top_k": 3},
    "single tokens": {"block": 2, "stride": 1, "selected_block": 1, "top_k": 5, "window": 1},
    "all blocks": {"top_k": 50},
}
HEADS = {"MHA": (3, 3), "GQA": (6, 2), "MQA": (4, 1)}


def near(got: Tensor, want: Tensor, tolerance: float = CLOSE) -> None:
    """Number by number."""
    assert got.shape == want.shape
    off = (got.double() - want.double()).abs() / (1 + want.double().abs())
    assert off.numel() == 0 or off.max().item() <= tolerance, f"off by {off.max().item()}"


def problem(Hq: int, Hkv: int, L: int = 61, B: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Scores of a standard deviation of 2: the choice depends on all tokens, and the softmax is not flat."""
    sizes = {
        "q": (Hq, 8), "k": (Hkv, 8), "v": (Hkv, 5), "k_swa": (Hkv, 8), "v_swa": (Hkv, 5)
    }  # fmt: skip
    made = {n: sample(B, h, L, d, seed=i, dtype=dtype) * 2**0.5 for i, (n, (h, d)) in enumerate(sizes.items())}
    gates = {n: sample(B, Hq, L, seed=9 + i, dtype=dtype).sigmoid() for i, n in enumerate(("g_cmp", "g_slc", "g_swa"))}
    return {**made, **gates}


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = sample(*out.shape, seed=77).to(out.dtype)
    found = torch.autograd.grad(out, inputs, weight, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


# ---------------------------------------------------------------------------------------------------- the function
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", PATTERNS)
def test_the_function_and_its_gradients(name: str, heads: str) -> None:
    o, given = {**SIZES, **PATTERNS[name]}, problem(*HEADS[heads])
    given = {n: t.requires_grad_() for n, t in given.items()}
    q, k, v, k_swa, v_swa, *gates = given.values()
    got = qkv.native_sparse_attention(**given, **o)
    want, _ = sparse(q, k, v, gates, o, swa=(k_swa, v_swa))
    near(got, want)
    for one, other, n in zip(*(gradients(t, list(given.values())) for t in (got, want)), given, strict=True):
        near(one, other, 20 * CLOSE)
        # In a window of one key its weight is 1, whatever the key.
        assert other.abs().max() > 1e-3 or (n == "k_swa" and o["window"] == 1), f"{n} has no gradient to compare"


@pytest.mark.parametrize("left_out", [("g_cmp",), ("g_slc",), ("g_swa",), ("g_cmp", "g_swa"), ("g_slc", "g_swa")])
def test_a_branch_without_a_gate_is_left_out(left_out: tuple[str, ...]) -> None:
    given = {n: t for n, t in problem(6, 2).items() if n not in left_out}
    gates = [given.get(n) for n in ("g_cmp", "g_slc", "g_swa")]
    want, _ = sparse(given["q"], given["k"], given["v"], gates, SIZES, swa=(given["k_swa"], given["v_swa"]))
    near(qkv.native_sparse_attention(**given, **SIZES), want)


def test_compressed_keys_of_ones_own() -> None:
    given = problem(6, 2)
    cmp = sample(2, 2, 14, 8, seed=31).requires_grad_(), sample(2, 2, 14, 5, seed=32).requires_grad_()
    q, k, v, k_swa, v_swa, *gates = given.values()
    got = qkv.native_sparse_attention(**given, k_cmp=cmp[0], v_cmp=cmp[1], **SIZES)
    want, _ = sparse(q, k, v, gates, SIZES, cmp=cmp, swa=(k_swa, v_swa))
    near(got, want)
    for one, other in zip(gradients(got, list(cmp)), gradients(want, list(cmp)), strict=True):
        near(one, other, 20 * CLOSE)


@pytest.mark.parametrize(
    "positions", ["end", 44, [44, 44], torch.arange(44, 61)[None]], ids=["end", "int", "ints", "tensor"]
)
def test_the_last_queries_alone(positions: Any) -> None:
    given = problem(6, 2)
    whole = qkv.native_sparse_attention(**given, **SIZES)
    for n in ("q", "g_cmp", "g_slc", "g_swa"):
        given[n] = given[n][:, :, 44:]
    near(qkv.native_sparse_attention(**given, **SIZES, positions=positions), whole[:, :, 44:])


@pytest.mark.parametrize("L", [0, 1, 2, 7, 8, 9, 16, 17])
def test_short_sequences(L: int) -> None:
    """No whole block: the compressed branch is 0. Fewer blocks than top_k: all of them."""
    given = {n: t.requires_grad_() for n, t in problem(4, 2, L=L).items()}
    q, k, v, k_swa, v_swa, *gates = given.values()
    got, (want, blocks) = (
        qkv.native_sparse_attention(**given, **SIZES),
        sparse(q, k, v, gates, SIZES, swa=(k_swa, v_swa)),
    )
    near(got, want)
    assert all(chosen == list(range(p // 8 + 1)) for rows in blocks[0] for p, chosen in enumerate(rows))
    for one, other in zip(*(gradients(t, list(given.values())) for t in (got, want)), strict=True):
        near(one, other, 20 * CLOSE)
    alone = qkv.native_sparse_attention(q, k, v, g_cmp=gates[0], **SIZES)
    assert not alone[:, :, :7].any()
    assert L < 8 or bool(alone[:, :, 7:].abs().amax(-1).gt(0).all())


def test_an_empty_batch() -> None:
    given = problem(4, 2, B=0)
    assert qkv.native_sparse_attention(**given, **SIZES).shape == (0, 4, 61, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """The choice is made in float32 from the given numbers: it is that of float64 but for near ties."""
    given = {n: t.requires_grad_() for n, t in problem(6, 2, dtype=dtype).items()}
    wide = {n: t.detach().double().requires_grad_() for n, t in given.items()}
    q, k, v, k_swa, v_swa, *gates = wide.values()
    cmp = [torch.stack([x[:, :, s : s + 8].mean(2) for s in range(0, 54, 4)], 2).to(dtype).double() for x in (k, v)]
    got, (want, _) = (
        qkv.native_sparse_attention(**given, **SIZES),
        sparse(q, k, v, gates, SIZES, cmp=cmp, swa=(k_swa, v_swa)),
    )
    assert got.dtype == dtype
    near(got, want, 8 * torch.finfo(dtype).eps)
    pairs = zip(gradients(got, list(given.values())), gradients(want, list(wide.values())), strict=True)
    for one, other in pairs:
        near(one, other, 40 * torch.finfo(dtype).eps)


def test_finite_differences() -> None:
    given = {n: t[:1, :, :21].clone().requires_grad_() for n, t in problem(2, 1, L=21).items()}
    o = {**SIZES, "block": 4, "stride": 2, "selected_block": 4, "top_k": 3, "window": 5}

    def call(*tensors: Tensor) -> Tensor:
        return qkv.native_sparse_attention(**dict(zip(given, tensors, strict=True)), **o)

    assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


# ------------------------------------------------------------------------------------------------------ the choice
def chosen(q: Tensor, k_cmp: Tensor, pattern: Pattern, Lk: int) -> Tensor:
    places = torch.arange(q.shape[2])[None]
    _, lse = qkv.attention(q, k_cmp, k_cmp, qkv.causal(), positions=pattern.newest(places), return_lse=True)
    return chosen_blocks(q, k_cmp, lse, places, pattern, q.shape[-1] ** -0.5, Lk)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_chosen_blocks_whatever_is_held_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    o, given = {**SIZES, **PATTERNS[name]}, problem(6, 2)
    q, k, v, *_ = given.values()
    pattern = Pattern(**o)
    k_cmp = torch.stack([k[:, :, s : s + o["block"]].mean(2) for s in range(0, 62 - o["block"], o["stride"])], 2)
    _, want = sparse(q, k, v, [None, given["g_slc"], None], o)
    found = []
    for held in (1, 3000, 1 << 22):
        monkeypatch.setattr(choice, "_NUMBERS", held)
        monkeypatch.setattr(choice, "_ROWS", 1)
        found.append(chosen(q, k_cmp, pattern, 61))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    got = [[[[n for n in row if n >= 0] for row in h] for h in b] for b in found[0].tolist()]
    assert got == want
    assert found[0].shape == (2, 2, 61, o["top_k"])


def test_ties_go_to_the_lower_block() -> None:
    """Queries of zeros: compressed blocks weigh the same. Blocks at the ends share fewer strides with them."""
    q, k_cmp = torch.zeros(1, 4, 80, 8), sample(1, 2, 20, 8, dtype=torch.float32)
    got = chosen(q, k_cmp, Pattern(4, 4, 4, 5, 1, 2, 1), 80)
    assert got[0, 0, 79].tolist() == [0, 1, 2, 18, 19]
    assert got[0, 1, 30].tolist() == [0, 1, 2, 6, 7]
    assert got[0, 0, 11].tolist() == [-1, -1, 0, 1, 2]
    overlapping = chosen(q[:, :, :40], k_cmp[:, :, :9], Pattern(8, 4, 4, 5, 0, 0, 1), 40)
    assert overlapping[0, 0, 39].tolist() == [1, 2, 3, 4, 5]  # 0 and 9 lie in one compressed block, the others in two


def test_weights_that_vanish_are_ties() -> None:
    """All of the weight on one block: the others have exactly 0 in float32, and the lower ones go first."""
    q = torch.full((1, 1, 64, 1), 30.0)
    k_cmp = torch.zeros(1, 1, 16, 1)
    k_cmp[0, 0, 9] = 30.0
    got = chosen(q, k_cmp, Pattern(4, 4, 4, 5, 1, 1, 1), 64)
    assert got[0, 0, 63].tolist() == [0, 1, 2, 9, 15]


def test_nan_stays_where_it_is() -> None:
    """A batch row of NaN gets some blocks, the others what they get without it."""
    given = problem(4, 2)
    want = qkv.native_sparse_attention(**given, **SIZES)
    for t in given.values():
        t[1] = torch.nan
    got = qkv.native_sparse_attention(**given, **SIZES)
    assert torch.equal(got[0], want[0])
    assert got[1].isnan().all()


class Largest(TorchDispatchMode):
    """The most numbers that a tensor of any operator had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(found):
            if isinstance(t, Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // max(t.element_size(), 1))
        return found


def test_nothing_is_as_large_as_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,048 tokens: all pairs are 8 million, those with compressed blocks 2 million; q has 32,768 numbers."""
    monkeypatch.setattr(choice, "_NUMBERS", 1 << 14)
    L = 2048
    q, k = (sample(1, 2, L, 8, seed=i, dtype=torch.float32).requires_grad_() for i in range(2))
    gate = torch.ones(1, 2, L)
    with Largest() as seen:
        out = qkv.native_sparse_attention(q, k, k, g_cmp=gate, g_slc=gate, g_swa=gate, **{**SIZES, "top_k": 8})
        out.sum().backward()
    assert seen.numbers <= 4 * q.numel()


# ------------------------------------------------------------------------------------------------------- the layer
LAYERS: dict[str, dict[str, Any]] = {
    "MHA": {},
    "GQA, rotary": {"num_kv_heads": 2, "rotary": TURN},
    "MQA, sizes": {"num_kv_heads": 1, "head_dim": 6, "value_dim": 5, "bias": True},
    "one set of keys": {"num_kv_heads": 2, "shared_kv": True, "rotary": TURN},
    "means": {"num_kv_heads": 2, "compress": "mean", "out_bias": True},
    "hidden, scale": {"num_kv_heads": 2, "compress_hidden": 3, "scale": 0.7, "rotary": Rotary(4, interleaved=True)},
    "as fla": {"num_kv_heads": 1, "shared_kv": True, "compress": "mean", "stride": 8, "rotary": TURN},
}  # fmt: skip


def sparse_layer(**options: Any) -> SparseAttention:
    """A float64 layer with sharp scores, whose every parameter is random."""
    layer = SparseAttention(32, 4, **{**SIZES, "dtype": torch.float64, **options})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 and "position" not in name else 1.0
            gain = 2.0 if name in ("q_proj.weight", "k_proj.weight") or "compress" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size * gain)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_and_the_gradients_of_its_parameters(name: str) -> None:
    layer, x = sparse_layer(**LAYERS[name]), sample(2, 45, 32, seed=5).requires_grad_()
    got, want = layer(x), layer_truth(layer, x)
    near(got, want)
    named = {"x": x, **dict(layer.named_parameters())}
    for one, other, n in zip(*(gradients(t, list(named.values())) for t in (got, want)), named, strict=True):
        near(one, other, 100 * CLOSE)
        # One number that is added to all keys of a branch changes no weight.
        assert other.abs().max() > 1e-4 or n == "k_proj.bias" or n == "k_compress.down_proj.bias", n


@pytest.mark.parametrize("shape", [(0, 9, 32), (2, 0, 32), (2, 1, 32), (2, 7, 32)])
def test_few_tokens(shape: tuple[int, ...]) -> None:
    layer, x = sparse_layer(num_kv_heads=2, rotary=TURN), sample(*shape, seed=1).requires_grad_()
    out = layer(x)
    near(out, layer_truth(layer, x) if x.numel() else x)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.isnan().any() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layer_in_other_dtypes(dtype: torch.dtype) -> None:
    layer, x = sparse_layer(num_kv_heads=2, rotary=TURN, compress="mean"), sample(2, 45, 32, seed=5, dtype=dtype)
    half = copy.deepcopy(layer).to(dtype)
    for wide, narrow in zip(layer.parameters(), half.parameters(), strict=True):
        wide.data.copy_(narrow.data)
    got, want = half(x), layer_truth(layer, x.double())
    assert got.dtype == dtype
    # A block that is as important as another but for rounding may change places with it: most rows have none.
    off = (got.double() - want).abs().amax(-1).flatten().sort().values
    assert off[: int(0.9 * len(off))].max() <= 60 * torch.finfo(dtype).eps * (1 + want.abs().max())


def test_positions_turn_and_do_not_move_blocks() -> None:
    """Rotary is relative, and a mean turns as its tokens do."""
    layer, x = sparse_layer(num_kv_heads=2, rotary=TURN, compress="mean"), sample(2, 45, 32, seed=5)
    near(layer(x, positions=1000), layer(x), 1e-9)
    assert (layer(x, positions=torch.arange(45) * 2) - layer(x)).abs().max() > 0.1


def test_state_dict_pickle_and_meta() -> None:
    layer, x = sparse_layer(num_kv_heads=2, rotary=TURN), sample(1, 30, 32, seed=5)
    other = SparseAttention(32, 4, num_kv_heads=2, rotary=TURN, dtype=torch.float64, **SIZES)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    empty = SparseAttention(32, 4, device="meta", dtype=torch.float64, **SIZES).to_empty(device="cpu")
    torch.manual_seed(0)
    empty.reset_parameters()
    torch.manual_seed(0)
    fresh = SparseAttention(32, 4, dtype=torch.float64, **SIZES)
    for (name, one), two in zip(empty.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert "block=8, stride=4" in repr(layer)
    phi = ("position", "up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias")
    names = [f"{n}_proj.weight" for n in ("q", "k", "v", "gate", "o")]
    assert list(layer.state_dict()) == [*names, *(f"{n}_compress.{p}" for n in "kv" for p in phi)]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_as_one_graph_for_all_lengths() -> None:
    layer = sparse_layer(num_kv_heads=2, rotary=TURN)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for L in (45, 23):
        x = sample(2, L, 32, seed=5).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=L != 45):
            got = compiled(x)
        named = [x, *layer.parameters()]
        near(got, layer(x))
        for one, other in zip(gradients(got, named), gradients(layer(x), named), strict=True):
            near(one, other)


def test_dropout_is_for_training() -> None:
    layer, x = sparse_layer(num_kv_heads=2, dropout_p=0.3), sample(1, 45, 32, seed=5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    near(layer(x), layer_truth(layer, x))


def test_autocast() -> None:
    layer, x = sparse_layer(num_kv_heads=2, rotary=TURN).float(), sample(1, 45, 32, seed=5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    off = (got.float() - layer(x)).abs().amax(-1).flatten().sort().values
    assert off[: len(off) // 2].max() <= 60 * torch.finfo(torch.bfloat16).eps * (1 + layer(x).abs().max())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"stride": 3}, ArgumentError, "stride must divide block"),
        ({"stride": 4, "block": 4, "selected_block": 6}, ArgumentError, "stride must divide selected_block"),
        ({"top_k": 2}, ArgumentError, "count towards top_k.*top_k=2"),
        ({"window": 0}, ArgumentError, "window must be an integer >= 1"),
        ({"initial": -1}, ArgumentError, "initial must be an integer >= 0"),
        ({"block": 8.5}, ArgumentTypeError, "block must be an integer"),
        ({"compress": "max"}, ArgumentError, 'compress is "mlp" or "mean"'),
        ({"num_kv_heads": 3}, ArgumentError, "num_heads must be a multiple of num_kv_heads"),
        ({"rotary": Rotary(64)}, ArgumentError, "rotary turns at most head_dim"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        SparseAttention(32, 4, **{**SIZES, **options})


def test_arguments_that_do_not_fit() -> None:
    given = problem(4, 2)
    with pytest.raises(ArgumentError, match="no gate at all"):
        qkv.native_sparse_attention(given["q"], given["k"], given["v"])
    with pytest.raises(ShapeError, match=r"g_cmp must be \(B, Hq, Lq\).*Transpose"):
        qkv.native_sparse_attention(given["q"], given["k"], given["v"], g_cmp=given["g_cmp"].mT)
    with pytest.raises(ArgumentError, match=r"keys and values of its own.*k_swa and no v_swa"):
        qkv.native_sparse_attention(**{n: t for n, t in given.items() if n != "v_swa"})
    with pytest.raises(ShapeError, match=r"a compressed key for each whole block.*Pass 2 of them"):
        qkv.native_sparse_attention(**given, k_cmp=given["k"], v_cmp=given["v"])
    with pytest.raises(ArgumentError, match="positions= must say"):
        qkv.native_sparse_attention(given["q"][:, :, :5], given["k"], given["v"], g_cmp=given["g_cmp"][:, :, :5])
    with pytest.raises(ArgumentTypeError, match="softcap"):
        qkv.native_sparse_attention(**given, softcap=1.0)
    with pytest.raises(ArgumentTypeError, match="mask"):
        sparse_layer()(sample(1, 5, 32), mask=qkv.causal())
    with pytest.raises(ShapeError, match=r"x must be \(B, L, dim\)"):
        sparse_layer()(sample(5, 32))


# ----------------------------------------------------------------------------- flash-linear-attention's naive function
@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fla.ops.nsa.naive of an installed flash-linear-attention, without Triton and flash-attn: what it takes of its
    kernels, the means of blocks and a window, is written out here."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip(NO_FLA)

    def mean_pooling(x: Tensor, size: int, cu_seqlens: Any) -> Tensor:
        assert cu_seqlens is None
        return torch.stack([part.mean(1) for part in x.split(size, 1)], 1)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
        assert causal
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
        i = torch.arange(q.shape[1])
        seen = (i <= i[:, None]) & (i >= i[:, None] - window_size[0])
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    stubs: dict[str, dict[str, Any]] = {
        "einops": {"repeat": lambda x, pattern, g: x.repeat_interleave(g, 2)},
        "fla": {}, "fla.ops": {}, "fla.ops.utils": {"prepare_chunk_offsets": None},
        "fla.ops.utils.pooling": {"mean_pooling": mean_pooling},
        "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": None},
    }  # fmt: skip
    for name, parts in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    path = Path(found.submodule_search_locations[0]) / "ops" / "nsa" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    assert spec is not None
    assert spec.loader is not None
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    return naive


@pytest.mark.parametrize(("size", "count", "window", "L"), [(8, 4, 12, 75), (16, 3, 20, 128), (4, 16, 0, 41)])
@pytest.mark.parametrize("Hkv", [1, 2])
def test_as_flash_linear_attention(fla: Any, Hkv: int, size: int, count: int, window: int, L: int) -> None:
    """Its function, in float32: the same outputs, gradients and blocks."""
    Hq = 16 * Hkv
    q, k, v = (sample(2, L, h, 8, seed=i, dtype=torch.float32) * 2**0.5 for i, h in enumerate((Hq, Hkv, Hkv)))
    gates = [sample(2, L, Hq, seed=5 + i, dtype=torch.float32).sigmoid() for i in range(3)]
    named = [t.requires_grad_() for t in (q, k, v, *gates)]
    want, blocks = fla.naive_nsa(
        *named, block_counts=count, block_size=size, window_size=window, return_block_indices=True
    )
    turned = [t.transpose(1, 2) for t in named]
    g = dict(zip(("g_cmp", "g_slc", "g_swa"), turned[3:], strict=True))
    if not window:
        del g["g_swa"]
    got = qkv.native_sparse_attention(
        *turned[:3], **g, block=size, stride=size, selected_block=size, top_k=count, window=max(window, 1)
    ).transpose(1, 2)
    near(got, want, 2e-5)
    for one, other in zip(gradients(got, named), gradients(want, named), strict=True):
        near(one, other, 2e-4)
    k_cmp = fla.mean_pooling(k, size, None)[:, : L // size].transpose(1, 2)
    mine = chosen(turned[0], k_cmp, Pattern(size, size, size, count), L).transpose(1, 2)
    assert torch.equal(mine.long(), blocks.sort(-1).values)
