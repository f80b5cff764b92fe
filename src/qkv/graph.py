"""The private ops `torch.ops.qkv.attention` and `attention_backward`: attention as a node of somebody else's graph.

torch.compile, torch.export and other tracers see a call as its tensors, a few numbers and the mask as integers and
operands (`qkv.masks.portable`). Tracing looks at shapes and never into a mask; the rest is checked when the graph runs.
Calls that no tracer follows do not come here: the dispatcher alone costs more than a small attention call.

Arguments, in order: q, k, v, sinks?, positions? int64 (B or 1, Lq), seed? int64 (), bias[], mask operands[]; by name:
mask words, the kind of each bias tensor, the reading of positions ("" = not given, "start", "end", "at" = the offsets,
"tensor"), offsets, scale?, softcap?, dropout_p, backend?, whether lse is asked for, and whether a gradient follows,
which autograd says. Results: out, lse (NaN where neither is so) and the state that the backward pass wants
(`spec.Output`), with no elements where no gradient follows. The backward op takes d_out, d_lse, out, lse, state first.
Which backend runs is decided when the graph runs, by the rule of every call (`planning.choose`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from qkv import _torch, flops
from qkv.call.problem import Inputs, Options, Output, empty_output, join_batch
from qkv.call.validate import check_metadata, check_sinks, drawn_positions, refuse_positions
from qkv.errors import ArgumentTypeError, UnsupportedError, describe
from qkv.masks import Mask, Sizes, as_mask
from qkv.masks.portable import decode, depends_on_position, encode
from qkv.scores import Alibi, Relative, ScoreTerm, Sum, TensorBias, as_bias

if TYPE_CHECKING:
    from qkv.autograd import Call

P = ParamSpec("P")
R = TypeVar("R")

CALL = "qkv.attention()"
_GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? positions, Tensor? seed, Tensor[] bias, Tensor[] operands"
)
_STATIC = (
    "SymInt[] words, int[] kinds, str reading, SymInt[] offsets, float? scale, float? softcap, float dropout_p, "
    "str? backend, bool return_lse=True"
)
_KINDS: tuple[type[ScoreTerm], ...] = (TensorBias, Alibi, Relative)

# Kernels see exactly the strides that were traced: the order of the output's dimensions follows q's.
_TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order), torch.Tag.pt2_compliant_tag)
_library = torch.library.Library("qkv", "DEF")
_library.define(f"attention({_GIVEN}, *, {_STATIC}, bool state=False) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"attention_backward(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, Tensor state, {_GIVEN}, *, {_STATIC}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    tags=_TAGS,
)


class _Given(NamedTuple):
    """The tensors of a call, in the order of the schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    positions: Tensor | None
    seed: Tensor | None
    bias: list[Tensor]
    operands: list[Tensor]


class Door(Protocol):
    """What runs a call: `qkv.functional`, which is above this file and hands itself in."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, options: Options, backend: str | None, seed: int,
        state: bool,
    ) -> Output:  # fmt: skip
        """out and lse, and the state if it is wanted and the backend makes one."""
        ...

    @staticmethod
    def planned(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, options: Options, backend: str | None
    ) -> tuple[Call, Inputs]:
        """The call as gradients need it."""
        ...


_door: type[Door] | None = None


def implement(door: type[Door]) -> None:
    """Say who computes."""
    global _door
    _door = door


# ------------------------------------------------------------------------------------------------- into the graph
def traced(
    q: Any, k: Any, v: Any, mask: Any, positions: Any, bias: Any, scale: Any, softcap: Any, sinks: Any,
    dropout_p: Any, backend: Any, return_lse: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attention() as one node: (out, lse). Written for tracers to follow: plain branches, no tables, no data."""
    if v is None:
        fix = "Pass v; it is left out only where k is a cache's view"
        raise ArgumentTypeError(describe(CALL, "v must be a tensor", "v=None", fix))
    if any(isinstance(t, Tensor) and t.is_nested for t in (q, k, v)):
        check_metadata(CALL, q, k, v)  # says how to pack them
    words: list[int] = []
    operands: list[Tensor] = []
    if mask is not None:
        known = mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else as_mask(mask, CALL)
        assert known is not None
        encode(CALL, known, words, operands)
    kinds: list[int] = []
    tensors: list[Tensor] = []
    if bias is not None:
        _encode_bias(q, bias, kinds, tensors)
    reading, offsets, where = _encode_positions(positions, q)
    seed = draw_seed() if dropout_p else None
    out, lse, _ = torch.ops.qkv.attention(
        q, k, v, sinks, where, seed, tensors, operands, words=words, kinds=kinds, reading=reading, offsets=offsets,
        scale=scale, softcap=softcap, dropout_p=dropout_p, backend=backend, return_lse=return_lse,
    )  # fmt: skip
    return out, lse


