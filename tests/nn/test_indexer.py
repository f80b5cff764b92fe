"""Latent attention with an indexer: against its definition in float64, over caches, and in training."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv.cache import LatentCache
from qkv.errors import ArgumentError, ArgumentTypeError
from qkv.nn import Indexer, LatentAttention
from qkv.rotary import Rotary
from tests.kit.layers import CLOSE, close, sample, turn
from tests.nn.test_cache import fed, inputs, plans
from tests.nn.test_latent import SIZES, built as built_latent, definition

pytestmark = pytest.mark.usefixtures("one_thread")

TOP_K = 4


def built(
    seed: int = 0, top_k: int = TOP_K, interleaved: bool = False, dim: int = 24, **options: Any
) -> LatentAttention:
    """A float64 layer whose every parameter is random; the sizes of the indexer are like no other."""
    rank = options.get("q_lora_rank", SIZES["q_lora_rank"])
    made: dict[str, Any] = {"q_lora_rank": rank, "rope_dim": 4, "dtype": torch.float64}
    indexer = Indexer(dim, 5, 6, top_k, rotary=Rotary(4, 30.0, interleaved=interleaved), **made)
    return built_latent(dim, seed=seed, indexer=indexer, **{"rotary": Rotary(4, 30.0, interleaved=True), **options})


def index_definition(layer: LatentAttention, x: Tensor, p: Any = None) -> Tensor:
    """I (B, L, L): equation 1 of the paper, a query and a head at a time."""
    indexer: Any = layer.indexer
    w = dict(indexer.named_parameters())
    H, D, L = indexer.num_heads, indexer.head_dim, x.shape[1]
    scores = torch.zeros(len(x), L, L, dtype=torch.float64)
    for b, row in enumerate(x):
        at = range(L) if p is None else p[b]
        c = row
        if layer.q_lora_rank is not None:
            c = row @ layer.q_a_proj.weight.T
            c = c / ((c * c).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.q_a_layernorm.weight
        k = row @ w["wk.weight"].T
        k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        k = k * w["k_norm.weight"] + w["k_norm.bias"]
        k = torch.cat((turn(k[:, :4], indexer.rotary, at), k[:, 4:]), -1)
        for h in range(H):
            q = c @ w["wq_b.weight"][h * D : (h + 1) * D].T
            q = torch.cat((turn(q[:, :4], indexer.rotary, at), q[:, 4:]), -1)
            for t in range(L):
                weight = row[t] @ w["weights_proj.weight"][h] / (H * D) ** 0.5
                scores[b, t] += weight * torch.stack([(q[t] @ k[s]).clamp(min=0) for s in range(L)])
    return scores


def chosen(scores: Tensor, seen: Tensor, top_k: int = TOP_K) -> Tensor:
    """Of the keys seen (B, L, L) the top_k of largest scores, of equal ones the first."""
    found = torch.zeros_like(seen)
    for b, rows in enumerate(seen.tolist()):
        for t, row in enumerate(rows):
            keys = [s for s, shown in enumerate(row) if shown]
            found[b, t, sorted(keys, key=lambda s, b=b, t=t: (-float(scores[b, t, s]), s))[:top_k]] = True  # type: ignore[misc]
    return found


CAUSAL = torch.ones(2, 12, 12, dtype=torch.bool).tril()


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
@pytest.mark.parametrize("options", [{}, {"q_lora_rank": None}, {"interleaved": True, "softcap": 3.0}], ids=str)
def test_the_definition(options: dict[str, Any], absorb: bool) -> None:
    """Outputs, and the gradients of x and every parameter but the indexer's, which has none."""
    layer, x = built(mask=qkv.causal(), absorb=absorb, **options), sample(2, 12, 24, seed=3).requires_grad_()
    with torch.no_grad():
        seen = chosen(index_definition(layer, x), CAUSAL)
    got, want = layer(x), definition(layer, x, seen)
    close(got, want)
    assert (want - definition(layer, x, CAUSAL)).abs().max() > 1e-2  # to attend to everything shows
    own = {n: p for n, p in layer.named_parameters() if not n.startswith("indexer.")}
    leaves, cotangent = [x, *own.values()], sample(*got.shape, seed=9)
    for n, g, w in zip(
        ["x", *own],
        torch.autograd.grad(got, leaves, cotangent, retain_graph=True),
        torch.autograd.grad(want, leaves, cotangent),
        strict=True,
    ):
        assert w.abs().max() > 1e-6, f"{n} is not tested"
        close(g, w, 50 * CLOSE)
    assert layer.indexer is not None
    none = torch.autograd.grad(got, list(layer.indexer.parameters()), cotangent, allow_unused=True)
    assert not any(g is not None for g in none)


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
def test_masks_and_positions(absorb: bool) -> None:
    """A token chooses among what masks show, so it chooses others; rotary stands elsewhere than the mask."""
    layer, x = built(absorb=absorb, mask=qkv.causal()), sample(2, 12, 24, seed=4)
    own = torch.stack((torch.arange(12) * 3, torch.arange(12) + 40))
    with torch.no_grad():
        scores = index_definition(layer, x, own.tolist())
        seen = chosen(scores, CAUSAL & qkv.padding([12, 5]).tensor(12, 12, B=2)[:, 0])
        close(layer(x, mask=qkv.padding([12, 5]), positions=own), definition(layer, x, seen, own.tolist()), 1e-11)
        heads = qkv.per_head([qkv.prefix(7), qkv.sliding_window(6), qkv.causal()])
        _, mask = layer(x, mask=heads, positions=own, return_mask=True)
        for h, shown in enumerate(heads.tensor(12, 12, B=2, Hq=3).unbind(1)):
            assert torch.equal(mask.tensor(12, 12, B=2, Hq=3)[:, h], chosen(scores, shown & CAUSAL))


