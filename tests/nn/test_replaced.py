"""Layers whose projections a user has replaced: what stands there is called, in training and over a cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qkv
from qkv.cache import LatentCache
from qkv.errors import ShapeError
from qkv.lm.decoder import Config, Decoder
from qkv.nn import Attention, LatentAttention
from tests.kit.layers import CLOSE, close, sample

pytestmark = pytest.mark.usefixtures("one_thread")

H, R, DN, DR, DV, L = 3, 11, 5, 4, 7, 9


class Adapter(nn.Module):
    """A low-rank adapter, as LoRA libraries write it; with or without the weight of what it wraps."""

    def __init__(self, base: nn.Linear, exposed: bool = True) -> None:
        super().__init__()
        self.base, self.exposed = base, exposed
        self.down = nn.Parameter(sample(2, base.in_features, seed=21))
        self.up = nn.Parameter(sample(base.out_features, 2, seed=22))

    @property
    def weight(self) -> Tensor:
        if not self.exposed:
            raise AttributeError("weight")
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return out


class Rounded(nn.Module):
    """Weights in 8 bits, and no `weight`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.detach().abs().amax(1, keepdim=True) / 7
        self.codes = (base.weight.detach() / self.scale).round().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) * self.scale).T


class Doubled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = super().__call__(x) + 0.5
        return out


