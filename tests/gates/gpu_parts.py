"""What else of qkv is asked on a device: each part yields what it tried and, where that failed, the fault."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import qkv
import qkv.compat
import qkv.nn
from qkv.cache import DenseCache, LatentCache, PagedCache, RingCache
from qkv.call.problem import Options
from qkv.call.statistics import Wanted
from qkv.lm.decoder import KINDS, Config, Decoder
from qkv.observation import observe
from qkv.rotary import Rotary
from tests.kit.cases import DTYPES
from tests.kit.device import moved
from tests.kit.generator import random_config
from tests.kit.inputs import materialise
from tests.kit.layers import LAYERS, built
from tests.kit.statistics_truth import Truth, faults

Found = Iterator[tuple[str, str]]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _drawn(device: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers on every device."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(device, dtype)


def _off(got: Tensor, want: Tensor, tolerance: float) -> str:
    """The fault if two results are further apart than rounding explains."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if not torch.equal(got.isnan(), want.isnan()) or not torch.equal(got.isinf(), want.isinf()):
        return "NaN or infinity at another place"
    apart = (got - want)[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    allowed = tolerance * (1 + want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0)
    return "" if apart <= allowed else f"off by {apart:.3g}, allowed {allowed:.3g}"


def merging(device: str) -> Found:
    """Parts over disjoint keys, dead rows among them, against the whole."""
    for dtype in _DTYPES:
        q, k, v = (_drawn(device, 2, 3, 40, 16, seed=n, dtype=dtype) for n in range(3))
        whole = qkv.attention(q, k, v, qkv.causal(), return_lse=True)
        parts = [
            qkv.attention(q, k[:, :, s], v[:, :, s], qkv.causal(), positions=-s.start, return_lse=True)
            for s in (slice(0, 17), slice(17, 40))
        ]
        found = qkv.merge(*parts[0], *parts[1])
        eps = torch.finfo(dtype).eps
        yield f"merge {dtype}", _off(found.out, whole.out, 8 * eps) or _off(found.lse, whole.lse, 1e-6)


def weights(device: str) -> Found:
    """Probabilities of chosen rows and heads against those on the CPU."""
    masks = {"none": None, "causal": qkv.causal(), "window": qkv.sliding_window(5) | qkv.prefix(2)}
    for name, mask in masks.items():
        for dtype in _DTYPES:
            q, k = _drawn("cpu", 2, 4, 33, 16, dtype=dtype), _drawn("cpu", 2, 2, 33, 16, seed=1, dtype=dtype)
            options: dict[str, Any] = {"mask": mask, "rows": [0, 7, -1], "heads": [0, 3], "softcap": 9.0}
            want = qkv.weights(q, k, **options)
            yield f"weights {name} {dtype}", _off(qkv.weights(q.to(device), k.to(device), **options), want, 1e-6)


def plans(device: str) -> Found:
    """The plan of a call on the device names a backend that takes it, says why not the others, and prints."""
    q = _drawn(device, 1, 4, 64, 32, dtype=torch.float32)
    for name, options in {
        "plain": {}, "causal": {"mask": qkv.causal()}, "lse": {"return_lse": True}, "softcap": {"softcap": 5.0},
        "window": {"mask": qkv.sliding_window(7)}, "sinks": {"sinks": torch.zeros(4, device=device)},
    }.items():  # fmt: skip
        plan = qkv.plan(q, q, q, **options)
        refused = dict(plan.refused)
        fault = "" if str(plan) and plan.backend in ("tiled", "sdpa", "cpu") else f"it names {plan.backend}"
        if not fault and device != "cpu" and f"tensors are on {q.device.type}" != refused["cpu"]:
            fault = f"it does not say why the CPU kernels do not run: {refused}"
        yield f"plan {name}: {plan.backend}", fault


def layers(device: str) -> Found:
    """Layers in float64 on the device and on the CPU: outputs and the gradients of every parameter."""
    latent = qkv.nn.LatentAttention(
        32, 4, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        mask=qkv.causal(), dtype=torch.float64,
    )  # fmt: skip
    made: dict[str, nn.Module] = {name: built(32, 4, mask=qkv.causal(), **given) for name, given in LAYERS.items()}
    made |= {"latent": latent, "absorbed latent": copy.deepcopy(latent)}
    made["absorbed latent"].absorb = True  # type: ignore[assignment]
    x = _drawn("cpu", 2, 21, 32)
    for name, layer in made.items():
        results = []
        for where in ("cpu", device):
            mine = copy.deepcopy(layer).to(where)
            out = mine(x.to(where))
            results.append([out, *torch.autograd.grad(out.square().sum(), list(mine.parameters()), allow_unused=True)])
        faults = [_off(b, a, 1e-10) for a, b in zip(*results, strict=True) if a is not None]
        yield f"layer {name}", next(filter(None, faults), "")
    mine = qkv.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    pairs = [copy.deepcopy(mine).to(where)(*[x.to(where)] * 3) for where in ("cpu", device)]
    faults = [_off(b, a, 1e-10) for a, b in zip(*pairs, strict=True) if a is not None]
    yield "layer MultiheadAttention", next(filter(None, faults), "")


def caches(device: str) -> Found:
    """A sequence fed in steps through each kind of cache, against the layer on the whole of it."""
    kinds: dict[str, Callable[..., Any]] = {
        "dense": lambda **size: DenseCache(sequences=2, capacity=40, **size),
        "ring": lambda **size: RingCache(sequences=2, window=6, chunk=40, page_size=4, **size),
        "pages": lambda **size: PagedCache(pages=20, page_size=4, **size),
    }
    x = _drawn(device, 2, 30, 32)
    for name, make in kinds.items():
        mask = qkv.sliding_window(6) if name == "ring" else qkv.causal()
        layer = built(32, 4, num_kv_heads=2, rotary=Rotary(8, 50.0), mask=mask).to(device)
        cache = make(num_kv_heads=2, head_dim=8, dtype=torch.float64, device=device)
        yield f"cache {name}", _stepped(layer, cache, x)
    latent = qkv.nn.LatentAttention(
        32, 4, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        mask=qkv.causal(), dtype=torch.float64,
    ).to(device)  # fmt: skip
    cache = LatentCache(rank=8, rope_dim=4, pages=20, page_size=4, dtype=torch.float64, device=device)
    yield "cache latent", _stepped(latent, cache, x)


def _stepped(layer: nn.Module, cache: Any, x: Tensor) -> str:
    seqs, parts = [cache.add() for _ in x], []
    with torch.inference_mode():
        for part in x.split([17, 1, 1, 8, 3], 1):
            parts.append(layer(part, cache=cache.step(seqs, T=part.shape[1]).layer(0)))
        return _off(torch.cat(parts, 1), layer(x), 1e-10)


def drop_ins(device: str) -> Found:
    """`qkv.compat.sdpa` against PyTorch's function, and its layers inside of `patch_sdpa`."""
    q, k, v = (_drawn(device, 2, 4, 20, 16, seed=n, dtype=torch.float32) for n in range(3))
    some = _drawn(device, 20, 20, seed=5) > -0.5
    some[:, 0] = True
    for name, options in {
        "plain": {}, "causal": {"is_causal": True}, "mask": {"attn_mask": some}, "scale": {"scale": 0.3},
        "bias": {"attn_mask": _drawn(device, 20, 20, seed=6, dtype=torch.float32)},
    }.items():  # fmt: skip
        want = nn.functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
        yield f"sdpa {name}", _off(qkv.compat.sdpa(q, k, v, **options), want, 1e-5)  # type: ignore[arg-type]
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True).to(device).eval()
    x = _drawn(device, 2, 10, 32, dtype=torch.float32)
    with torch.no_grad():
        want = layer(x)
        with qkv.compat.patch_sdpa() as patched:
            found = layer(x)
    fault = "" if sum(patched.calls.values()) == 1 else f"counted {patched.calls}"
    yield "patched encoder layer", fault or _off(found, want, 1e-4)


