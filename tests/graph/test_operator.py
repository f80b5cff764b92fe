"""The private ops: what tracers see of a call, and that it is the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError, QKVError, ShapeError, UnsupportedError
from qkv.masks import Mask, portion
from qkv.masks.portable import decode, depends_on_position, encode

pytestmark = pytest.mark.usefixtures("one_thread")

SEED = 30
LISTS = torch.tensor([[2, 0], [1, 3], [-1, 1]])[None, None].expand(2, 2, 3, 2)
BOOLS = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(SEED)) > 0.4
MASKS: dict[str, Mask] = {
    "causal": qkv.causal(),
    "sliding_window": qkv.sliding_window(3),
    "window": qkv.window(2, None),
    "window of one side": qkv.window(None, 1),
    "everything": qkv.window(None, None),
    "prefix": qkv.prefix(3),
    "prefix a row": qkv.prefix([1, 4]),
    "padding": qkv.padding([5, 8]),
    "padding left": qkv.padding([5, 8], side="left"),
    "documents": qkv.documents([3, 5]),
    "documents of both": qkv.documents([3, 5], [6, 2]),
    "segments": qkv.documents(segment_ids=[[0, 0, 1, 1, -1, 0, 2, 2], [0, 1, 1, 1, 1, 1, 1, 3]]),
    "segments of both": qkv.documents(segment_ids=[0, 0, 1, 1, 1, 0, 2, 2], k_segment_ids=[1, 1, 1, 1, 2, 0, 2, 2]),
    "chunked": qkv.chunked(3),
    "strided": qkv.strided(3, 1),
    "dilated": qkv.dilated(2, 3),
    "global_tokens": qkv.global_tokens([0, 6]),
    "random_blocks": qkv.random_blocks(1, 2, seed=7),
    "blocks": qkv.blocks(BOOLS[:, :, :4, :4], 2),
    "dense": qkv.dense(BOOLS),
    "dense 2-D": qkv.dense(BOOLS[0, 0]),
    "selected_blocks": qkv.selected_blocks(LISTS, 2, queries=3),
    "per_head": qkv.per_head([qkv.causal(), qkv.prefix([2, 5]), ~qkv.strided(2), qkv.documents([4, 4])]),
    "portion": ~portion(
        qkv.documents([9, 3]) & ~qkv.padding([5, 12], side="left"), first_key=4, first_query=1, Lq=9, Lk=12
    ),
    "nested": (~(qkv.causal() | qkv.prefix([0, 2])) & qkv.dense(BOOLS)) | (qkv.padding([1, 3]) & ~qkv.chunked(2)),
}  # fmt: skip
FUNCTION = qkv.mask_mod(lambda b, h, p, j: j <= p)


@pytest.mark.parametrize("name", MASKS)
def test_masks_survive_the_graph(name: str) -> None:
    mask = MASKS[name]
    words: list[int] = []
    tensors: list[Tensor] = []
    encode("test", mask, words, tensors)
    assert all(type(word) is int for word in words)
    back = decode(words, tensors)
    assert back is not None
    assert repr(back) == repr(mask)
    if "dense" not in repr(mask) and "selected" not in repr(mask):  # such a mask is its tensor, not its values
        assert back == mask
    sizes = dict(positions="end", B=2, Hq=4)
    assert torch.equal(back.tensor(8, 8, **sizes), mask.tensor(8, 8, **sizes))
    assert depends_on_position(words) or not mask.depends_on_position


def test_a_function_is_no_part_of_a_graph() -> None:
    with pytest.raises(UnsupportedError, match="MaskMod while tracing"):
        encode("test", qkv.causal() & FUNCTION, [], [])
    with pytest.raises(UnsupportedError, match="MaskMod while tracing"):
        encode("test", portion(FUNCTION, first_key=1, first_query=0, Lq=9, Lk=9), [], [])
    assert decode([], []) is None


def normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    gen = torch.Generator().manual_seed(SEED + sum(n * 31**i for i, n in enumerate(shape)))
    return (torch.randn(*shape, generator=gen, dtype=torch.float64) * 2).to(dtype).requires_grad_(grad)


def arguments(
    *, dtype: torch.dtype = torch.float32, grad: bool = True, mask: Mask | None = None, layout: str = "BHLD",
    bias: tuple[tuple[int, Tensor], ...] = (), sinks: Tensor | None = None, positions: Tensor | None = None,
    **static: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Arguments of torch.ops.qkv.attention: B=2, Hq=4, Hkv=2, Lq=Lk=8, D=6, Dv=5."""
    words: list[int] = []
    operands: list[Tensor] = []
    if mask is not None:
        encode("test", mask, words, operands)
    tensors = []
    for H, width in ((4, 6), (2, 6), (2, 5)):
        x = normal(2, H, 8, width, dtype=dtype)
        if layout == "BLHD":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "expanded":
            x = x[:1].expand(2, -1, -1, -1)
        tensors.append(x.detach().requires_grad_(grad))
    options = dict(reading="", offsets=[], scale=None, softcap=None, dropout_p=0.0, backend=None) | static
    seed = torch.tensor(5) if options["dropout_p"] else None
    given = (*tensors, sinks, positions, seed, [t for _, t in bias], operands)
    return given, dict(words=words, kinds=[kind for kind, _ in bias], **options)


