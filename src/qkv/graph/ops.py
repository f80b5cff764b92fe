"""The private ops `torch.ops.qkv.attention` and `attention_backward`: attention as a node of somebody else's graph.

torch.compile, torch.export and other tracers see a call as its tensors, a few numbers and the mask as integers and
operands (`qkv.masks.portable`). Tracing looks at shapes and never into a mask; the rest is checked when the graph runs.
Calls that no tracer follows do not come here: the dispatcher alone costs more than a small attention call.

Arguments, in order: q, k, v, sinks?, positions? int64 (B or 1, Lq), seed? int64 (), bias[], mask operands[]; by name:
mask words, the kind of each bias tensor, the reading of positions ("" = not given, "start", "end", "at" = the offsets,
"tensor"), offsets, scale?, softcap?, dropout_p, backend?, whether lse is asked for, and whether a gradient follows,
which autograd says. Results: out, lse (NaN where neither is so) and the state that the backward pass wants
(`Output`), with no elements where no gradient follows. The backward op takes d_out, d_lse, out, lse, state first.
Which backend runs is decided when the graph runs, by the rule of every call (`plans.choose`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv import execute, flops
from qkv._torch import SingleLevel, below_autograd, keys_below_autograd, older_vmaps, over_samples
from qkv.backends.base import Prepared
from qkv.call.problem import CALL, Inputs, Options, Output, empty_output, join_batch, one_by_one
from qkv.call.validate import check_metadata, check_sinks, drawn_positions, refuse_positions, validate
from qkv.call.watchers import WATCHERS, tell
from qkv.errors import UnsupportedError
from qkv.masks import Mask, Sizes
from qkv.masks.portable import decode, depends_on_position
from qkv.plans import check_backend
from qkv.scores import Alibi, Relative, ScoreTerm, Sum, TensorBias

_GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? positions, Tensor? seed, Tensor[] bias, Tensor[] operands"
)
_STATIC = (
    "SymInt[] words, int[] kinds, str reading, SymInt[] offsets, float? scale, float? softcap, float dropout_p, "
    "str? backend, bool return_lse=True"
)
KINDS: tuple[type[ScoreTerm], ...] = (TensorBias, Alibi, Relative)

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
    """The tensors of a call, in the order of the schema: those that may be mapped one by one, then two lists."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    positions: Tensor | None
    seed: Tensor | None
    bias: list[Tensor]
    operands: Sequence[Any]

    @classmethod
    def gathered(cls, flat: Sequence[Any], terms: int) -> _Given:
        """Of the tensors one after the other, of which `terms` are the bias's."""
        q, k, v, sinks, positions, seed, *lists = flat
        return cls(q, k, v, sinks, positions, seed, lists[:terms], lists[terms:])

    def flat(self) -> tuple[Any, ...]:
        """The tensors one after the other."""
        *single, bias, operands = self
        return *single, *bias, *operands


_RESULTS = 5  # d_out, d_lse, out, lse, state: what the backward op takes before the tensors of the call


# ------------------------------------------------------------------------------------------------- out of the graph
def _unpack(given: _Given, static: dict[str, Any], *, contents: bool) -> tuple[Mask | None, Options]:
    """The mask and the options as attention() takes them; the mask only if its contents may be looked at."""
    reading, offsets = static["reading"], static["offsets"]
    positions: Any = None if reading == "" else reading
    if reading == "at":
        positions = offsets[0] if len(offsets) == 1 else list(offsets)
    elif reading == "tensor":
        positions = given.positions
    parts = tuple(KINDS[kind](t) for kind, t in zip(static["kinds"], given.bias, strict=True))  # type: ignore[call-arg]
    bias = None if not parts else parts[0] if len(parts) == 1 else Sum(parts)
    mask = decode(static["words"], given.operands) if contents else None
    o = static
    lse = o.get("return_lse", True)
    return mask, Options(positions, bias, o["scale"], o["softcap"], given.sinks, o["dropout_p"], lse)


def _prepared(given: _Given, static: dict[str, Any], learns: bool) -> tuple[Prepared, Inputs]:
    """The call made ready, and the tensors where backends look for them. Autograd and tracers are above."""
    mask, o = _unpack(given, static, contents=True)
    q, k, v, backend, key = given.q, given.k, given.v, static["backend"], None
    if o.bias is None and not o.dropout_p and o.positions.__class__ in execute.PLAIN_POSITIONS:
        key = execute.key_of(
            q, k, v, mask, o.positions, None, o.scale, o.softcap, o.dropout_p, o.sinks, o.return_lse, backend, learns
        )
        kept = execute.PREPARED.get(key)
        if kept is not None:
            kept.used = execute.now()
            return kept.value, Inputs(q, k, v, None, None, o.sinks)
    check_backend(CALL, backend)
    problem, inputs = validate(CALL, q, k, v, mask, o)
    prepared = execute.prepare(replace(problem, needs_grad=learns), inputs, o, backend, key)
    return prepared, inputs._replace(seed=int(given.seed) if given.seed is not None else 0)