def test_scores_are_the_definition_and_learn() -> None:
    layer, x = built(mask=qkv.causal()), sample(2, 12, 24, seed=5)
    want = index_definition(layer, x)
    c = layer.query_latent(x).detach()
    rows, keys = [3, 11], torch.tensor([[[0, 2, -1], [11, 4, 7]]])
    assert layer.indexer is not None
    close(layer.indexer.scores(x, c), want.detach())
    close(layer.indexer.scores(x, c, rows=rows), want[:, rows].detach())
    got = layer.indexer.scores(x, c, rows=rows, keys=keys, mask=qkv.causal())
    assert torch.equal(got == -torch.inf, (keys < 0).expand(2, -1, -1))
    parameters = list(layer.indexer.parameters())
    shown = want[:, rows].gather(2, keys.clamp(min=0).expand(2, -1, -1)).masked_fill(keys < 0, 0)
    cotangent = sample(*shown.shape, seed=2)
    pairs = zip(
        torch.autograd.grad(got.masked_fill(keys < 0, 0), parameters, cotangent),
        torch.autograd.grad(shown, parameters, cotangent),
        strict=True,
    )
    for g, w in pairs:
        assert w.abs().max() > 1e-4
        close(g, w, 50 * CLOSE)


def probabilities(layer: LatentAttention, x: Tensor, seen: Tensor) -> Tensor:
    """The mean over heads of attention's own, (B, L, L): 0 where hidden."""
    w, R, dn, dr = dict(layer.named_parameters()), layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_rope_head_dim
    found = torch.zeros(seen.shape, dtype=torch.float64)
    for b, row in enumerate(x):
        c = row @ w["q_a_proj.weight"].T
        c = c / ((c * c).mean(-1, keepdim=True) + 1e-6).sqrt() * w["q_a_layernorm.weight"]
        kv = row @ w["kv_a_proj_with_mqa.weight"].T
        latent = kv[:, :R] / ((kv[:, :R] ** 2).mean(-1, keepdim=True) + 1e-6).sqrt() * w["kv_a_layernorm.weight"]
        turned = turn(kv[:, R:], layer.rotary, range(len(row)))
        for h in range(layer.num_heads):
            q = c @ w["q_b_proj.weight"][h * (dn + dr) : (h + 1) * (dn + dr)].T
            k = latent @ w["kv_b_proj.weight"][h * (dn + layer.v_head_dim) :][:dn].T
            s = q[:, :dn] @ k.T + turn(q[:, dn:], layer.rotary, range(len(row))) @ turned.T
            p = (s / (dn + dr) ** 0.5).masked_fill(~seen[b], -torch.inf).softmax(-1)
            found[b] += p.nan_to_num(0.0) / layer.num_heads
    return found


