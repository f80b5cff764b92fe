"""The probabilities behind attention: of chosen rows and heads, by the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkv._torch import forward_mode, under_transform
from qkv.call import keywords
from qkv.call.keys import KVView
from qkv.call.problem import Options, Problem
from qkv.call.validate import named, validate
from qkv.call.view import check_view, gathered, joined
from qkv.checks import integers, shown, whole
from qkv.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from qkv.masks import Mask
from qkv.numerics import no_autocast
from qkv.scores import ScoreTerm


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
    from qkv.autograd import followed  # loaded on first use, as the definition is
    from qkv.backends.reference import definition

    call = "qkv.weights()"
    if unknown:
        raise keywords.unknown(call, unknown, weights)
    if isinstance(k, KVView):
        q, k, mask, positions = _keys_of_view(call, q, k, mask, Options(positions, bias, scale, softcap, sinks))
    if not isinstance(k, Tensor) or k.dim() != 4:
        validate(call, q, k, k, mask, Options())
    problem, inputs = validate(call, q, k, k[..., :0], mask, Options(positions, bias, scale, softcap, sinks))
    if (under_transform() or forward_mode()) and followed(problem, inputs):
        fix = "Call it outside; torch.autograd differentiates it backwards any number of times"
        raise UnsupportedError.of(call, "torch.func cannot follow weights", f"{named(q=q, k=k)} inside", fix)
    if rows is None and heads is None:
        _refuse_gigabytes(call, q, k, problem)
    chosen = indices_of(call, "rows", rows, problem.Lq, "Lq").to(q.device)
    mine = None if heads is None else indices_of(call, "heads", heads, problem.Hq, "Hq").to(q.device)
    step = max(1, (1 << 22) // max(problem.B * (problem.Hq if mine is None else len(mine)) * problem.Lk, 1))
    with no_autocast(problem.device):
        parts = [definition(problem, inputs, some, mine)[0].to(problem.accumulate) for some in chosen.split(step)]
    return torch.cat(parts, dim=2)


def _refuse_gigabytes(call: str, q: Tensor, k: Tensor, problem: Problem) -> None:
    """Every pair of long sequences is rarely what was meant: it has to be asked for."""
    size = problem.B * problem.Hq * problem.Lq * problem.Lk * problem.accumulate.itemsize
    if size > 1 << 30:
        rule = "all probabilities of a call are given up to 1 GiB; more only of the rows or heads that were chosen"
        fix = "Pass rows=slice(0, 16) or rows=[-1], heads=0, or rows=slice(None) for all of them"
        raise ArgumentError.of(call, rule, f"{named(q=q, k=k)}: {size / 1e9:,.1f} GB", fix)


def _keys_of_view(call: str, q: Any, view: KVView, mask: Any, options: Options) -> tuple[Tensor, Tensor, Any, str]:
    with torch.no_grad():
        check_view(call, q, view, None, options)
    lengths = view.layout.lengths
    if view.layout.queries is not None or len(set(lengths)) > 1:
        rule = "weights of a view are those of one sequence, or of several of one length"
        raise ArgumentError.of(call, rule, f"lengths {list(lengths)}", "Take a view of one sequence at a time")
    if view.k_scale is not None and q.dtype in (torch.bfloat16, torch.float16):  # stored keys have more digits
        q, view = q.float(), view._replace(dtype=torch.float32)
    return q, gathered(view)[0], joined(call, mask, view.held), "end"


def indices_of(call: str, name: str, wanted: Any, size: int, size_name: str) -> Tensor:
    """The chosen rows or heads, int64 in 0 .. size - 1."""
    what = "query rows" if name == "rows" else "query heads"
    if wanted is None:
        wanted = slice(None)
    if isinstance(wanted, slice):
        try:
            return torch.tensor(range(*wanted.indices(size)), dtype=torch.int64, device="cpu")
        except (TypeError, ValueError):
            rule = f"{name} must select {what}"
            raise ArgumentTypeError.of(call, rule, f"{name}={wanted}", "Use slice(0, 16)") from None
    one = whole(wanted)
    found = integers(call, name, wanted if one is None else [one], low=None)
    if found.numel() and not (-size <= int(found.min()) and int(found.max()) < size):
        given = f"{name}={shown(wanted)} and {size_name}={size}"
        raise ArgumentError.of(call, f"{name} must be those of {what}", given, f"Use indices in [0, {size})")
    return torch.where(found < 0, found + size, found)
