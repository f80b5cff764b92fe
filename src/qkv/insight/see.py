"""`qkv.see`: look at what one call attends to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qkv.call import keywords
from qkv.call.keys import KVView
from qkv.call.problem import Options
from qkv.call.statistics import Wanted
from qkv.checks import flag, given_as, integer
from qkv.errors import ArgumentTypeError
from qkv.insight.look import look
from qkv.insight.trace import Trace
from qkv.masks import Mask
from qkv.scores import ScoreTerm

MOST_TOP = 64
_CALL = "qkv.see()"


def see(
    q: Tensor,
    k: Tensor | KVView,
    v: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    *,
    tokens: Sequence[str] | None = None,
    query_tokens: Sequence[str] | None = None,
    top: int = 8,
    bins: int = 256,
    mass: bool = True,
    heads: Sequence[int] | int | None = None,
    positions: str | int | Sequence[int] | Tensor | None = None,
    bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
    progress: Callable[[float], None] | None = None,
    **unknown: Any,
) -> Trace:
    """Look at what a call attends to: exact statistics of its weights at any length, never a matrix of Lq x Lk.

    ::

        H_i = -sum_j p_ij ln p_ij      entropy, in nats: e^H_i keys of equal weight have as much
        a_j = sum_i p_ij               what key j receives
        M   = p, summed over bins of queries and keys

    Parameters
    ----------
    q : Tensor, shape (B, Hq, Lq, D)
    k : Tensor, shape (B, Hkv, Lk, D), or a cache's view
    v : Tensor, shape (B, Hkv, Lk, Dv)
    mask, positions, bias, scale, softcap, sinks, backend
        As in `attention`.
    tokens, query_tokens : sequence of str
        Of the keys and of the queries, for pictures; with as many queries as keys, `tokens` serves for both.
    top : int
        How many of each row's largest weights to keep, at most 64.
    bins : int
        Rows and columns of the pooled map, at most; 0 for none.
    mass : bool
        Whether to add up what each key receives.
    heads : int or ints
        Query heads to look at; all unless given.
    progress : callable
        Called now and then with the part that is done, from 0 to 1; from another thread, maybe.

    Returns
    -------
    Trace
        `print` it; `t.row(i)`, `t.weights(q=, k=)`, `t.save("trace.json")`, `t.compare(other)`.

    Raises
    ------
    QKVError
        As `attention`; ArgumentError for tokens that are not as many as the keys, and for options out of range.

    Notes
    -----
    What attention computes for the same arguments is not changed by a bit, nor is anything differentiated. Cost: lse,
    largest weight and entropy come with the call; distance, top keys, mass and map take Q K^T a second time. Memory:
    20 + 12 top bytes a row, 8 a key, 4 bins^2 a head. The trace keeps q, k and v by reference.
    Source: the online softmax of Milakov and Gimelshein (2018), with one more sum for the entropy.

    Examples
    --------
    >>> import torch, qkv
    >>> q = k = torch.eye(6)[None, None] * 5
    >>> t = qkv.see(q, k, k, mask=qkv.causal(), tokens=["a", "small", "cat", "sat", "on", "it"])
    >>> t.statistics.top_keys[0, 0, :, 0].tolist()
    [0, 1, 2, 3, 4, 5]
    >>> [round(x, 2) for x in t.weights()[1].tolist()]
    [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    if unknown:
        raise keywords.unknown(_CALL, unknown, see)
    if progress is not None and not callable(progress):
        fix = "Pass a function of one number, or leave it out"
        raise ArgumentTypeError.of(_CALL, "progress is called with a number", given_as("progress", progress), fix)
    wanted = _wanted(top, bins, mass)._replace(progress=progress)
    options = Options(positions, bias, scale, softcap, sinks)
    return look(Trace, q, k, v, mask, options, backend, wanted, heads, tokens, query_tokens)


def _wanted(top: Any, bins: Any, mass: Any) -> Wanted:
    top, bins = integer(_CALL, "top", top, 0, MOST_TOP), integer(_CALL, "bins", bins, 0, 4096)
    mass = flag(_CALL, "mass", mass)
    return Wanted(top, mass, (bins, bins) if bins else None, distance=bool(top or bins or mass))