@pytest.mark.parametrize("full", [False, True])
def test_the_loss_of_the_indexer(full: bool) -> None:
    """Its value and its gradients, which are the indexer's alone; rows; and a row that sees nothing counts 0."""
    layer, x = built(mask=qkv.causal() & qkv.padding([12, 0])), sample(2, 12, 24, seed=6).requires_grad_()
    shown = CAUSAL & qkv.padding([12, 0]).tensor(12, 12, B=2)[:, 0]
    scores = index_definition(layer, x.detach())
    seen = shown if full else chosen(scores.detach(), shown)
    p = probabilities(layer, x.detach(), seen).detach()
    log = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
    far = torch.where(p > 0, p * (p.log() - log), 0.0).sum(-1)
    for rows in (None, [2, 11]):
        got, want = layer.index_loss(x, full=full, rows=rows), (far if rows is None else far[:, rows]).mean()
        close(got, want.detach(), 1e-10)
        assert want > 0.01
        assert layer.indexer is not None
        parameters = list(layer.indexer.parameters())
        others = [x, *(p for n, p in layer.named_parameters() if not n.startswith("indexer."))]
        assert not any(g is not None for g in torch.autograd.grad(got, others, allow_unused=True, retain_graph=True))
        pairs = zip(
            torch.autograd.grad(got, parameters),
            torch.autograd.grad(want, parameters, retain_graph=True),
            strict=True,
        )
        for g, w in pairs:
            assert g.isfinite().all()
            close(g, w, 1e-9)
    with pytest.raises(ArgumentError, match="indexer=qkv"):
        built_latent(24).index_loss(x)


# -------------------------------------------------------------------------------------------------------------- caches
CACHES: dict[str, dict[str, Any]] = {
    "pages of 5": {"pages": 60, "page_size": 5, "debug": True},
    "pages of 1": {"pages": 200, "page_size": 1, "debug": True},
    "dense": {"sequences": 4, "capacity": 40, "debug": True},
    "dense, growing": {"sequences": 4},
}


def made(kind: str, layer: LatentAttention, **more: Any) -> Any:
    sizes = {"rank": layer.kv_lora_rank, "rope_dim": layer.qk_rope_head_dim, "index_dim": 6, "dtype": torch.float64}
    return LatentCache(**{**sizes, **CACHES[kind], **more})


@pytest.mark.parametrize("plan", plans())
@pytest.mark.parametrize("kind", CACHES)
def test_every_cache_and_every_cut(kind: str, plan: str) -> None:
    layer, xs = built(mask=qkv.causal()), inputs(dim=24)
    cache = made(kind, layer)
    got = fed(layer, cache, [cache.add() for _ in xs], xs, plans()[plan])
    for one, x in zip(got, xs, strict=True):
        close(one, layer(x[None])[0], 1e-11)