SAMPLES: dict[str, Any] = {
    "plain": arguments(),
    "causal bfloat16": arguments(dtype=torch.bfloat16, mask=qkv.causal(), layout="BLHD"),
    "operands": arguments(mask=MASKS["nested"], reading="end"),
    "documents": arguments(mask=qkv.documents([3, 5]) & qkv.causal(), layout="expanded"),
    "terms": arguments(
        bias=((0, normal(4, 1, 8, grad=True)), (1, normal(4, grad=True)), (2, normal(4, 5, grad=True))),
        sinks=normal(4, grad=True), softcap=5.0, scale=0.3,
    ),
    "positions": arguments(mask=qkv.causal(), reading="tensor", positions=torch.arange(8).flip(0)[None] + 1),
    "offsets": arguments(mask=qkv.sliding_window(4), reading="at", offsets=[0, 3], grad=False),
    "dropout": arguments(dropout_p=0.3),
}  # fmt: skip


def backward_sample(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given, static = SAMPLES[name]
    given = tuple([t.detach() for t in x] if isinstance(x, list) else x if x is None else x.detach() for x in given)
    out, lse, state = torch.ops.qkv.attention(*given, **static, state=True)
    return (normal(*out.shape, dtype=out.dtype), normal(*lse.shape), out, lse, state, *given), static


# opcheck of torch 2.14 looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, fake tensors and compilation with dynamic shapes, by PyTorch's own checks."""
    given, static = SAMPLES[name]
    torch.library.opcheck(torch.ops.qkv.attention.default, given, static)
    given, static = backward_sample(name)
    torch.library.opcheck(torch.ops.qkv.attention_backward.default, given, static)


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "dropout"])
def test_the_op_is_the_call(name: str) -> None:
    """Bit for bit, values and gradients, and in the same strides."""
    given, static = SAMPLES[name]
    q, k, v, sinks, positions, _, bias, operands = given
    terms = [(lambda t: t, qkv.alibi, qkv.relative)[kind](t) for kind, t in zip(static["kinds"], bias, strict=True)]
    where: Any = {"": None, "tensor": positions, "at": static["offsets"]}.get(static["reading"], static["reading"])
    bias_sum = None
    for term in terms:
        bias_sum = term if bias_sum is None else bias_sum + term
    want = qkv.attention(
        q, k, v, mask=decode(static["words"], operands), positions=where, bias=bias_sum,
        scale=static["scale"], softcap=static["softcap"], sinks=sinks, return_lse=True,
    )  # fmt: skip
    got = torch.ops.qkv.attention(*given, **static)[:2]
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()
    leaves = [t for t in (q, k, v, sinks, *bias) if t is not None and t.requires_grad]
    towards = [normal(*x.shape, dtype=x.dtype) for x in want]
    if leaves:
        grads = (torch.autograd.grad(found, leaves, towards) for found in (got, want))
        for x, y in zip(*grads, strict=True):
            assert torch.equal(x, y)