def derivatives(device: str) -> Found:
    """Second derivatives, forward mode and torch.vmap, against the definition on the CPU."""
    q, k, v = (_drawn("cpu", 2, 2, 9, 8, seed=n) for n in range(3))

    def loss(where: str, backend: str | None) -> list[Tensor]:
        leaves = [t.to(where).detach().requires_grad_() for t in (q, k, v)]
        out = qkv.attention(*leaves, mask=qkv.causal(), backend=backend)
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    want = loss("cpu", "reference")
    faults = [_off(b, a, 1e-10) for a, b in zip(want, loss(device, None), strict=True)]
    yield "second derivatives", next(filter(None, faults), "")

    def call(*tensors: Tensor) -> Tensor:
        return qkv.attention(*tensors, mask=qkv.causal())

    results = []
    for where in ("cpu", device):
        x = tuple(t.to(where) for t in (q, k, v))
        mapped = torch.vmap(call)(*(t.unsqueeze(1) for t in x))
        results.append([*torch.func.jvp(call, x, tuple(t.flip(2) for t in x)), mapped])
    faults = [_off(b, a, 1e-10) for a, b in zip(*results, strict=True)]
    yield "forward mode, vmap", next(filter(None, faults), "")


def compiled(device: str) -> Found:
    """One call under torch.compile, forward and backward, as one node: the bits are those without it."""
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [_drawn(device, 2, 4, 48, 32, seed=n, dtype=dtype).requires_grad_() for n in range(3)]

        def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return tuple(qkv.attention(q, k, v, qkv.sliding_window(9), return_lse=True, softcap=20.0))

        plain = step(*leaves)
        want = [*plain, *torch.autograd.grad(plain[0].float().square().sum(), leaves)]
        for tool in ("aot_eager", "inductor"):
            torch._dynamo.reset()
            try:
                out = torch.compile(step, backend=tool, fullgraph=True)(*leaves)
                found = [*out, *torch.autograd.grad(out[0].float().square().sum(), leaves)]
            except Exception as error:  # inductor wants a C compiler, which a machine may lack
                text = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                lacking = tool == "inductor" and ("compiler" in text.lower() or "gcc" in text.lower())
                yield f"compile {tool} {dtype}{': NOT TRIED, ' + text if lacking else ''}", "" if lacking else text
                continue
            same = all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
            close = next(filter(None, (_off(b, a, 1e-2) for a, b in zip(want, found, strict=True))), "")
            yield f"compile {tool} {dtype}", "" if same else f"other bits {close}"