def test_a_replaced_kv_b_proj_over_a_cache() -> None:
    """All heads are materialised then: what was chosen is the same."""

    class Same(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            return found

    layer, xs = built(mask=qkv.causal()), inputs(dim=24)
    want = [layer(x[None])[0] for x in xs]
    layer.kv_b_proj = Same(layer.kv_b_proj)  # type: ignore[assignment]
    cache = made("pages of 5", layer)
    for one, x in zip(fed(layer, cache, [cache.add() for _ in xs], xs, plans()["ragged"]), want, strict=True):
        close(one, x, 1e-11)


def test_forks_truncation_and_swaps_take_index_keys_along() -> None:
    layer = built(mask=qkv.causal())
    cache, x, other = made("pages of 5", layer), inputs(dim=24)[0], sample(31, 24, seed=8)
    seq = cache.add()
    fed(layer, cache, [seq], [x[:22]], [(22,)])
    cache.truncate(seq, 13)
    twin = cache.fork(seq)
    first = fed(layer, cache, [seq, twin], [x[13:19], other[13:19]], [(1, 1), (0, 2), (5, 3)])
    cache.swap_out(twin)
    late = fed(layer, cache, [seq], [x[19:31]], [(12,)])
    cache.swap_in(twin)
    later = fed(layer, cache, [twin], [other[19:31]], [(7,), (5,)])
    mixed = torch.cat((x[:13], other[13:]))
    close(torch.cat((first[0], late[0])), layer(x[None, :31])[0, 13:], 1e-11)
    close(torch.cat((first[1], later[0])), layer(mixed[None])[0, 13:], 1e-11)


# ------------------------------------------------------------------------------------------------------ as a module
def test_names_copies_and_the_meta_device() -> None:
    layer, x = built(mask=qkv.causal()), sample(2, 12, 24)
    shapes = {"wq_b.weight": (30, 14), "wk.weight": (6, 24), "k_norm.weight": (6,), "k_norm.bias": (6,)}
    shapes["weights_proj.weight"] = (5, 24)
    assert layer.indexer is not None
    assert {n: tuple(p.shape) for n, p in layer.indexer.named_parameters()} == shapes
    want = layer(x)
    fresh = built(seed=1, mask=qkv.causal())
    assert not torch.equal(fresh(x), want)
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(twin(x), want)
    assert "top_k" not in repr(LatentAttention(24, 3, **SIZES))
    assert "24, 5, 6, 4, q_lora_rank=14, rope_dim=4, rotary=Rotary(dim=4, base=30.0" in repr(layer.indexer)
    empty = Indexer(24, 5, 6, 4, q_lora_rank=None, rope_dim=4, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert all(p.isfinite().all() for p in empty.parameters())
    assert torch.equal(empty.k_norm.weight, torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    """What is chosen is rounded in half precision: finite, of its dtype, and over a cache as without."""
    layer, x = built(mask=qkv.causal()).to(dtype), sample(1, 12, 24, dtype=dtype)
    cache = made("pages of 5", layer, dtype=dtype)
    with torch.inference_mode():
        want, seqs = layer(x), [cache.add()]
        got = torch.cat([layer(part, cache=cache.step(seqs, T=4).layer(0)) for part in x.split(4, dim=1)], 1)
    assert want.dtype == got.dtype == dtype
    assert got.isfinite().all()
    if dtype == torch.float32:
        close(got, want, 1e-5)
        cache = made("pages of 5", layer, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert layer(x, cache=cache.step([cache.add()], T=12).layer(0)).dtype == torch.bfloat16


def test_compiled_it_stays_a_call_of_its_own() -> None:
    """What is chosen depends on data: the layer runs as it is inside of a compiled model."""
    torch._dynamo.reset()
    layer, x = built(mask=qkv.causal()), sample(2, 12, 24)
    compiled = torch.compile(lambda z: layer(z) * 2, backend="eager")
    with torch.no_grad():
        close(compiled(x), layer(x) * 2)


def test_what_does_not_fit_is_refused() -> None:
    indexer = Indexer(24, 5, 6, 4, q_lora_rank=14, rope_dim=4)
    with pytest.raises(ArgumentTypeError, match=r"must be a qkv\.nn\.Indexer"):
        LatentAttention(24, 3, **SIZES, indexer=4)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="the dim and the q_lora_rank of its layer"):
        LatentAttention(24, 3, **{**SIZES, "q_lora_rank": None}, indexer=indexer)
    with pytest.raises(ArgumentError, match="rope_dim must be an integer <= 6"):
        Indexer(24, 5, 6, 4, q_lora_rank=14, rope_dim=8)
    with pytest.raises(ArgumentError, match="rotary must turn rope_dim numbers"):
        Indexer(24, 5, 6, 4, q_lora_rank=14, rope_dim=4, rotary=Rotary(6))
    with pytest.raises(ArgumentTypeError, match="must be a Rotary"):
        Indexer(24, 5, 6, 4, q_lora_rank=14, rope_dim=4, rotary=10000.0)  # type: ignore[arg-type]
    layer = built(mask=qkv.causal())
    cache = made("pages of 5", layer, index_dim=0)
    seq, x = cache.add(), sample(1, 3, 24)
    with torch.inference_mode(), pytest.raises(ArgumentError, match="only a cache with index_dim="):
        layer(x, cache=cache.step([seq], T=3).layer(0))
    assert (seq.length, cache.stats().pages_used) == (0, 0)
    plain = built_latent(24)
    held = made("pages of 5", layer)
    with torch.inference_mode(), pytest.raises(ArgumentError, match="in every step"):
        plain(x, cache=held.step([held.add()], T=3).layer(0))