def _forward(*args: Any, state: bool = False, **static: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = _Given(*args)
    with torch.no_grad():
        if WATCHERS:
            mask, options = _unpack(given, static, contents=True)
            tell("torch.ops.qkv.attention", given.q, given.k, given.v, mask, options, static["backend"])
        prepared, inputs = _prepared(given, static, state)
        out, lse, kept = prepared.run(*inputs)
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
    with torch.no_grad():
        prepared, inputs = _prepared(given, static, True)
        output = Output(out, lse, state if state.shape[0] else None)
        found = backward(prepared, inputs, output, d_out, d_lse)
    sinks = found.sinks if found.sinks is not None else out.new_empty(0)
    d_bias = [_as(g, t) for g, t in zip(found.bias, given.bias, strict=True)]
    return _as(found.q, given.q), _as(found.k, given.k), _as(found.v, given.v), sinks, d_bias


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
    if given.sinks is not None:
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
class _Node(SingleLevel):
    """The op in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, keys: Any, static: dict[str, Any], terms: int, *flat: Any) -> Any:
        given = _Given.gathered(flat, terms)
        out, lse, state = _below(torch.ops.qkv.attention.default, keys, given, static | {"state": True})
        ctx.static, ctx.terms = static, terms
        ctx.save_for_backward(out, lse, state, *flat)
        if not static.get("state"):  # who called did not ask for it
            state = state.new_empty(_state_size(lse.shape, False))
        ctx.mark_non_differentiable(state)
        return out, lse, state

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor, _: Any) -> Any:
        out, lse, state, *flat = ctx.saved_tensors
        given = _Given.gathered(flat, ctx.terms)

        def gradients(*sums: Tensor) -> tuple[Any, ...]:
            *each, bias = torch.ops.qkv.attention_backward(*sums, out, lse, state, *given, **ctx.static)
            return *each, *bias

        several = over_samples(gradients, (d_out, d_lse), at) if (at := older_vmaps()) else None
        dq, dk, dv, sinks, *bias = gradients(d_out, d_lse) if several is None else several
        found = _Given(
            dq, dk, dv, None if given.sinks is None else sinks, None, None, bias, [None] * len(given.operands)
        )
        return None, None, None, *found.flat()


class _Last(_Node):
    """The op of the gradients: it has none of its own."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> Any:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        fix = "Differentiate twice outside of the traced function"
        raise UnsupportedError.of(CALL, "a traced call differentiates once", "a gradient of a gradient in a graph", fix)


def _below(op: Any, keys: Any, args: tuple[Any, ...], static: dict[str, Any]) -> Any:
    with below_autograd():
        return op.redispatch(keys & keys_below_autograd, *args, **static)


def _learns(tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd_forward(keys: Any, *args: Any, **static: Any) -> Any:
    given = _Given(*args)
    flat = given.flat()
    if _learns(flat):
        return _Node.apply(keys, static, len(given.bias), *flat)
    return _below(torch.ops.qkv.attention.default, keys, args, static)


def _autograd_backward(keys: Any, *args: Any, **static: Any) -> Any:
    *found, d_bias = _below(torch.ops.qkv.attention_backward.default, keys, args, static)
    flat = (*args[:_RESULTS], *_Given(*args[_RESULTS:]).flat())
    if _learns(flat):
        dq, dk, dv, sinks, *d_bias = _Last.apply(len(found) + len(d_bias), *found, *d_bias, *flat)
        found = [dq, dk, dv, sinks]
    return *found, d_bias


def _over(op: Callable[..., Any], before: tuple[int, ...], sums: bool) -> Callable[..., Any]:
    """The rule of an op under vmap: what is mapped joins the batch if nothing else is shared, else a call a sample.

    `before`: which dimension is the batch in the tensors before q.
    """
    rows = len(before)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **static: Any) -> Any:
        count, given = info.batch_size, _Given(*args[rows:])
        dims: Any = _Given(*in_dims[rows:])
        alone = any(map(_is_mapped, dims[3:])) or given.positions is not None or given.operands
        simple = not alone and len(static["offsets"]) < 2
        shared = given.sinks is not None or bool(given.bias)
        wide = [t for t in given.bias if t.dim() == 4 and t.shape[0] > 1]
        if simple and not wide and not static["dropout_p"] and not (sums and shared):
            B = given.q.shape[0] if dims.q is None else given.q.movedim(dims.q, 0).shape[1]
            joined = (*before, 0, 0, 0)  # which dimension is the batch: in what comes before, in q, k and v
            wider = [join_batch(t, d, count, at) for t, d, at in zip(args, in_dims, joined, strict=False)]
            found = op(*wider, *given[3:], **static)
            ends = (0, 0, 0) if sums else (0, 0, 1)  # dq, dk and dv; out, lse and state
            split = tuple(t.unflatten(end, (count, B)) for t, end in zip(found, ends, strict=False))
            return (*split, *found[3:]), (*ends, *((None, []) if sums else ()))
        return one_by_one(partial(op, **static), count, in_dims, args)

    return rule


def _is_mapped(dim: Any) -> bool:
    return any(map(_is_mapped, dim)) if isinstance(dim, (list, tuple)) else dim is not None


# ------------------------------------------------------------------------------------------------- registration
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