def draw_seed() -> Tensor:
    """A seed for dropout from torch's generator, the same one inside and outside of a graph."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def _encode_bias(q: Tensor, bias: Any, kinds: list[int], tensors: list[Tensor]) -> None:
    given = as_bias(bias, CALL)
    assert given is not None
    for term in given.terms:
        lowered = term.lowered(q.device)
        kind = -1
        for index, known in enumerate(_KINDS):
            if isinstance(lowered, known):
                kind = index
        if kind < 0:
            rule = "a score term that is a Python function cannot be part of a graph"
            fix = "Pass a tensor, qkv.alibi or qkv.relative, or call attention outside of the traced function"
            raise UnsupportedError(describe(CALL, rule, f"{type(lowered).__name__} while tracing", fix))
        kinds += [kind]
        tensors += [lowered.tensors()[0]]


def _encode_positions(positions: Any, q: Tensor) -> tuple[str, list[int], Tensor | None]:
    if positions is None:
        return "", [], None
    if isinstance(positions, str):
        return positions, [], None
    if isinstance(positions, Tensor):
        if positions.dim() < 2:  # where each batch row starts
            positions = positions.reshape(-1, 1) + torch.arange(q.shape[2], device=positions.device)
        return "tensor", [], positions
    if isinstance(positions, (list, tuple)):
        return "at", list(positions), None
    return "at", [positions], None


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """The function as torch.compile is to leave it: a cache's tables are Python's, and no graph holds them."""
    return torch.compiler.disable(function) if torch.compiler.is_dynamo_compiling() else function


# ------------------------------------------------------------------------------------------------- out of the graph
def _unpack(given: _Given, static: dict[str, Any], *, contents: bool) -> tuple[Mask | None, Options]:
    """The mask and the options as attention() takes them; the mask only if its contents may be looked at."""
    reading, offsets = static["reading"], static["offsets"]
    positions: Any = None if reading == "" else reading
    if reading == "at":
        positions = offsets[0] if len(offsets) == 1 else list(offsets)
    elif reading == "tensor":
        positions = given.positions
    parts = tuple(_KINDS[kind](t) for kind, t in zip(static["kinds"], given.bias, strict=True))  # type: ignore[call-arg]
    bias = None if not parts else parts[0] if len(parts) == 1 else Sum(parts)
    mask = decode(static["words"], given.operands) if contents else None
    options = Options(
        positions,
        bias,
        static["scale"],
        static["softcap"],
        given.sinks,
        static["dropout_p"],
        static.get("return_lse", True),
    )
    return mask, options


def _forward(*args: Any, state: bool = False, **static: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = _Given(*args)
    assert _door is not None
    mask, options = _unpack(given, static, contents=True)
    seed = int(given.seed) if given.seed is not None else 0
    out, lse, kept = _door.forward(*given[:3], mask, options, static["backend"], seed, state)
    if lse is None:  # as the state below
        lse = out.new_full(out.shape[:3], torch.nan, dtype=_accumulate(out))
    if kept is None:  # its size was promised; nobody reads it
        kept = lse.new_full(_state_size(lse.shape, state), torch.nan)
    return out, lse, kept


def _accumulate(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _state_size(rows: Sequence[int], state: bool) -> tuple[int, ...]:
    return (2 if state else 0, *rows)


def _backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, state: Tensor, *args: Any, **static: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    from qkv.autograd import backward  # loaded by the first call that needs it

    given = _Given(*args)
    assert _door is not None
    mask, options = _unpack(given, static, contents=True)
    with torch.no_grad():
        call, inputs = _door.planned(*given[:3], mask, options, static["backend"])
        inputs.seed = int(given.seed) if given.seed is not None else 0
        output = Output(out, lse, state if state.shape[0] else None)
        found = backward(call, call.problem, inputs, output, d_out, d_lse)
    laid_out = [_as(g, t) for g, t in zip(found[:3], given[:3], strict=True)]
    sinks = found.sinks if found.sinks is not None else out.new_empty(0)
    return (
        laid_out[0],
        laid_out[1],
        laid_out[2],
        sinks,
        [_as(g, t) for g, t in zip(found.bias, given.bias, strict=True)],
    )


def _as(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in the strides that were promised to the graph, without data of `like`."""
    promised = torch.empty_like(like)
    return gradient if gradient.stride() == promised.stride() else promised.copy_(gradient)