class Negated(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return -1.5 * w


class Packed(Tensor):
    """A weight whose own numbers are not those that it stands for, as torchao's are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return nn.functional.linear(args[0], 3 * args[1].as_subclass(Tensor), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


def _biased(base: nn.Linear) -> nn.Module:
    twin = nn.Linear(base.in_features, base.out_features, dtype=base.weight.dtype)
    with torch.no_grad():
        twin.weight.copy_(base.weight)
        twin.bias.copy_(sample(base.out_features, seed=23))
    return twin


def _as(kind: type[nn.Linear], base: nn.Linear) -> nn.Module:
    twin = kind(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype)
    twin.load_state_dict(base.state_dict())
    return twin


def _hooked(base: nn.Linear) -> nn.Module:
    base.register_forward_hook(lambda module, args, out: out * 1.7)
    return base


def _hooked_before(base: nn.Linear) -> nn.Module:
    base.register_forward_pre_hook(lambda module, args: (args[0] * 1.7,))
    return base


def _wrapped_forward(base: nn.Linear) -> nn.Module:
    plain = base.forward
    base.forward = lambda x: plain(x) * 1.7  # type: ignore[method-assign]
    return base


def _packed(base: nn.Linear) -> nn.Module:
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Packed))
    return base


def _parametrized(base: nn.Linear) -> nn.Module:
    nn.utils.parametrize.register_parametrization(base, "weight", Negated())
    return base


def _curved(base: nn.Linear) -> nn.Module:
    return nn.Sequential(base, nn.Tanh())


REPLACED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "adapter": Adapter,
    "adapter without weight": lambda base: Adapter(base, exposed=False),
    "8 bits": Rounded,
    "subclass": lambda base: _as(Doubled, base),
    "subclass with a call of its own": lambda base: _as(Called, base),
    "bias": _biased,
    "forward hook": _hooked,
    "forward pre-hook": _hooked_before,
    "forward on the instance": _wrapped_forward,
    "weight of a subclass": _packed,
    "parametrization": _parametrized,
    "not linear": _curved,
}


def latent_layer(**options: Any) -> LatentAttention:
    sizes = {"kv_lora_rank": R, "qk_nope_head_dim": DN, "qk_rope_head_dim": DR, "v_head_dim": DV}
    torch.manual_seed(1)
    return LatentAttention(
        32, H, q_lora_rank=None, **{**sizes, "mask": qkv.causal(), "dtype": torch.float64, **options}
    ).eval()


def truth(layer: LatentAttention, x: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """Dense, materialised, by hand."""
    c, k_rope = layer.kv_a_proj_with_mqa(x).split([R, DR], -1)
    up = project(layer.kv_a_layernorm(c)).unflatten(-1, (H, DN + DV)).transpose(1, 2)
    q_nope, q_rope = layer.q_proj(x).unflatten(-1, (H, DN + DR)).transpose(1, 2).split([DN, DR], -1)
    turned = layer.rotary.rotate(q_rope) @ layer.rotary.rotate(k_rope[:, None]).mT
    s = (q_nope @ up[..., :DN].mT + turned) * (DN + DR) ** -0.5
    if layer.softcap is not None:
        s = layer.softcap * (s / layer.softcap).tanh()
    s = s.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
    out: Tensor = layer.o_proj((s.softmax(-1) @ up[..., DN:]).transpose(1, 2).flatten(2))
    return out


def over_a_cache(layer: LatentAttention, x: Tensor, *, ragged: bool, **options: Any) -> Tensor:
    """In steps of 4, 1 and 4 tokens; ragged: one sequence behind the other."""
    cache = LatentCache(
        rank=R, rope_dim=DR, dtype=torch.float64, debug=True, **(options or {"pages": 9, "page_size": 4})
    )
    seqs, outs = [cache.add() for _ in x], []
    with torch.inference_mode():
        if not ragged:
            for part in x.split([4, 1, 4], dim=1):
                outs.append(layer(part, cache=cache.step(seqs, T=part.shape[1]).layer(0)))
            return torch.cat(outs, dim=1)
        first, second = x
        rows: list[list[Tensor]] = [[], []]
        for a, b in ((4, 1), (0, 5), (5, 3)):
            at = [sum(len(r) for r in one) for one in rows]
            packed = torch.cat((first[at[0] : at[0] + a], second[at[1] : at[1] + b]))[None]
            got = layer(packed, cache=cache.step(seqs, lengths=[a, b]).layer(0))[0].split([a, b])
            for one, part in zip(rows, got, strict=True):
                one.append(part)
        return torch.stack([torch.cat(one) for one in rows])


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", REPLACED)
def test_every_form_of_latent_attention_calls_what_replaces_kv_b_proj(name: str, softcap: float | None) -> None:
    layer, x = latent_layer(softcap=softcap), sample(2, L, 32)
    plain = truth(layer, x, layer.kv_b_proj)
    layer.kv_b_proj = REPLACED[name](layer.kv_b_proj)
    want = truth(layer, x, layer.kv_b_proj)
    assert (want - plain).abs().max() > 0.05, "the replacement shows"
    for absorb in (False, True, None):
        layer.absorb = absorb
        close(layer(x), want)
        close(over_a_cache(layer, x, ragged=False), want)
    close(over_a_cache(layer, x, ragged=True), want)
    close(over_a_cache(layer, x, ragged=True, sequences=2), want)


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
def test_an_adapter_learns_in_both_forms(absorb: bool) -> None:
    """And its gradients are those of the dense definition."""
    layer, x = latent_layer(absorb=absorb), sample(2, L, 32).requires_grad_()
    adapter = layer.kv_b_proj = Adapter(layer.kv_b_proj)
    leaves, cotangent = [x, adapter.down, adapter.up, adapter.base.weight], sample(2, L, 32, seed=5)
    got = torch.autograd.grad(layer(x), leaves, cotangent)
    want = torch.autograd.grad(truth(layer, x, layer.kv_b_proj), leaves, cotangent)
    for g, w in zip(got, want, strict=True):
        assert w.abs().max() > 1e-3
        close(g, w, 20 * CLOSE)


def test_a_hook_sees_the_latents_of_the_tokens() -> None:
    """What is recorded for calibration is data, in every form."""
    layer, x, seen = latent_layer(absorb=True), sample(2, L, 32), []
    layer.kv_b_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    layer(x)
    assert len(seen) == 1
    close(seen[0], layer.latent(x)[:, 0, :, :R])
    over_a_cache(layer, x, ragged=False)
    close(seen[-1], layer.latent(x)[:, 0, :, :R])


@contextmanager
def _on_every_module(hook: Any) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_hook_on_every_module_counts_and_a_flop_counter_changes_nothing() -> None:
    layer, x = latent_layer(absorb=True), sample(2, L, 32)
    with _on_every_module(lambda module, args, out: out * 1.7 if module is layer.kv_b_proj else None):
        close(layer(x), truth(layer, x, lambda c: layer.kv_b_proj(c)))
    plain = layer(x)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(layer(x), plain)
    assert not any("kv_b_proj" in name for name in counter.get_flop_counts())


def test_a_plain_linear_is_absorbed_and_a_parametrized_weight_is_computed_once() -> None:
    layer, x, calls = latent_layer(absorb=True), sample(2, L, 32), []
    shapes: list[Any] = []
    own = qkv.nn.layer.attention
    counted = Negated()
    counted.register_forward_hook(lambda *_: calls.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qkv.nn.layer, "attention", lambda q, *rest, **o: shapes.append(q.shape) or own(q, *rest, **o))
        layer(x)
        nn.utils.parametrize.register_parametrization(layer.kv_b_proj, "weight", counted)
        calls.clear()
        layer(x)
    assert shapes == [(2, H, L, R + DR)] * 2
    assert len(calls) == 1


def test_dynamic_quantisation_of_a_layer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.ao.quantization.quantize_dynamic(
            latent_layer(dtype=torch.float32), {nn.Linear}, dtype=torch.qint8
        )
        x = sample(2, L, 32, dtype=torch.float32)
        layer.absorb = False
        want = layer(x)
        layer.absorb = True
        assert torch.equal(layer(x), want)


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (nn.Linear(R, H * (DN + DV) + 1, dtype=torch.float64), r"\(2, 9, 37\) torch\.float64 from Linear"),
        (nn.Sequential(nn.Linear(R, 36, dtype=torch.float64), nn.Flatten()), r"\(2, 324\) .* from Sequential"),
        (Rounded(nn.Linear(R, 36)), r"torch\.float32 from Rounded"),
        (nn.LSTM(R, 36, dtype=torch.float64), "a tuple from LSTM"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused_with_a_sentence(module: nn.Module, given: str) -> None:
    layer = latent_layer()
    if isinstance(module, Rounded):
        module.forward = lambda x: x.float() @ (module.codes.float() * module.scale).T  # type: ignore[method-assign]
    layer.kv_b_proj = module
    with pytest.raises(ShapeError, match=rf"kv_b_proj must give .*{given} for H=3, dn=5, dv=7"):
        layer(sample(2, L, 32))


@pytest.mark.parametrize("fullgraph", [True])
def test_a_compiled_layer_calls_its_adapter(fullgraph: bool) -> None:
    layer, x = latent_layer(absorb=True), sample(2, L, 32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=fullgraph)
    close(compiled(x), truth(layer, x, layer.kv_b_proj))
    layer.kv_b_proj = Adapter(layer.kv_b_proj)
    close(compiled(x), truth(layer, x, layer.kv_b_proj))


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")


@pytest.mark.parametrize("name", ["adapter without weight", "forward hook", "8 bits"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_attention_calls_what_replaces_a_projection(projection: str, name: str) -> None:
    """Against the layer whose weight is what the replacement stands for; over a cache as without one."""
    torch.manual_seed(2)
    layer = Attention(32, 4, num_kv_heads=2, gate=True, mask=qkv.causal(), dtype=torch.float64).eval()
    x, base = sample(2, L, 32), getattr(layer, projection)
    plain = layer(x)
    replacement = REPLACED[name](base)
    with torch.no_grad():
        weight = replacement(torch.eye(base.in_features, dtype=torch.float64)).T
    setattr(layer, projection, replacement)
    got = layer(x)
    cache = qkv.cache.PagedCache(pages=6, num_kv_heads=2, head_dim=8, dtype=torch.float64)
    seqs = [cache.add(), cache.add()]
    with torch.inference_mode():
        cached = [layer(part, cache=cache.step(seqs, T=part.shape[1]).layer(0)) for part in x.split([5, 4], 1)]
    merged = nn.Linear(base.in_features, base.out_features, bias=False, dtype=torch.float64)
    merged.weight.data.copy_(weight)
    setattr(layer, projection, merged)
    close(got, layer(x))
    close(torch.cat(cached, 1), layer(x))
    assert (got - plain).abs().max() > 1e-3


def test_the_decoder_calls_what_replaces_its_head() -> None:
    decoder = Decoder(Config(dim=16, heads=2, layers=1, context=8)).double()
    tokens = torch.arange(6)[None]
    plain = decoder(tokens)
    assert decoder.head is not None
    decoder.head = Adapter(decoder.head)
    before: list[Tensor] = []
    decoder.norm.register_forward_hook(lambda module, args, out: before.append(out))
    got = decoder(tokens)
    close(got, plain + before[0] @ decoder.head.down.T @ decoder.head.up.T)
