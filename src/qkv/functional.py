"""What users call: attention, and the probabilities behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from qkv import _torch, execute, graph
from qkv._torch import (
    forward_mode as _forward_mode,
    modes as _modes,
    recording as _recording,
    under_transform as _functorch,
)
from qkv.backends import base
from qkv.call import keywords
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Options, Output, Problem
from qkv.call.validate import named, validate
from qkv.call.view import check_view, gathered, joined
from qkv.checks import integers, shown, whole
from qkv.errors import ArgumentError, ArgumentTypeError, UnsupportedError, describe
from qkv.masks import Mask
from qkv.masks.portable import encode
from qkv.merging import OutputWithLse
from qkv.numerics import no_autocast
from qkv.plans import check_backend, choose, prepared
from qkv.remembered import Kept, Remembered, now as _now
from qkv.scores import ScoreTerm

if TYPE_CHECKING:
    from qkv.autograd import Call

_CALL = "qkv.attention()"


class _Entry(NamedTuple):
    """How to run calls of one kind."""

    problem: Problem
    backend: base.Backend
    run: Callable[[Inputs], Output]
    execute: base.Execute | None  # the backend's prepared call, where it has one
    differentiable: bool  # autograd goes through `run` itself


# Two caches, keyed by all that the checks and the plan depend on: metadata, options and the mask, never data.
# _FAST holds the prepared calls that need no gradient; a hit there is the whole door.
# With the prepared calls over views they share a budget in bytes, for the masks that they keep alive.
_ENTRIES = Remembered(256)
_FAST = Remembered(256)
_PLAIN_POSITIONS = frozenset((type(None), str, int))
_grad_enabled = torch.is_grad_enabled
_dynamo = torch.compiler.is_dynamo_compiling  # looked up once; torch.compile knows it by any name


@overload
def attention(
    q: Tensor,
    k: Tensor | KVView,
    v: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    *,
    positions: str | int | Sequence[int] | Tensor | None = None,
    bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor | KVView,
    v: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    *,
    positions: str | int | Sequence[int] | Tensor | None = None,
    bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    backend: str | None = None,
) -> OutputWithLse: ...


@overload
def attention(
    q: Tensor,
    k: Tensor | KVView,
    v: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    *,
    positions: str | int | Sequence[int] | Tensor | None = None,
    bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool,
    backend: str | None = None,
) -> Tensor | OutputWithLse: ...


def attention(
    q: Tensor,
    k: Tensor | KVView,
    v: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    *,
    positions: str | int | Sequence[int] | Tensor | None = None,
    bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor | OutputWithLse:
    """Attend from each query to the keys the mask lets it see, and return the weighted mean of their values.

    ::

        s_ij = softcap(scale * q_i . k_j) + bias_ij       dropped where the mask hides j from i
        p_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink_h))
        o_i  = sum_j p_ij v_j                             lse_i = log of that denominator

    Parameters
    ----------
    q : Tensor, shape (B, Hq, Lq, D)
        Queries: float64, float32, bfloat16 or float16, any strides.
    k : Tensor, shape (B, Hkv, Lk, D)
        Keys. Query head h reads key/value head h // (Hq // Hkv); Hq must be a multiple of Hkv. Or a cache's view, with
        the values: `qkv.cache`. Then q holds the last tokens of its sequences, and v and positions are left out.
    v : Tensor, shape (B, Hkv, Lk, Dv)
        Values; may be a view of k's leading columns.
    mask : Mask or bool Tensor
        Which keys each query may attend to (True = may): `qkv.causal()`, `qkv.documents(lengths) & qkv.causal()`, or a
        tensor that broadcasts to (B, Hq, Lq, Lk).
    positions : "start", "end", int, B ints or int Tensor (B or 1, Lq)
        Where the queries stand among the keys, for masks and biases that look at positions: p = i, p = i + Lk - Lq,
        p = n + i, or as given. Needed where Lq != Lk.
    bias : Tensor or score term
        Added to the scores: broadcastable to (B, Hq, Lq, Lk), in q's dtype or float32; `qkv.alibi`, `qkv.relative`,
        `qkv.score_mod`, or a sum. -inf hides.
    scale : float
        1/sqrt(D) unless given.
    softcap : float
        c > 0 replaces each scaled score x by c * tanh(x / c).
    sinks : Tensor, shape (Hq,)
        One score a head that takes part in the softmax and has no value.
    dropout_p : float
        Probability in [0, 1) that a weight is dropped; the others grow by 1 / (1 - dropout_p). Seeded from torch's
        generator.
    return_lse : bool
        Return (out, lse).
    backend : str
        "cpu", "tiled", "sdpa", "reference"; by itself it takes what `qkv.plan` prints.

    Returns
    -------
    out : Tensor, shape (B, Hq, Lq, Dv)
        In q's dtype and in q's order of dimensions in memory. A row that sees no key is 0.
    lse : Tensor, shape (B, Hq, Lq)
        Natural log, float32 (float64 for float64 input). A row that sees no key has -inf, or its sink. Only with
        return_lse=True.

    Raises
    ------
    ShapeError, ArgumentError, ArgumentTypeError
        Arguments that do not fit; the message says the rule, what was given and the fix.
    UnsupportedError
        The backend asked for cannot run the call.

    Notes
    -----
    Cost: 2 (D + Dv) FLOPs a visible pair, memory in proportion to q, k, v and out; `qkv.plan` gives a call's numbers.
    Derivatives, by torch.autograd or torch.func, forward or backward: the first and the second, never with quadratic
    memory; backend="reference" has all of them, backwards. torch.vmap maps it. torch.compile and torch.export take it
    as one node and keep lengths dynamic; a mask or score term that is a Python function stays outside of their graphs.
    FLOP counters see each call but those over a view: `qkv.flops` says what is counted.
    Source: Vaswani et al. (2017); computed by online softmax over tiles, Dao et al. (2022).

    Examples
    --------
    >>> import torch, qkv
    >>> q, k, v = torch.randn(1, 8, 5, 64), torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 32)
    >>> out, lse = qkv.attention(q, k, v, mask=qkv.causal(), positions="end", return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 8, 5, 32]), torch.Size([1, 8, 5]))
    """
    if unknown:
        raise keywords.unknown(_CALL, unknown, attention)
    if k.__class__ is KVView:
        given = Options(positions, bias, scale, softcap, sinks, dropout_p, return_lse)
        return _over_view(q, k, v, mask, given, backend)
    if _dynamo():
        found = graph.traced(q, k, v, mask, positions, bias, scale, softcap, sinks, dropout_p, backend, return_lse)
        return OutputWithLse(*found) if return_lse else found[0]
    fast_key: Any = None
    kept: Kept | None = None
    if (
        bias is None
        and _modes() == 0
        and not _functorch()
        and not _recording()
        and not _forward_mode()
        and dropout_p.__class__ is float
        and return_lse.__class__ is bool
        and positions.__class__ in _PLAIN_POSITIONS
    ):
        try:
            # Classes are part of the key because True == 1 == 1.0, and a subclass of Tensor may have no storage.
            fast_key = (
                q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,  # type: ignore[union-attr]
                q.is_cpu and k.is_cpu and v.is_cpu, q.__class__, k.__class__, v.__class__,  # type: ignore[union-attr]
                k.data_ptr() == v.data_ptr(), q.is_neg() or k.is_neg() or v.is_neg(),  # type: ignore[union-attr]
                mask, positions, positions.__class__, scale, scale.__class__, softcap, softcap.__class__, dropout_p,
                None if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device, sinks.__class__),
                return_lse, backend,
            )  # fmt: skip
            kept = _FAST.get(fast_key)
        except (
            TypeError,
            AttributeError,
            RuntimeError,
        ):  # not what was expected: the checks below will say what is wrong
            fast_key = None
        if kept is not None and not (
            _grad_enabled()
            and (q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad))  # type: ignore[union-attr]
        ):
            kept.used = _now()
            out, lse, _ = kept.value(q, k, v, None, (), sinks, return_lse)
            return OutputWithLse(out, lse) if return_lse else out  # type: ignore[arg-type]
    options = Options(positions, bias, scale, softcap, sinks, dropout_p, return_lse)
    output = _traced(q, k, v, mask, options, backend)
    if output is None:
        output = _unfollowed()(q, k, v, mask, options, backend, fast_key)
    return OutputWithLse(output.out, output.lse) if return_lse else output.out  # type: ignore[arg-type]


def _over_view(q: Any, view: KVView, v: Any, mask: Any, options: Options, backend: Any) -> Tensor | OutputWithLse:
    if not _dynamo():
        _refuse_recording()
    output = graph.eager(execute.attend)(_CALL, q, view, v, mask, options, backend)
    return OutputWithLse(output.out, output.lse) if options.return_lse else output.out  # type: ignore[arg-type]


def _traced(q: Any, k: Any, v: Any, mask: Any, options: Options, backend: Any) -> Output | None:
    """The call as a node of the graph that a tracer is making, or None where none is."""
    _refuse_recording()
    followed = _torch.stands_in(q) or _torch.stands_in(k) or _torch.stands_in(v)
    if not followed and _modes() == 0:
        return None
    check_backend(_CALL, backend)
    o = options
    try:
        found = graph.traced(
            q, k, v, mask, o.positions, o.bias, o.scale, o.softcap, o.sinks, o.dropout_p, backend, o.return_lse
        )  # fmt: skip
    except UnsupportedError:
        if followed:
            raise
        return None  # a mode only watches: the parts of a call that is no node are its to see
    return Output(*found)


def _refuse_recording() -> None:
    """TorchScript would keep the numbers of this one call, and ONNX has no such node."""
    if _recording() or _torch.exporting_onnx():
        rule = "no TorchScript and no ONNX graph can hold the call"
        given = "a call inside of torch.jit.trace" if _recording() else "a call inside of torch.onnx.export"
        fix = "Use torch.export.export or torch.compile, which take it as one node; for ONNX export PyTorch's own layer"
        raise UnsupportedError(describe(_CALL, rule, given, fix))


def _unfollowed() -> Callable[..., Output]:
    """`_attend`; torch.compile does not look into it where it left `attention` to Python."""
    if not _torch.compiler_loaded():
        return _attend
    return _disabled()


@cache
def _disabled() -> Callable[..., Output]:
    disabled: Callable[..., Output] = torch.compiler.disable(_attend)
    return disabled


def _attend(
    q: Any, k: Any, v: Any, mask: Any, options: Options, backend: Any, fast_key: Any = None, seed: int | None = None
) -> Output:
    """The door without the short cut: check, plan, run."""
    check_backend(_CALL, backend)
    # Positions and bias are looked at in every call: what they hold is data, and no key can stand for it.
    problem, inputs = validate(_CALL, q, k, v, mask, options)
    if _functorch() or _forward_mode():
        if _transformed(problem, inputs):
            return _transform(problem, inputs, backend)
        if _functorch():  # a constant there: computed as if outside
            with _torch.outside_transforms():
                return _attend(q, k, v, mask, options, backend, seed=seed)
    entry, key = _planned(problem, inputs, backend)
    as_given = inputs.q is q and inputs.k is k and inputs.v is v and inputs.sinks is options.sinks
    seedless = problem.dropout_p == 0
    if None not in (key, fast_key, entry.execute) and as_given and seedless and q.is_cpu and not problem.needs_grad:
        _FAST.put(fast_key, entry.execute, (problem.mask, _operands(entry.execute)))
    if problem.dropout_p > 0:
        inputs.seed = int(graph.draw_seed()) if seed is None else seed
    if not torch.is_grad_enabled() or (entry.differentiable and not _differentiates(entry.backend)):
        return entry.run(inputs)
    from qkv.autograd import Call, attend, refuse_captured  # loaded by the first call that may need it

    refuse_captured(_CALL, inputs.bias, q.device)
    if not problem.needs_grad:
        return entry.run(inputs)
    return attend(Call(entry.problem, entry.backend, entry.run, inputs.bias, inputs.seed), inputs)


def _transform(problem: Problem, inputs: Inputs, backend: str | None) -> Output:
    """A call whose tensors torch.func or forward mode follows; no result of it is remembered."""
    from qkv.autograd import Call, attend, refuse_captured

    refuse_captured(_CALL, inputs.bias, inputs.q.device)
    seed = int(graph.draw_seed()) if problem.dropout_p > 0 else 0
    chosen = base.load(choose(problem, backend, inputs.positions).backend)
    problem = _kept(replace(problem, needs_grad=True), chosen)
    words: list[int] = []
    operands: list[Tensor] = []
    if problem.mask is not None and any(map(_torch.transformed, _held_tensors(problem.mask))):
        encode(_CALL, problem.mask, words, operands)  # what is mapped has to be an argument
    call = Call(problem, chosen, None, inputs.bias, seed, tuple(words) if words else None, len(operands))
    return attend(call, inputs, operands)


def _transformed(problem: Problem, inputs: Inputs) -> bool:
    """Whether torch.func or forward mode follows one of the call's tensors."""
    bias = inputs.bias.tensors() if inputs.bias is not None else ()
    tensors = [t for t in (inputs.q, inputs.k, inputs.v, inputs.sinks, *bias) if t is not None]
    if any(map(_torch.transformed, tensors + _held_tensors(problem.mask))):
        return True
    return _forward_mode() and any(map(_torch.has_tangent, tensors))


