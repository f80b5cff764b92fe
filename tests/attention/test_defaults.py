"""A program's default device and dtype: no tensor that the library makes follows them, but where a user asks for it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.rotary import Llama3, Rotary

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = Path(qkv.__file__).parent
# torch functions that make a tensor from no tensor, and whether a number's dtype would follow the default.
MAKERS = {
    "arange": False, "as_tensor": True, "asarray": True, "empty": True, "empty_strided": True, "eye": True,
    "full": True, "linspace": True, "logspace": True, "normal": True, "ones": True, "rand": True, "randint": False,
    "randn": True, "randperm": False, "scalar_tensor": True, "tensor": True, "tril_indices": False,
    "triu_indices": False, "zeros": True,
}  # fmt: skip


def _makers(path: Path) -> list[tuple[int, str, set[str | None]]]:
    """Every call of a maker in a file: its line, its name, its keywords (None is **)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(made := node.func, ast.Attribute):
            continue
        if isinstance(made.value, ast.Name) and made.value.id == "torch" and made.attr in MAKERS:
            found.append((node.lineno, made.attr, {keyword.arg for keyword in node.keywords}))
    return found


# The commands are programs of their own; why() runs its experiments on the CPU, whatever the default is.
FILES = sorted(p.relative_to(SOURCE).as_posix() for p in SOURCE.rglob("*.py"))
FILES = [name for name in FILES if not name.startswith(("cli/", "bench/", "lm/"))]


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_that_is_made_says_its_device_and_dtype(name: str) -> None:
    """Rows of a table, a mask's numbers and a step's positions belong to the host; the rest where its inputs are."""
    for line, maker, given in _makers(SOURCE / name):
        if not name.startswith("insight/experiments/"):
            assert {"device", None} & given, f"{name}:{line}: torch.{maker}() would follow the default device"
        if MAKERS[maker]:
            assert {"dtype", None} & given, f"{name}:{line}: torch.{maker}() would follow the default dtype"


def sample(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float32, device="cpu", generator=generator)


Q, K, V, X = sample(2, 4, 12, 8), sample(2, 2, 12, 8), sample(2, 2, 12, 7), sample(2, 12, 32)
IDS, SEEN = torch.tensor([[0] * 5 + [1] * 7] * 2), torch.ones(12, 12).tril().bool()
TABLE, BUCKETS, MAP = sample(4, 7), sample(4, 8), torch.tensor([[True, False], [True, True]])
LISTS = torch.tensor([[0, 2], [3, -1], [1, 1]])[None, None]


def _layers() -> tuple[Any, Any, Any]:
    causal, turn = qkv.causal(), Rotary(8, scaling=Llama3(8.0, 64))
    torch.manual_seed(0)
    attention = qkv.nn.Attention(32, 4, num_kv_heads=2, rotary=turn, qk_norm=True, mask=causal)
    latent = qkv.nn.LatentAttention(
        32, 2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, mask=causal
    )
    multihead = qkv.nn.MultiheadAttention(32, 4, batch_first=True)
    return attention.requires_grad_(False), latent.requires_grad_(False), multihead.requires_grad_(False)


ATTENTION, LATENT, MULTIHEAD = _layers()


def attend(*args: Any, **options: Any) -> Tensor:
    out: Tensor = qkv.attention(Q, K, V, *args, **options)
    return out


