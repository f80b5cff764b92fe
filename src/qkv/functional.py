"""What users call: attention. A call of a kind that is kept runs here at once; any other goes down the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from qkv import graph
from qkv._torch import compiler_loaded, forward_level, modes, onnx_loaded, recording, under_transform
from qkv.backends.base import Prepared
from qkv.call import keywords
from qkv.call.keys import KVView, SharedView
from qkv.call.problem import CALL, Inputs, Options, Output
from qkv.call.validate import validate
from qkv.call.watchers import WATCHERS, tell
from qkv.execute import PLAIN_POSITIONS, PREPARED, key_of, now, on_view, prepare
from qkv.masks import Mask
from qkv.merging import OutputWithLse
from qkv.plans import check_backend
from qkv.scores import ScoreTerm

_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_dynamo_compiling  # looked up once; torch.compile knows it by any name
_TENSORS = frozenset((Tensor, torch.nn.Parameter))


@overload
def attention(
    q: Tensor, k: Tensor | KVView | SharedView, v: Tensor | None = None, mask: Mask | Tensor | None = None, *,
    positions: str | int | Sequence[int] | Tensor | None = None, bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None, dropout_p: float = 0.0,
    return_lse: Literal[False] = False, backend: str | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor | KVView | SharedView, v: Tensor | None = None, mask: Mask | Tensor | None = None, *,
    positions: str | int | Sequence[int] | Tensor | None = None, bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None, dropout_p: float = 0.0,
    return_lse: Literal[True], backend: str | None = None,
) -> OutputWithLse: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor | KVView | SharedView, v: Tensor | None = None, mask: Mask | Tensor | None = None, *,
    positions: str | int | Sequence[int] | Tensor | None = None, bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None, dropout_p: float = 0.0,
    return_lse: bool, backend: str | None = None,
) -> Tensor | OutputWithLse: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor | KVView | SharedView,
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
        raise keywords.unknown(CALL, unknown, attention)
    if k.__class__ is KVView:
        return _over_view(
            q, k, v, mask, Options(positions, bias, scale, softcap, sinks, dropout_p, return_lse), backend
        )
    if _compiling():
        options = Options(positions, bias, scale, softcap, sinks, dropout_p, return_lse)
        found = graph.traced(q, k, v, mask, options, backend)
        return OutputWithLse(*found) if return_lse else found[0]
    if WATCHERS:
        options = Options(positions, bias, scale, softcap, sinks, dropout_p, return_lse)
        tell(CALL, q, k, v, mask, options, backend)
    key: Any = None
    learns = False
    if (
        (bias is None and dropout_p.__class__ is float and return_lse.__class__ is bool)
        and (positions.__class__ in PLAIN_POSITIONS and modes() == 0)
        and not (under_transform() or recording() or forward_level() >= 0)
    ):
        try:
            learns = _grad_enabled() and (
                q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)  # type: ignore[union-attr]
            )
            key = key_of(
                q, k, v, mask, positions, None, scale, softcap, dropout_p, sinks, return_lse, backend, learns
            )  # fmt: skip
            kept = PREPARED.get(key)
        except (TypeError, AttributeError, RuntimeError):  # not what was expected: the checks say what is wrong
            key = kept = None
        if kept is not None:
            kept.used = now()
            if learns:
                output = _differentiable(kept.value, Inputs(q, k, v, None, None, sinks))  # type: ignore[arg-type]
                return OutputWithLse(output.out, output.lse) if return_lse else output.out  # type: ignore[arg-type]
            out, lse, _ = kept.value.run(q, k, v, None, None, sinks)
            return OutputWithLse(out, lse) if return_lse else out  # type: ignore[no-any-return]
        if dropout_p:  # what is kept draws no seed
            key = None
    options = Options(positions, bias, scale, softcap, sinks, dropout_p, return_lse)
    attend = _unfollowed() if compiler_loaded() else _attend
    output = attend(q, k, v, mask, options, backend, key, learns)
    return OutputWithLse(output.out, output.lse) if return_lse else output.out  # type: ignore[arg-type]


def _over_view(q: Any, view: KVView, v: Any, mask: Any, options: Options, backend: Any) -> Tensor | OutputWithLse:
    if _compiling():
        output = graph.eager(on_view)(CALL, q, view, v, mask, options, backend)
    else:
        if recording() or onnx_loaded():
            graph.refuse_recording()
        if WATCHERS:
            tell(CALL, q, view, v, mask, options, backend)
        output = on_view(CALL, q, view, v, mask, options, backend)
    return OutputWithLse(output.out, output.lse) if options.return_lse else output.out  # type: ignore[arg-type]


def _attend(q: Any, k: Any, v: Any, mask: Any, options: Options, backend: Any, key: Any, learns: bool) -> Output:
    """A call that is not kept. `key`: under which it was looked for, if nothing but its tensors' data is unknown."""
    if key is not None and not learns and {q.__class__, k.__class__, v.__class__} <= _TENSORS:
        check_backend(CALL, backend)
        problem, inputs = validate(CALL, q, k, v, mask, options)
        return Output(*prepare(problem, inputs, options, backend, key).run(*inputs))
    graph.refuse_recording()
    if not isinstance(k, Tensor) and hasattr(k, "attend"):
        return cast(Output, k.attend(CALL, q, v, mask, options, backend))
    output = graph.follow(q, k, v, mask, options, backend)
    if output is None:
        from qkv import autograd  # loaded by the first call that may need it

        output = autograd.attend(q, k, v, mask, options, backend, key)
    return output


def _differentiable(prepared: Prepared, inputs: Inputs) -> Output:
    from qkv import autograd

    return autograd.differentiable(prepared, inputs)


@cache
def _unfollowed() -> Callable[..., Output]:
    """`_attend`; torch.compile does not look into it where it left `attention` to Python."""
    disabled: Callable[..., Output] = torch.compiler.disable(_attend)
    return disabled