def test_tracing_reads_no_contents() -> None:
    """Fake operands have none: only sizes count, and errors say the same as without a tracer."""
    given, static = SAMPLES["documents"]
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, given)
        out, lse, _ = torch.ops.qkv.attention(*fake, **static)
        assert out.shape == (2, 4, 8, 5)
        assert lse.dtype == torch.float32
        q, k, v = fake[:3]
        assert qkv.attention(q, k, v, mask=qkv.causal()).stride() == out.stride()
        assert type(qkv.attention(q, k, v, return_lse=True).lse) is type(q)
        for error, text, call in (
            (ShapeError, "multiple of key/value heads", lambda: qkv.attention(q[:, :3], k, v)),
            (ArgumentTypeError, "one dtype", lambda: qkv.attention(q, k.half(), v)),
            (ShapeError, "sinks must have shape", lambda: qkv.attention(q, k, v, sinks=q[0, 0, 0])),
            (ShapeError, "broadcast", lambda: qkv.attention(q, k, v, bias=q[0, 0])),
            (ArgumentError, "where the queries stand", lambda: qkv.attention(q[:, :, :3], k, v, mask=qkv.causal())),
            (ArgumentError, "known name", lambda: qkv.attention(q, k, v, backend="none")),
            (ArgumentTypeError, "mask must be a qkv mask", lambda: qkv.attention(q, k, v, mask=3)),
            (ArgumentTypeError, "v must be a tensor", lambda: qkv.attention(q, k)),
            (UnsupportedError, "a mask that is a Python function", lambda: qkv.attention(q, k, v, mask=FUNCTION)),
            (UnsupportedError, "a score term that is", lambda: qkv.attention(q, k, v, bias=qkv.score_mod(torch.sin))),
        ):
            with pytest.raises(error, match=text):
                call()
        assert qkv.attention(q[:, :, :3], k, v, mask=qkv.prefix(2)).shape == (2, 4, 3, 5)


def test_what_is_wrong_with_contents_is_said_when_the_graph_runs() -> None:
    given, static = arguments(mask=qkv.documents([3, 6]))
    with pytest.raises(QKVError, match="9"):
        torch.ops.qkv.attention(*given, **static)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_call() -> None:
    """Also after the same call was answered from the cache; a function as a mask runs in parts that they see."""
    q, k, v = (normal(1, 2, 5, 4) for _ in range(3))
    want = qkv.attention(q, k, v, mask=qkv.causal())
    for _ in range(2):
        with Seen() as seen:
            got = qkv.attention(q, k, v, mask=qkv.causal())
        assert torch.equal(got, want)
        assert seen.names == ["qkv.attention.default"]
    with Seen() as seen:
        got = qkv.attention(q, k, v, mask=FUNCTION)
    assert torch.allclose(got, want, atol=1e-6)
    assert "qkv.attention.default" not in seen.names
    assert "aten.bmm.default" in seen.names


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = qkv.attention(q, k, v, mask=qkv.sliding_window(3), return_lse=True)
        return torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))

    given = [normal(1, 2, 7, 4, grad=True) for _ in range(3)]
    graph = make_fx(step, tracing_mode=mode)(*given)
    calls = [str(node.target) for node in graph.graph.nodes if "qkv" in str(node.target)]
    assert calls == ["qkv.attention.default", "qkv.attention_backward.default"]
    other = [normal(1, 2, 7 if mode != "symbolic" else 9, 4, grad=True) + 1 for _ in range(3)]
    for x, y in zip(graph(*other), step(*other), strict=True):
        assert torch.equal(x, y)