def _planned(problem: Problem, inputs: Inputs, backend: str | None) -> tuple[_Entry, Any]:
    """How to run the call, from the cache where it can be, and the key there."""
    key = None if _holds_users_objects(problem.mask) else _key(problem, inputs, backend)
    kept = _ENTRIES.get(key) if key is not None else None
    if kept is not None:
        kept.used = _now()
        found: _Entry = kept.value
        return found, key
    entry = _entry(problem, inputs, backend)
    if key is not None:
        _ENTRIES.put(key, entry, (problem.mask, _operands(entry.execute)))
    return entry, key


def _key(problem: Problem, inputs: Inputs, backend: str | None) -> Any:
    q, k, v, sinks = inputs.q, inputs.k, inputs.v, inputs.sinks
    return (
        problem, backend, q.device, q.stride(), k.stride(), v.stride(), k.data_ptr() == v.data_ptr(),
        None if sinks is None else (sinks.stride(), sinks.dtype),
        None if inputs.positions is None else inputs.positions.shape,
    )  # fmt: skip


def _entry(problem: Problem, inputs: Inputs, name: str | None) -> _Entry:
    plan = choose(problem, name, inputs.positions)
    backend = base.load(name or plan.backend)
    problem = _kept(problem, backend)
    execute = prepared(problem, backend, inputs)
    if execute is None:
        return _Entry(problem, backend, lambda given: backend.run(problem, given), None, backend.differentiable)

    def run(given: Inputs) -> Output:
        tensors = given.bias.tensors() if given.bias is not None else ()
        found = execute(
            given.q, given.k, given.v, given.positions, tensors, given.sinks, problem.needs_lse, given.seed
        )  # fmt: skip
        return Output(*found)

    return _Entry(problem, backend, run, execute, backend.differentiable)


