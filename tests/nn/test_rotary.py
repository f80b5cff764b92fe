"""Rotary positions: against complex rotation in NumPy, against transformers' tables, and as a value."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from qkv import rotary as module
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.rotary import DynamicNTK, Linear, Llama3, LongRoPE, Rotary, YaRN

SCALINGS = {
    "none": None,
    "linear": Linear(4.0),
    "dynamic": DynamicNTK(2.0, 32),
    "yarn": YaRN(8.0, 64),
    "llama3": Llama3(8.0, 128),
    "longrope": LongRoPE((1.0, 1.1, 1.3, 2.0), (1.5, 3.0, 5.0, 9.0), 4.0, 32),
}


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def turned(x: torch.Tensor, p: Any, theta: Any, interleaved: bool, gain: float = 1.0) -> np.ndarray[Any, Any]:
    """x (B, H, L, D) with pairs as complex numbers times gain exp(i p theta), p (B or 1, L), in float64."""
    out = x.double().numpy().copy()
    n = len(theta)
    for i in range(n):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
        z = (out[..., a] + 1j * out[..., b]) * gain * np.exp(1j * np.asarray(p)[:, None, :] * theta[i])
        out[..., a], out[..., b] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [8, 6, 2])
def test_against_complex_numbers(dim: int, dtype: torch.dtype, interleaved: bool) -> None:
    """All dims, partial dims; positions from an int, one list for the batch, and a list a batch row."""
    x = sample(3, 2, 5, 8, dtype=dtype)
    theta = [100.0 ** (-2 * i / dim) for i in range(dim // 2)]
    rotary = Rotary(dim, 100.0, interleaved)
    shared = torch.tensor([7, 0, 300, 5, 5])
    own = torch.tensor([[0, 1, 2, 3, 4], [399, 7, 7, 0, 31], [12, 350, 64, 63, 65]])
    cases = [(0, [range(5)]), (295, [range(295, 300)]), (-3, [range(-3, 2)])]
    cases += [(shared, shared[None].numpy()), (own, own.numpy()), (own[:1], own[:1].numpy())]
    wide = torch.promote_types(dtype, torch.float32)
    for positions, p in cases:
        got = rotary.rotate(x, positions)
        want = turned(x, [list(row) for row in p], theta, interleaved)
        # An angle up to 400 carries two roundings, theta's and the product's; cos, sin and the sum a few more.
        size = 2 * x.double().abs().amax().item()
        bound = size * (2 * 400 + 8) * torch.finfo(wide).eps / 2 + abs(want) * torch.finfo(dtype).eps
        assert got.dtype == dtype
        assert (abs(got.double().numpy() - want) <= bound).all(), f"positions {positions}"
        assert torch.equal(got[..., dim:], x[..., dim:])


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_scores_depend_on_distance_only(name: str, interleaved: bool) -> None:
    """And do depend on it: a rotation that does nothing, or turns queries only, would pass one half of this."""
    rotary = Rotary(8, 1000.0, interleaved, SCALINGS[name])
    q, k = sample(1, 1, 1, 8, seed=1), sample(1, 1, 1, 8, seed=2)

    def score(p: int, j: int) -> float:
        cos, sin = rotary.tables(p, 1, length=64, dtype=torch.float64)
        at_j = rotary.tables(j, 1, length=64, dtype=torch.float64)
        return float((rotary.apply(q, cos, sin) * rotary.apply(k, *at_j)).sum())

    for shift in (1, 50, 1000):
        assert score(9 + shift, 2 + shift) == pytest.approx(score(9, 2), abs=1e-11)  # angles to 1e3 eps
    assert abs(score(9, 2) - score(9, 3)) > 1e-3
    assert abs(score(9, 2) - score(2, 9)) > 1e-3
    assert score(4, 4) == pytest.approx(float((q * k).sum()) * rotary.gain**2, abs=1e-12)


def test_the_two_conventions_are_a_permutation_apart() -> None:
    x = sample(1, 2, 5, 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves, pairs = Rotary(8).rotate(x[..., order], 3), Rotary(8, interleaved=True).rotate(x, 3)
    assert torch.allclose(halves, pairs[..., order], rtol=0, atol=1e-14)
    assert not torch.allclose(Rotary(8).rotate(x, 3), pairs)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_gradient_is_the_rotation_back(interleaved: bool) -> None:
    x, cotangent = sample(2, 2, 4, 8, seed=1).requires_grad_(), sample(2, 2, 4, 8, seed=2)
    rotary = Rotary(6, 100.0, interleaved, YaRN(4.0, 16))
    rotary.rotate(x, 5).backward(cotangent)
    back = turned(cotangent, [range(-5, -9, -1)], rotary.frequencies(), interleaved, rotary.gain)
    assert x.grad is not None
    assert np.allclose(x.grad.numpy(), back, rtol=0, atol=1e-14 * 10)


# ------------------------------------------------------------------------------------------- transformers' tables
def config(head_dim: int = 64, **rope: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=rope.pop("max_position_embeddings", 4096),
        rope_parameters={"rope_theta": 10000.0, **rope},
    )


SHORT, LONG = [1.0 + 0.01 * i for i in range(32)], [1.0 + 0.7 * i for i in range(32)]
CONFIGS: list[tuple[str, dict[str, Any], Any]] = [
    ("linear", {"factor": 3.0}, Linear(3.0)),
    ("dynamic", {"factor": 2.0, "max_position_embeddings": 2048}, DynamicNTK(2.0, 2048)),
    ("yarn", {"factor": 16.0, "original_max_position_embeddings": 4096}, YaRN(16.0, 4096)),
    (
        "yarn",
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
        YaRN(40.0, 4096, mscale=1.0, mscale_all_dim=0.7),
    ),
    (
        "yarn",
        {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False, "beta_fast": 20, "beta_slow": 2},
        YaRN(32.0, 4096, beta_fast=20, beta_slow=2, truncate=False),
    ),
    (
        "yarn",
        {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 1.5},
        YaRN(4.0, 1024, attention_factor=1.5),
    ),
    (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        Llama3(),
    ),
    (
        "llama3",
        {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 512},
        Llama3(32.0, 512, 2.0, 3.0),
    ),
    (
        "longrope",
        {"factor": 8.0, "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 4096},
        LongRoPE(SHORT, LONG, 8.0, 4096),  # type: ignore[arg-type]
    ),
]


@pytest.mark.parametrize(("kind", "rope", "scaling"), CONFIGS, ids=[f"{c[0]}-{n}" for n, c in enumerate(CONFIGS)])
def test_frequencies_are_those_of_transformers(kind: str, rope: dict[str, Any], scaling: Any) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = config(rope_type=kind, **rope)
    plain = np.array(Rotary(64).frequencies())
    for length in (100, 4096, 4097, 20000):
        inv_freq, gain = ROPE_INIT_FUNCTIONS[kind](known, torch.device("cpu"), seq_len=length)
        ours = np.array(Rotary(64, scaling=scaling).frequencies(length))
        # theirs are float32: base^x, a quotient and a blend of two, some roundings each
        assert np.allclose(ours, inv_freq.double().numpy(), rtol=2e-6, atol=0)
        assert Rotary(64, scaling=scaling).gain == pytest.approx(gain, rel=1e-12)
    assert (abs(ours / plain - 1) > 0.01).any()


@pytest.mark.parametrize("interleaved", [False, True], ids=["llama", "cohere"])
def test_rotation_is_that_of_transformers(interleaved: bool) -> None:
    from transformers.models.cohere import modeling_cohere as pairs
    from transformers.models.llama import modeling_llama as halves

    q, k = sample(2, 4, 6, 64, seed=1, dtype=torch.float32), sample(2, 2, 6, 64, seed=2, dtype=torch.float32)
    positions = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    if interleaved:
        cos, sin = pairs.CohereRotaryEmbedding(config(rope_type="default"))(q, positions)
        want = pairs.apply_rotary_pos_emb(q, k, cos, sin)
    else:
        cos, sin = halves.LlamaRotaryEmbedding(config(rope_type="default"))(q, positions)
        want = halves.apply_rotary_pos_emb(q, k, cos, sin)
    rotary = Rotary(64, interleaved=interleaved)
    for x, y in zip((q, k), want, strict=True):
        assert torch.allclose(rotary.rotate(x, positions), y, rtol=0, atol=1e-5)  # angles to 10, float32


# ------------------------------------------------------------------------------------------------------ scalings
def test_linear_is_the_position_divided() -> None:
    x = sample(1, 1, 3, 8)
    assert torch.allclose(Rotary(8, scaling=Linear(4.0)).rotate(x, torch.tensor([0, 4, 40])), Rotary(8).rotate(
        x, torch.tensor([0, 1, 10])), rtol=0, atol=1e-13)  # fmt: skip


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_scalings_by_length(name: str) -> None:
    """The length is the last position + 1, whether positions come as an int or a tensor; up to 32 nothing stretches."""
    scaling = SCALINGS[name]
    assert scaling is not None
    rotary = Rotary(8, scaling=scaling)
    assert scaling.depends_on_length
    assert rotary.frequencies(32) == rotary.frequencies(1) != rotary.frequencies(33)
    x = sample(1, 1, 4, 8)
    for start in (0, 28, 29, 60):
        by_int, by_tensor = rotary.rotate(x, start), rotary.rotate(x, torch.arange(start, start + 4))
        theta = rotary.frequencies(start + 4)
        assert torch.equal(by_int, by_tensor)
        assert np.allclose(by_int, turned(x, [range(start, start + 4)], theta, False, rotary.gain), rtol=0, atol=1e-12)
    assert rotary.rotate(x[:, :, :0], torch.arange(0)).shape == (1, 1, 0, 8)


def test_one_pair_has_no_base() -> None:
    assert Rotary(2, scaling=DynamicNTK(2.0, 4)).frequencies(100) == (1.0,)


# --------------------------------------------------------------------------------------------------- value, tables
@pytest.mark.parametrize("name", SCALINGS)
def test_a_value(name: str) -> None:
    rotary = Rotary(8, scaling=SCALINGS[name])
    for twin in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary)), Rotary(8, scaling=SCALINGS[name])):
        assert twin == rotary
        assert hash(twin) == hash(rotary)
    assert rotary != Rotary(8, 9999.0, scaling=SCALINGS[name])
    with pytest.raises(AttributeError):
        rotary.base = 2.0  # type: ignore[misc]


def test_tables_are_shared_bounded_and_made_where_they_are_used() -> None:
    module._TABLES.clear()
    x = sample(1, 1, 5, 8, dtype=torch.float32)
    first = Rotary(8).tables(0, 5)[0]
    assert Rotary(8).tables(3, 60)[0].data_ptr() == first.data_ptr() + 3 * 4 * 4  # the same memory, three rows on
    for n in range(20):
        Rotary(8, 100.0 + n).rotate(x)
        Rotary(8).rotate(x, 1 << n)
    assert len(module._TABLES) <= module._MAX_TABLES
    assert all(t.element_size() * t.numel() * 2 <= module._MAX_TABLE_BYTES for t, _ in module._TABLES.values())
    before = dict(module._TABLES)
    assert Rotary(8).rotate(torch.empty(1, 1, 5, 8, device="meta")).device.type == "meta"
    with torch.device("meta"):  # a default device is not ours to follow
        assert Rotary(8).rotate(x).device.type == "cpu"
        assert Rotary(8, 77.0).rotate(x, torch.arange(5, device="cpu")).device.type == "cpu"
        assert Rotary(8, 78.0).rotate(x).device.type == "cpu"
    assert {t.device.type for t, _ in module._TABLES.values()} == {"cpu"}
    assert len(before) <= module._MAX_TABLES
    Rotary(8).rotate(x, 1 << 40)  # a table of that many rows would not fit anywhere
    assert all(len(t) < 1 << 22 for t, _ in module._TABLES.values())


def test_a_growing_table_keeps_its_values() -> None:
    module._TABLES.clear()
    for dtype in (torch.float32, torch.float64):
        short = Rotary(8).tables(0, 64, dtype=dtype)
        long = Rotary(8).tables(0, 65, dtype=dtype)
        assert short[0].dtype == dtype
        for a, b in zip(short, long, strict=True):
            assert torch.equal(a, b[:64])


def test_a_table_made_in_inference_mode_serves_training() -> None:
    module._TABLES.clear()
    with torch.inference_mode():
        Rotary(8).rotate(sample(1, 1, 5, 8))
    x = sample(1, 1, 5, 8).requires_grad_()
    Rotary(8).rotate(x).backward(sample(1, 1, 5, 8, seed=1))
    assert x.grad is not None


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_memory_stays_by_token(interleaved: bool) -> None:
    """Heads of one token lie side by side, as the projection left them: what follows needs no copy."""
    for dim in (8, 4):
        x = sample(2, 5, 3, 8).transpose(1, 2)
        kept = x.clone()
        assert Rotary(dim, interleaved=interleaved).rotate(x).transpose(1, 2).is_contiguous()
        assert torch.equal(x, kept)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_any_strides(interleaved: bool) -> None:
    """Odd steps, an odd offset, steps between the numbers of a head, expanded heads."""
    rotary, source = Rotary(4, 30.0, interleaved), sample(2, 3, 6, 9)
    views = [source[..., 1:5], source[..., :4], source[..., 1::2], source[:, :1, :, 2:6].expand(-1, 3, -1, -1)]
    for view in [*views, source.transpose(1, 3)[..., :4], source.transpose(2, 3)[..., :4]]:
        x = view if view.shape[-1] >= 4 else source
        assert torch.allclose(rotary.rotate(x, 3), rotary.rotate(x.contiguous(), 3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_transforms_of_torch(interleaved: bool) -> None:
    """vmap, forward mode, a second derivative, and a trace without a break give what eager does."""
    rotary, x, t = Rotary(6, 30.0, interleaved), sample(4, 2, 3, 5, 8), sample(4, 2, 3, 5, 8, seed=1)
    one_by_one = torch.stack([rotary.rotate(row, 2) for row in x])
    assert torch.allclose(torch.vmap(lambda z: rotary.rotate(z, 2))(x), one_by_one, rtol=0, atol=1e-14)
    _, pushed = torch.func.jvp(lambda z: rotary.rotate(z, 2), (x[0],), (t[0],))
    assert torch.allclose(pushed, rotary.rotate(t[0], 2), rtol=0, atol=1e-14)  # linear: its own derivative
    assert torch.autograd.gradgradcheck(lambda z: rotary.rotate(z, 2) ** 2, x[0, :1, :1, :2].clone().requires_grad_())
    known = dict(module._TABLES)
    traced = torch.compile(lambda z: rotary.rotate(z, 2), fullgraph=True, backend="eager", dynamic=True)
    for n in (5, 4, 3):
        want = rotary.rotate(x[0, :, :, :n], 2)
        assert torch.allclose(traced(x[0, :, :, :n]), want, rtol=0, atol=1e-14)
    assert module._TABLES.keys() == known.keys()


@pytest.mark.parametrize(
    ("kind", "text", "make"),
    [
        (ArgumentError, "dim must be even", lambda: Rotary(7)),
        (ArgumentError, "dim must be even", lambda: Rotary(0)),
        (ArgumentTypeError, "dim must be an integer", lambda: Rotary(8.0)),  # type: ignore[arg-type]
        (ArgumentError, "base must be", lambda: Rotary(8, 1.0)),
        (ArgumentError, "base must be", lambda: Rotary(8, math.inf)),
        (ArgumentTypeError, "base must be a number", lambda: Rotary(8, "10000")),  # type: ignore[arg-type]
        (ArgumentTypeError, "interleaved must be a bool", lambda: Rotary(8, 100.0, 1)),  # type: ignore[arg-type]
        (ArgumentTypeError, "must be a Scaling", lambda: Rotary(8, scaling={"rope_type": "yarn"})),  # type: ignore[arg-type]
        (ArgumentError, "factor must be", lambda: Linear(0)),
        (ArgumentError, "factor must be", lambda: YaRN(math.nan, 4096)),
        (ArgumentError, "original_length must be", lambda: YaRN(2.0, 0)),
        (ArgumentError, "high_freq_factor", lambda: Llama3(8.0, 8192, 4.0, 4.0)),
        (ArgumentError, "one entry a pair", lambda: LongRoPE((1.0,), (1.0, 2.0), 4.0, 32)),
        (ArgumentError, "one factor a pair", lambda: Rotary(8, scaling=LongRoPE((1.0,), (1.0,), 4.0, 32))),
        (ArgumentError, "short_factor must be", lambda: LongRoPE((0.0,), (1.0,), 4.0, 32)),
        (ShapeError, "D >= dim=8", lambda: Rotary(8).rotate(torch.zeros(1, 1, 2, 6))),
        (ShapeError, "must be \\(B, H, L, D\\)", lambda: Rotary(8).rotate(torch.zeros(2, 8))),
        (ArgumentTypeError, "floating tensor", lambda: Rotary(8).rotate(torch.zeros(1, 1, 2, 8).long())),
        (ArgumentTypeError, "hold integers", lambda: Rotary(8).rotate(torch.zeros(1, 1, 2, 8), torch.zeros(2))),
        (ArgumentTypeError, "int or an integer", lambda: Rotary(8).rotate(torch.zeros(1, 1, 2, 8), [0, 1])),  # type: ignore[arg-type]
        (ShapeError, "\\(B or 1, L\\)", lambda: Rotary(8).rotate(torch.zeros(1, 1, 2, 8), torch.zeros(3).long())),
    ],
)
def test_errors(kind: type[Exception], text: str, make: Any) -> None:
    with pytest.raises(kind, match=text):
        make()