def pages() -> Tensor:
    """Appending, a ragged step, swapping and a fork."""
    cache = qkv.cache.PagedCache(pages=12, page_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    seqs = [cache.add(tokens=list(range(6))), cache.add()]
    first = ATTENTION(X[:1, :6], cache=cache.step(seqs[:1], T=6).layer(0))
    both = ATTENTION(X[:1, :9], cache=cache.step(seqs, lengths=[4, 5]).layer(0))
    cache.swap_out(seqs[0])
    cache.swap_in(seqs[0])
    twin = cache.fork(seqs[0])
    return torch.cat((first, both, ATTENTION(X[:1, :1], cache=cache.step([twin], T=1).layer(0))), 1)


def latents(adapted: bool = False) -> Tensor:
    cache = qkv.cache.LatentCache(rank=8, rope_dim=4, pages=8, dtype=torch.float32)
    seqs = [cache.add(), cache.add()]
    hook = LATENT.kv_b_proj.register_forward_hook(lambda module, args, out: out) if adapted else None
    parts = [LATENT(part, cache=cache.step(seqs, T=part.shape[1]).layer(0)) for part in X.split([7, 1, 4], 1)]
    if hook is not None:
        hook.remove()
    return torch.cat(parts, 1)


def ring() -> Tensor:
    cache = qkv.cache.RingCache(sequences=1, window=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    seq, outs = cache.add(), []
    for i in range(9):
        cache.append([seq], K[:1, :, i : i + 1], K[:1, :, i : i + 1])
        outs.append(qkv.attention(Q[:1, :, i : i + 1], cache.view([seq]), mask=qkv.sliding_window(4)))
    return torch.cat(outs, 2)


def stored(table: Any, **options: Any) -> Tensor:
    view = qkv.cache.stored(sample(9, 2, 4, 8), sample(9, 2, 4, 8), table, [5, 7], **options)
    return qkv.attention(Q[:, :, :2], view, mask=qkv.causal())


def int8() -> Tensor:
    cache = qkv.cache.PagedCache(
        pages=6, num_kv_heads=2, head_dim=8, value_dim=7, dtype=torch.float32, storage=torch.int8
    )
    seqs = [cache.add(), cache.add()]
    cache.append(seqs, K, V)
    return torch.cat([qkv.attention(Q, cache.view(seqs), mask=qkv.causal(), backend=b) for b in ("cpu", "tiled")])


def gradients(run: Callable[..., Tensor]) -> Tensor:
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
    found = torch.autograd.grad((run(*leaves) * sample(2, 4, 12, 7)).sum(), leaves)
    return torch.cat([g.flatten() for g in found])


def merged() -> Tensor:
    parts = [qkv.attention(Q, K[:, :, s], V[:, :, s], return_lse=True) for s in (slice(0, 5), slice(5, None))]
    out: Tensor = qkv.merge(*parts[0], *parts[1])[0]
    return out


def drawn(text: object) -> Tensor:
    return torch.tensor(list(str(text).encode()), device="cpu")


MASKS: dict[str, Callable[[], Any]] = {
    "causal": lambda: qkv.causal(),
    "window": lambda: qkv.window(3, None),
    "prefix": lambda: qkv.causal() | qkv.prefix([3, 5]),
    "documents": lambda: qkv.documents([5, 7]) & qkv.causal(),
    "two packed rows": lambda: qkv.documents([5, 7], [7, 5]),
    "segment ids": lambda: qkv.documents(segment_ids=IDS),
    "listed segment ids": lambda: qkv.documents(segment_ids=[[0] * 5 + [1] * 7] * 2),
    "padding": lambda: qkv.padding([12, 5]),
    "left padding": lambda: qkv.padding([12, 5], side="left"),
    "bool": lambda: SEEN,
    "strided": lambda: qkv.strided(3) | qkv.dilated(3, 2),
    "global": lambda: qkv.global_tokens([0, 3]),
    "random blocks": lambda: qkv.random_blocks(2, 3, seed=4),
    "blocks": lambda: qkv.blocks(MAP, 6),
    "selected blocks": lambda: qkv.selected_blocks(LISTS, 3, queries=4) & qkv.causal(),
    "bigbird": lambda: qkv.bigbird(4),
    "longformer": lambda: qkv.longformer(4, [0]),
    "per head": lambda: qkv.per_head([qkv.causal(), qkv.sliding_window(3)] * 2),
    "mask_mod": lambda: qkv.mask_mod(lambda b, h, p, j: p >= j),
    "not": lambda: ~qkv.documents([5, 7]),
}


def every(mask: Any) -> Tensor:
    """All that is done with a mask, in one row."""
    known = qkv.masks.as_mask(mask, "test")
    assert known is not None
    found = [attend(mask), attend(mask, backend="tiled"), gradients(lambda *t: qkv.attention(*t, mask))]
    found += [known.tensor(12, 12, B=2, Hq=4), drawn(known.picture(12, 12, B=2, Hq=4))]
    assert all(t.device.type == "cpu" for t in found)
    assert [t.dtype for t in found[:4]] == [torch.float32] * 3 + [torch.bool]
    return torch.cat([t.flatten().double() for t in found])


CALLS: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: every(make()) for name, make in MASKS.items()},
    "positions of documents": lambda: qkv.documents([2, 3], [5, 7]).positions("end"),
    "queries of documents": lambda: qkv.attention(
        Q[:, :, :5], K, V, qkv.documents(d := [2, 3], [5, 7]), positions=qkv.documents(d, [5, 7]).positions("end")
    ),
    "alibi": lambda: attend(bias=qkv.alibi([0.1, 0.2, 0.3, 0.4])),
    "relative": lambda: attend(bias=qkv.relative(TABLE)),
    "t5": lambda: attend(bias=qkv.relative(BUCKETS, buckets="t5", max_distance=9)),
    "score_mod": lambda: attend(bias=qkv.score_mod(lambda s, b, h, p, j: s * 0.5)),
    "score_mod, gradients": lambda: gradients(lambda *t: qkv.attention(*t, bias=qkv.score_mod(lambda s, *_: s * 0.5))),
    "lse": lambda: attend(softcap=2.0, return_lse=True)[1],
    "listed positions": lambda: qkv.attention(Q[:, :, :3], K, V, qkv.causal(), positions=[4, 2]),
    "reference": lambda: attend(qkv.causal(), backend="reference"),
    "weights": lambda: qkv.weights(Q, K, mask=qkv.causal()),
    "weights of rows": lambda: torch.cat([qkv.weights(Q, K, rows=r) for r in (3, [1, 2], slice(4, 6))], 2),
    "tiled gradients": lambda: gradients(lambda *t: qkv.attention(*t, qkv.causal(), backend="tiled")),
    "layer": lambda: ATTENTION(X),
    "layer at a position": lambda: ATTENTION(X, positions=3),
    "multihead": lambda: MULTIHEAD(X, X, X, need_weights=True)[0],
    "latent": lambda: LATENT(X),
    "compat": lambda: qkv.compat.sdpa(Q, K, V, is_causal=True, enable_gqa=True),
    "merge": merged,
    "pages": pages,
    "latents": latents,
    "latents and an adapter": lambda: latents(adapted=True),
    "ring": ring,
    "8 bits": int8,
    "stored": lambda: stored(torch.tensor([[7, 2, -1], [0, 5, 8]], dtype=torch.int32, device="cpu")),
    "stored, listed": lambda: stored(
        tuple(torch.tensor(t, dtype=torch.int32, device="cpu") for t in ([0, 2, 4], [7, 2, 0, 5]))
    ),
    "plan": lambda: drawn(qkv.plan(Q, K, V, mask=qkv.documents([5, 7]))),
    "vmap": lambda: torch.vmap(lambda q: qkv.attention(q[None], K[:1], V[:1], qkv.causal())[0])(Q),
    "why": lambda: drawn(qkv.why("projections")),
    "why scale": lambda: drawn(qkv.why("scale")),
}


@contextmanager
def default(setting: Any) -> Iterator[None]:
    if setting == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("setting", ["meta", torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_default_changes_nothing(name: str, setting: Any) -> None:
    with torch.set_grad_enabled("gradients" in name or name in MASKS):
        want = CALLS[name]()
        with default(setting):
            got = CALLS[name]()
    assert got.device.type == "cpu"
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_layers_are_built_where_the_program_asks() -> None:
    """A model made on the meta device, with lists in its masks, gets its weights later."""
    with torch.device("meta"):
        layer = qkv.nn.Attention(16, 2, mask=qkv.longformer(8, [0]) & qkv.documents([5, 7]))
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(sample(2, 12, 16)).isfinite().all()