def _kept(problem: Problem, backend: base.Backend) -> Problem:
    """The problem with what a backward pass starts from, where one may follow and the backend has it.

    Only now: what runs is decided by what the caller asked for.
    """
    if not problem.needs_grad or not getattr(backend, "has_lse", True):
        return problem
    return replace(problem, needs_lse=True, needs_state=True)


def _differentiates(backend: base.Backend) -> bool:
    return getattr(backend, "backward", None) is not None


def _operands(execute: Any) -> tuple[Tensor, ...]:
    """What a prepared call made of the mask's tensors."""
    found: tuple[Tensor, ...] = getattr(execute, "operands", ())
    return found


def _holds_users_objects(mask: Any) -> bool:
    """Whether remembering a mask would keep the user's own tensors or functions alive."""
    for value in vars(mask).values() if mask is not None else ():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Mask):
                if _holds_users_objects(part):
                    return True
            elif isinstance(part, Tensor) or callable(part):
                return True
    return False


def _held_tensors(mask: Mask | None) -> list[Tensor]:
    """The users' own tensors in a mask, which torch.func may map."""
    if mask is None:
        return []
    values = [part for value in vars(mask).values() for part in (value if isinstance(value, tuple) else (value,))]
    inner = [t for value in values if isinstance(value, Mask) for t in _held_tensors(value)]
    return inner + [value for value in values if isinstance(value, Tensor)]