def test_a_graph_differentiates_once() -> None:
    given, static = SAMPLES["plain"]
    out, *_ = torch.ops.qkv.attention(*given, **static)
    (dq,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiates once"):
        dq.square().sum().backward()


def test_transforms_of_the_op() -> None:
    """What compiled torch.func code meets."""
    given, static = arguments(mask=qkv.causal(), grad=False)
    q, k, v, *rest = given
    c = normal(2, 4, 8, 5)

    def loss(q: Tensor, k: Tensor, v: Tensor, c: Tensor, sinks: Tensor | None = None) -> Tensor:
        return (torch.ops.qkv.attention(q[None], k[None], v[None], sinks, *rest[1:], **static)[0][0] * c).sum()

    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v, c)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = qkv.attention(*leaves, mask=qkv.causal())
    for x, y in zip(per_sample, torch.autograd.grad(out, leaves, c), strict=True):
        assert torch.allclose(x, y, atol=1e-5)
    sinks = normal(4)
    mapped = torch.vmap(torch.func.grad(loss, argnums=4), in_dims=(0, 0, 0, 0, None))(q, k, v, c, sinks)
    for n in range(2):
        (want,) = torch.autograd.grad(loss(q[n], k[n], v[n], c[n], s := sinks.clone().requires_grad_()), s)
        assert torch.allclose(mapped[n], want, atol=1e-5)


# ---------------------------------------------------------------------------------------- checkpoints, jagged tensors
def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    leaves = [normal(1, 2, 7, 4, grad=True) for _ in range(3)]
    d_out = normal(1, 2, 7, 4)
    for p in (0.0, 0.4):
        grads = []
        for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
            torch.manual_seed(SEED)
            out = run(lambda q, k, v, p=p: qkv.attention(q, k, v, mask=qkv.causal(), dropout_p=p), *leaves)
            grads.append(torch.autograd.grad(out, leaves, d_out))
        for x, y in zip(*grads, strict=True):
            assert torch.equal(x, y)


def test_selective_checkpointing_knows_the_op() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    leaves = [normal(1, 2, 7, 4, grad=True) for _ in range(3)]
    asked: list[str] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked.append(str(op))
        return CheckpointPolicy.MUST_SAVE if "qkv" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint(
        lambda *x: qkv.attention(*x, mask=qkv.causal()) * 2,
        *leaves,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    got = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert "qkv.attention.default" in asked
    want = torch.autograd.grad(qkv.attention(*leaves, mask=qkv.causal()) * 2, leaves, torch.ones_like(out))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_jagged_tensors_and_their_recipe() -> None:
    lengths = [3, 5, 1]
    rows = [normal(n, 2, 4) for n in lengths]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    heads_first = jagged.transpose(1, 2)
    with pytest.raises(ArgumentTypeError, match="documents") as error:
        qkv.attention(heads_first, heads_first, heads_first)
    for part in ("values()", "transpose(0, 1)[None]", "offsets().diff()"):
        assert part in str(error.value)
    x = jagged.values().transpose(0, 1)[None]
    out = qkv.attention(x, x, x, mask=qkv.documents(jagged.offsets().diff()) & qkv.causal())
    d_out = normal(*out.shape)
    (got,) = torch.autograd.grad(out, jagged, d_out)
    start = 0
    for n, row, mine in zip(lengths, rows, got.unbind(), strict=True):
        one = row.clone().requires_grad_()
        y = one.transpose(0, 1)[None]
        alone = qkv.attention(y, y, y, mask=qkv.causal())
        assert torch.allclose(alone, out[:, :, start : start + n], atol=1e-6)
        (want,) = torch.autograd.grad(alone, one, d_out[:, :, start : start + n])
        assert torch.allclose(mine, want, atol=1e-5)
        start += n