def models(device: str) -> Found:
    """The example decoder of every kind, and a model of transformers where that is installed."""
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        model = Decoder(Config(attention=kind, dim=64, layers=2, heads=4, window=16)).double()
        want = model(tokens)
        yield f"decoder {kind}", _off(model.to(device)(tokens.to(device)), want, 1e-9)
    if importlib.util.find_spec("transformers") is None:
        yield "transformers: NOT TRIED, it is not installed", ""
        return
    from tests.kit import hf_models as hf

    for name in ("llama", "gemma2", "bert"):
        model, ids = copy.deepcopy(hf.build(name)).to(device), hf.tokens().to(device)
        mask = hf.padded("right")
        with torch.no_grad():
            want = hf.real_rows(model, mask, hf.logits(model, ids, mask.to(device)))  # type: ignore[union-attr]
            with hf.running(model, "qkv"):
                found = hf.real_rows(model, mask, hf.logits(model, ids, mask.to(device)))  # type: ignore[union-attr]
        yield f"transformers {name}", _off(found, want, 1e-5)


def observing(device: str) -> Found:
    """Statistics of generated calls against the oracle, and the bits of the call that is looked at."""
    wanted = Wanted(top=3, mass=True, bins=(3, 4), distance=True)
    names = ("positions", "bias", "scale", "softcap", "sinks", "dropout_p")
    for seed in range(60):
        config = random_config(seed)
        here = materialise(config)
        given = moved(here, device).call() | {"dropout_p": 0.0}  # statistics are those before dropout
        options = Options(**{name: given[name] for name in names if name in given})
        wanted = wanted._replace(bins=(min(3, config.Lq), min(4, config.Lk)))
        for backend in (None, "tiled"):
            torch.manual_seed(seed)
            plain = qkv.attention(**given, backend=backend)
            torch.manual_seed(seed)
            found = observe("qkv.see()", *(given.get(n) for n in ("q", "k", "v", "mask")), options, backend, wanted)
            wrong = faults(Truth.of(here.oracle), found.statistics, wanted, DTYPES[config.dtype])
            if not torch.equal(plain.nan_to_num(7.0), found.out.nan_to_num(7.0)):
                wrong = ["looking has changed the output"]
            yield f"observe {seed} {backend or 'by default'}", "; ".join(wrong)