class _Door:
    """What the private ops compute with: here tensors have data, and autograd and tracers are above."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, options: Options, backend: str | None, seed: int,
        state: bool,
    ) -> Output:  # fmt: skip
        with torch.no_grad():
            if state:
                call, inputs = _Door.planned(q, k, v, mask, options, backend)
                inputs.seed = seed
                return call.compute(call.problem, inputs)
            if _modes() or options.dropout_p:
                return _attend(q, k, v, mask, options, backend, seed=seed)
            o = options
            found = attention(
                q, k, v, mask, positions=o.positions, bias=o.bias, scale=o.scale, softcap=o.softcap, sinks=o.sinks,
                return_lse=o.return_lse, backend=backend,
            )  # fmt: skip
            return Output(*found) if isinstance(found, tuple) else Output(found, None)

    @staticmethod
    def planned(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, options: Options, backend: str | None
    ) -> tuple[Call, Inputs]:
        from qkv.autograd import Call

        problem, inputs = validate(_CALL, q, k, v, mask, options)
        entry, _ = _planned(replace(problem, needs_grad=True), inputs, backend)
        return Call(entry.problem, entry.backend, entry.run, inputs.bias), inputs


graph.implement(_Door)


def weights(
    q: Tensor,
    k: Tensor | KVView,
    *,
    rows: slice | int | Sequence[int] | Tensor | None = None,
    heads: slice | int | Sequence[int] | Tensor | None = None,
    mask: Mask | Tensor | None = None,
    positions: str | int | Sequence[int] | Tensor | None = None,
    bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **unknown: Any,
) -> Tensor:
    """Return the exact attention probabilities of chosen query rows and heads, without values.

    Parameters
    ----------
    q : Tensor, shape (B, Hq, Lq, D)
    k : Tensor, shape (B, Hkv, Lk, D), or a cache's view of one sequence, or of several of one length
    rows, heads : slice, int, or ints
        The query indices and query heads wanted; all of them by default, up to a result of 1 GiB.
    mask, positions, bias, scale, softcap, sinks
        As in `attention`.

    Returns
    -------
    p : Tensor, shape (B, heads, rows, Lk)
        float32 (float64 for float64 input), of as many heads and rows as were chosen. Each row sums to 1,
        or to less with sinks; a row that sees no key is 0. Differentiable.

    Raises
    ------
    QKVError
        As `attention`; ArgumentError for rows or heads that there are not, and for more than 1 GiB of probabilities
        where neither was chosen.

    Notes
    -----
    Cost: 2 D FLOPs a pair and 4 bytes a probability returned; computed in float64, a few rows at a time.

    Examples
    --------
    >>> import torch, qkv
    >>> q = k = torch.zeros(1, 2, 6, 8)
    >>> qkv.weights(q, k, rows=[2], mask=qkv.causal())[0, 0].round(decimals=2)
    tensor([[0.3300, 0.3300, 0.3300, 0.0000, 0.0000, 0.0000]])
    """
    from qkv.backends.reference import definition  # backends load on first use

    call = "qkv.weights()"
    if unknown:
        raise keywords.unknown(call, unknown, weights)
    if isinstance(k, KVView):
        q, k, mask, positions = _keys_of_view(call, q, k, mask, Options(positions, bias, scale, softcap, sinks))
    if not isinstance(k, Tensor) or k.dim() != 4:
        validate(call, q, k, k, mask, Options())
    problem, inputs = validate(call, q, k, k[..., :0], mask, Options(positions, bias, scale, softcap, sinks))
    if (_functorch() or _forward_mode()) and _transformed(problem, inputs):
        fix = "Call it outside; torch.autograd differentiates it backwards any number of times"
        raise UnsupportedError(describe(call, "torch.func cannot follow weights", f"{named(q=q, k=k)} inside", fix))
    if rows is None and heads is None:
        _refuse_gigabytes(call, q, k, problem)
    chosen = _indices(call, "rows", rows, problem.Lq, "Lq").to(q.device)
    mine = None if heads is None else _indices(call, "heads", heads, problem.Hq, "Hq").to(q.device)
    step = max(1, (1 << 22) // max(problem.B * (problem.Hq if mine is None else len(mine)) * problem.Lk, 1))
    with no_autocast(problem.device):
        parts = [definition(problem, inputs, some, mine)[0].to(problem.accumulate) for some in chosen.split(step)]
    return torch.cat(parts, dim=2)


def _refuse_gigabytes(call: str, q: Tensor, k: Tensor, problem: Problem) -> None:
    """Every pair of long sequences is rarely what was meant: it has to be asked for."""
    size = problem.B * problem.Hq * problem.Lq * problem.Lk * problem.accumulate.itemsize
    if size > 1 << 30:
        rule = "all probabilities of a call are given up to 1 GiB; more only of the rows or heads that were chosen"
        given = f"{named(q=q, k=k)}: {size / 1e9:,.1f} GB"
        fix = "Pass rows=slice(0, 16) or rows=[-1], heads=0, or rows=slice(None) for all of them"
        raise ArgumentError(describe(call, rule, given, fix))


def _keys_of_view(call: str, q: Any, view: KVView, mask: Any, options: Options) -> tuple[Tensor, Tensor, Any, str]:
    with torch.no_grad():
        check_view(call, q, view, None, options)
    lengths = view.layout.lengths
    if view.layout.queries is not None or len(set(lengths)) > 1:
        rule = "weights of a view are those of one sequence, or of several of one length"
        fix = "Take a view of one sequence at a time"
        raise ArgumentError(describe(call, rule, f"lengths {list(lengths)}", fix))
    if view.k_scale is not None and q.dtype in (torch.bfloat16, torch.float16):  # stored keys have more digits
        q, view = q.float(), view._replace(dtype=torch.float32)
    return q, gathered(view)[0], joined(call, mask, view.held), "end"


def _indices(call: str, name: str, wanted: Any, size: int, size_name: str) -> Tensor:
    """The chosen rows or heads, int64 in 0 .. size - 1."""
    what = "query rows" if name == "rows" else "query heads"
    if wanted is None:
        wanted = slice(None)
    if isinstance(wanted, slice):
        try:
            return torch.tensor(range(*wanted.indices(size)), dtype=torch.int64, device="cpu")
        except (TypeError, ValueError):
            rule = f"{name} must select {what}"
            raise ArgumentTypeError(describe(call, rule, f"{name}={wanted}", "Use slice(0, 16)")) from None
    one = whole(wanted)
    found = integers(call, name, wanted if one is None else [one], low=None)
    if found.numel() and not (-size <= int(found.min()) and int(found.max()) < size):
        given = f"{name}={shown(wanted)} and {size_name}={size}"
        raise ArgumentError(describe(call, f"{name} must be those of {what}", given, f"Use indices in [0, {size})"))
    return torch.where(found < 0, found + size, found)