# ------------------------------------------------------------------------------------------------- for the tracer
def _fake_forward(*args: Any, state: bool = False, **static: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = _Given(*args)
    q, k, v = given.q, given.k, given.v
    check_metadata(CALL, q, k, v)
    B, Hq, Lq, _ = q.shape
    sizes = Sizes(B, Hq, Lq, k.shape[2], q.dtype, q.device)
    _, options = _unpack(given, static, contents=False)
    if options.bias is not None:
        options.bias.check(CALL, sizes)
    check_sinks(CALL, given.sinks, sizes)
    words = static["words"]
    masked = bool(words) and depends_on_position(words)
    biased = options.bias is not None and options.bias.depends_on_position
    if (masked or biased) and options.positions is None and Lq != sizes.Lk:
        name = "a mask that looks at positions" if masked else f"bias {options.bias!r}"
        refuse_positions(CALL, name, drawn_positions(int(Lq), int(sizes.Lk)), sizes)
    lse = torch.empty((B, Hq, Lq), dtype=_accumulate(q), device=q.device)
    return empty_output(q, v.shape[3]), lse, lse.new_empty(_state_size((B, Hq, Lq), state))


def _fake_backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, state: Tensor, *args: Any, **static: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    given = _Given(*args)
    dq, dk, dv = (torch.empty_like(t) for t in given[:3])
    sinks = out.new_empty(0) if given.sinks is None else torch.empty_like(given.sinks)
    return dq, dk, dv, sinks, [torch.empty_like(t) for t in given.bias]


# ------------------------------------------------------------------------------------------------- autograd and vmap
class _Node(_torch.SingleLevel):
    """The op in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, keys: Any, static: dict[str, Any], terms: int, *flat: Any) -> Any:
        args = (*flat[:6], *_lists(flat[6:], terms))
        out, lse, state = _below(torch.ops.qkv.attention.default, keys, args, static | {"state": True})
        ctx.static, ctx.terms = static, terms
        ctx.save_for_backward(out, lse, state, *flat)
        if not static.get("state"):  # who called did not ask for it
            state = state.new_empty(_state_size(lse.shape, False))
        ctx.mark_non_differentiable(state)
        return out, lse, state

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor, _: Any) -> Any:
        out, lse, state, *flat = ctx.saved_tensors
        lists = _lists(flat[6:], ctx.terms)

        def gradients(*sums: Tensor) -> tuple[Any, ...]:
            each = torch.ops.qkv.attention_backward(*sums, out, lse, state, *flat[:6], *lists, **ctx.static)
            return *each[:4], *each[4]

        several = _torch.over_samples(gradients, (d_out, d_lse), at) if (at := _torch.older_vmaps()) else None
        dq, dk, dv, sinks, *bias = gradients(d_out, d_lse) if several is None else several
        given = (dq, dk, dv, sinks if ctx.needs_input_grad[6] else None, None, None)
        return None, None, None, *given, *bias, *[None] * len(lists[1])


class _Last(_Node):
    """The op of the gradients: it has none of its own."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> Any:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        rule = "a traced call differentiates once"
        fix = "Differentiate twice outside of the traced function"
        raise UnsupportedError(describe(CALL, rule, "a gradient of a gradient in a graph", fix))


def _lists(flat: Any, terms: int) -> tuple[list[Tensor], list[Tensor]]:
    return list(flat[:terms]), list(flat[terms:])


def _below(op: Any, keys: Any, args: tuple[Any, ...], static: dict[str, Any]) -> Any:
    with _torch.below_autograd():
        return op.redispatch(keys & _torch.keys_below_autograd, *args, **static)


def _learns(tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd_forward(keys: Any, *args: Any, **static: Any) -> Any:
    flat = (*args[:6], *args[6], *args[7])
    if _learns(flat):
        return _Node.apply(keys, static, len(args[6]), *flat)
    return _below(torch.ops.qkv.attention.default, keys, args, static)


def _autograd_backward(keys: Any, *args: Any, **static: Any) -> Any:
    found = _below(torch.ops.qkv.attention_backward.default, keys, args, static)
    flat = (*args[:11], *args[11], *args[12])
    if _learns(flat):
        dq, dk, dv, sinks, *bias = _Last.apply(4 + len(found[4]), *found[:4], *found[4], *flat)
        return dq, dk, dv, sinks, bias
    return found


def _over(op: Callable[..., Any], before: tuple[int, ...], sums: bool) -> Callable[..., Any]:
    """The rule of an op under vmap: what is mapped joins the batch if nothing else is shared, else a call a sample.

    `before`: which dimension is the batch in the tensors before q.
    """
    rows, batch = len(before), (*before, 0, 0, 0)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **static: Any) -> Any:
        count = info.batch_size
        sinks, bias = args[rows + 3], args[rows + 6]
        alone = any(map(_is_mapped, in_dims[rows + 3 :])) or args[rows + 4] is not None or args[rows + 7]
        simple = not alone and len(static["offsets"]) < 2
        shared = sinks is not None or bool(bias)
        wide = [t for t in bias if t.dim() == 4 and t.shape[0] > 1]
        if simple and not wide and not static["dropout_p"] and not (sums and shared):
            d = in_dims[rows]
            B = args[rows].shape[0] if d is None else args[rows].movedim(d, 0).shape[1]
            wider = [join_batch(t, d, count, at) for t, d, at in zip(args, in_dims, batch, strict=False)]
            found = op(*wider, *args[rows + 3 :], **static)
            ends = (0, 0, 0) if sums else (0, 0, 1)  # dq, dk and dv; out, lse and state
            split = tuple(t.unflatten(end, (count, B)) for t, end in zip(found, ends, strict=False))
            return (*split, *found[3:]), (*ends, *((None, []) if sums else ()))
        samples = [op(*(_pick(a, d, n) for a, d in zip(args, in_dims, strict=True)), **static) for n in range(count)]
        stacked = tuple(
            [torch.stack(each) for each in zip(*parts, strict=True)]
            if isinstance(parts[0], list)
            else torch.stack(parts)
            for parts in zip(*samples, strict=True)
        )
        return stacked, tuple([0] * len(x) if isinstance(x, list) else 0 for x in stacked)

    return rule


def _is_mapped(dim: Any) -> bool:
    return any(map(_is_mapped, dim)) if isinstance(dim, (list, tuple)) else dim is not None


def _pick(given: Any, dim: Any, n: int) -> Any:
    if isinstance(given, (list, tuple)):
        return [_pick(t, d, n) for t, d in zip(given, dim or [None] * len(given), strict=True)]
    return given if dim is None else given.select(dim, n)


_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("qkv::attention", _fake_forward, lib=_library)
torch.library.register_fake("qkv::attention_backward", _fake_backward, lib=_library)
_library.impl("attention", _autograd_forward, "Autograd", with_keyset=True)
_library.impl("attention_backward", _autograd_backward, "Autograd", with_keyset=True)
torch.library.register_vmap("qkv::attention", _over(torch.ops.qkv.attention, (), False), lib=_library)
torch.library.register_vmap(
    "qkv::attention_backward", _over(torch.ops.qkv.attention_backward, (0, 0, 0, 0, 1), True), lib=_library
)
flops.register()