def watching(device: str) -> Found:
    """Three steps of training, watched and not, to the bit; and the numbers beside those of a model on the CPU."""
    torch_layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    made: dict[str, tuple[nn.Module, Tensor]] = {
        kind: (Decoder(Config(attention=kind, dim=64, layers=2, heads=4, window=16)), torch.randint(256, (2, 40)))
        for kind in KINDS
    }
    made["TransformerEncoder"] = (nn.TransformerEncoder(torch_layer, 2), _drawn("cpu", 2, 40, 64, dtype=torch.float32))
    for name, (model, x) in made.items():
        for mode in ("training", "evaluation", "autocast"):
            found = [_trained(model, x.to(device), device, mode, watched) for watched in (False, True)]
            same = all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
            w, lines = found[1][1], found[1][1].lines
            fault = "" if same else "watching has changed bits"
            fault = fault or "; ".join([*w.errors, *w.not_seen]) or ("" if len(lines) == 6 else f"{len(lines)} lines")
            if not fault and mode != "autocast":
                for line, other in zip(lines, _trained(model, x, "cpu", mode, True)[1].lines, strict=True):
                    for key in ("entropy", "logit", "weight", "first", "away"):
                        one, two = (torch.tensor(r[key], dtype=torch.float64) for r in (line, other))
                        fault = fault or _off(one, two, 2e-2)  # weights of several steps have been rounded otherwise
            yield f"watch {name} {mode}", fault


def _trained(model: nn.Module, x: Tensor, device: str, mode: str, watched: bool) -> tuple[list[Tensor], qkv.watch]:
    mine = copy.deepcopy(model).to(device).train(mode != "evaluation")
    optimizer, found = torch.optim.SGD(mine.parameters(), lr=1e-3), []
    w = qkv.watch(mine)
    if watched:
        w.start()
    for _ in range(3):
        with (
            torch.autocast(torch.device(device).type, enabled=mode == "autocast", dtype=torch.bfloat16),
            torch.set_grad_enabled(mode != "evaluation"),
        ):
            out = mine(x)
        found.append(out.detach())
        if mode != "evaluation":
            optimizer.zero_grad()
            out.float().square().mean().backward()
            optimizer.step()
    w.stop()
    return [*found, *(p.detach() for p in mine.parameters())], w


def large(device: str) -> Found:
    """Keys past the 2**31st element of a tensor, against a blockwise float64."""
    Lk, D = (1 << 25) + 1000, 64
    shape = (1, 1, Lk, D)
    k, v = (torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    rng = torch.Generator(device).manual_seed(0)
    for x in (k, v):
        for part in x.split(1 << 22, 2):
            part.normal_(generator=rng)
    q = 2 * torch.randn(1, 2, 3, D, dtype=torch.bfloat16, device=device, generator=rng)
    k[0, 0, -1] = 3 * q[0, 0, 0]  # a needle in the last place
    top = torch.full((1, 2, 3, 1), -torch.inf, dtype=torch.float64, device=device)
    total, acc = torch.zeros_like(top), torch.zeros(1, 2, 3, D, dtype=torch.float64, device=device)
    for a, b in zip(k.split(1 << 20, 2), v.split(1 << 20, 2), strict=True):
        s = q.double() @ a.double().transpose(-1, -2) * D**-0.5
        higher = torch.maximum(top, s.amax(-1, keepdim=True))
        e = torch.exp(s - higher)
        total = total * torch.exp(top - higher) + e.sum(-1, keepdim=True)
        acc, top = acc * torch.exp(top - higher) + e @ b.double(), higher
    for backend in ("tiled", "sdpa", None):
        out = qkv.attention(q, k, v, backend=backend)
        yield f"past 2**31 elements, {backend or 'by default'}", _off(out, acc / total, 2 * torch.finfo(out.dtype).eps)
    last = qkv.attention(q, k, v, qkv.sliding_window(300), positions="end")
    want = qkv.attention(q, k[:, :, -302:].clone(), v[:, :, -302:].clone(), qkv.sliding_window(300), positions="end")
    yield "the last keys past 2**31", _off(last, want, 2 * torch.finfo(last.dtype).eps)


PARTS: dict[str, Callable[[str], Found]] = {
    "merge": merging, "weights": weights, "plan": plans, "layers": layers, "caches": caches, "drop-ins": drop_ins,
    "derivatives": derivatives, "compile": compiled, "models": models, "observe": observing, "watch": watching,
}  # fmt: skip
