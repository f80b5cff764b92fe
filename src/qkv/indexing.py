"""Selection of single keys by a light indexer, in the manner of DeepSeek's sparse attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv._torch import transformed
from qkv.backends.tiled.schedule import HeadRow, KeyTile, Schedule
from qkv.call import keywords
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Options, Problem
from qkv.call.validate import named, validate
from qkv.call.view import Group, check_view, joined, problem_of, reader
from qkv.checks import integer, integers, no_tensor, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError, UnsupportedError
from qkv.masks import Mask, Tile, as_mask, selected_blocks, window
from qkv.numerics import no_autocast
from qkv.probabilities import indices_of

# Products of all heads in one tile, and numbers of its keys: both stay in the second-level cache.
_PRODUCTS = 1 << 18
_KEYS = 1024, 8192  # of a tile, with many products a key and with few
_QUERIES = 64  # of a tile, at most
_SEEN = 1 << 20  # pairs of queries and keys whose mask is looked at as a whole
_SPAN = 1 << 15  # scores of a query that are kept before the best are taken
_KEPT = 1 << 24  # products that a backward pass computes again at a time


class _Row(NamedTuple):
    """One batch row: its queries and weights, its keys, and the call that its mask is asked about."""

    b: int
    q: Tensor  # (Hi, Lq, Di)
    weights: Tensor  # (Lq, Hi)
    keys: Callable[[int, int], Tensor]  # start and stop -> (stop - start, Di)
    problem: Problem
    positions: Tensor | None  # (Lq,) where they are data


def select_tokens(
    q: Tensor,
    k: Tensor | KVView,
    weights: Tensor,
    top_k: int,
    *,
    mask: Mask | Tensor | None = None,
    positions: str | int | Sequence[int] | Tensor | None = None,
    heads: int | None = None,
    **unknown: Any,
) -> Mask:
    """Choose the top_k keys of each query by the scores of a light indexer, as a mask for `attention`.

    ::

        I[t, s] = sum over h of  weights[t, h] * relu(q[t, h] . k[s])       one choice for all heads of the attention

    Parameters
    ----------
    q : Tensor, shape (B, Hi, Lq, Di)
        Queries of the indexer's heads. A positive scale changes no choice; one that weighs is folded into `weights`.
    k : Tensor, shape (B, 1, Lk, Di), or a view of index keys
        The indexer's keys, one head; `cache.index_view(seqs, layer)` of a cache with index_dim=, where queries are the
        sequences' last tokens. Ragged views take q (1, Hi, sum Lq, Di) and weights (1, sum Lq, Hi).
    weights : Tensor, shape (B, Lq, Hi)
        What each head counts for each query; any sign.
    top_k : int
        Keys that a query may see.
    mask, positions
        As in `attention`: a query chooses among the keys that `mask` shows it. What hidden keys hold has no effect.
    heads : int
        Hq, for a `mask` that differs by head: each query head then has a choice of its own, by the same scores.

    Returns
    -------
    Mask
        selected_blocks(indices, 1) & mask, with indices int32 (B, 1 or Hq, Lq, top_k) in ascending order and -1 for
        none. A query that sees at most top_k keys keeps them all, whatever their scores; where Lk <= top_k there is
        nothing to choose, and `mask` itself is returned. Of equal scores the lower key goes first; a score that is NaN
        counts as the largest.

    Raises
    ------
    QKVError
        As `attention`; ArgumentError for a mask that differs by head without heads=, UnsupportedError while a
        transform or a tracer follows: what is chosen depends on the data.

    Notes
    -----
    The choice has no gradient: the indexer is trained by a loss on its scores, `qkv.index_scores`.
    Cost: 2 Hi Di FLOPs a visible pair, in float32 (float64 for float64); index keys are read once for every
    2**19 / (1024 Hi) queries. Memory: 4 top_k bytes a query, and some MB; never Lq Lk.
    Source: DeepSeek-AI (2025), DeepSeek-V3.2, arXiv 2512.02556, equation 1.

    Examples
    --------
    >>> import torch, qkv
    >>> k = torch.tensor([3.0, 1.0, 2.0, 3.0, 0.0])[None, None, :, None]
    >>> q, weights = torch.ones(1, 1, 5, 1), torch.ones(1, 5, 1)
    >>> print(qkv.select_tokens(q, k, weights, 2, mask=qkv.causal()).picture(5, 5))
    p/j 0 1 2 3 4
      0 ■ · · · ·
      1 ■ ■ · · ·
      2 ■ · ■ · ·
      3 ■ · · ■ ·
      4 ■ · · ■ ·
    """
    call = "qkv.select_tokens()"
    if unknown:
        raise keywords.unknown(call, unknown, select_tokens)
    top_k = integer(call, "top_k", top_k, low=1)
    known = as_mask(mask, call)
    _check(call, q, k, weights)
    Hq = _heads(call, known, heads)
    with torch.no_grad(), no_autocast(q.device.type):
        if isinstance(k, KVView):
            rows = _of_view(call, q, k, weights, known, Options(positions), Hq)
        else:
            rows = _of_tensors(call, q, k, weights, known, Options(positions), Hq)
        if all(row.problem.Lk <= top_k for row in rows):
            return window(None, None) if known is None else known
        size = (len(rows), Hq, max(row.problem.Lq for row in rows), top_k)
        chosen = torch.full(size, -1, dtype=torch.int32, device=q.device)
        for row in rows:
            found = _chosen(row, top_k)
            chosen[row.b, :, : found.shape[1], top_k - found.shape[2] :] = found
    selection = selected_blocks(chosen, 1)
    return selection if known is None else selection & known


def index_scores(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    rows: slice | int | Sequence[int] | Tensor | None = None,
    keys: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    positions: str | int | Sequence[int] | Tensor | None = None,
    **unknown: Any,
) -> Tensor:
    """Return the scores of an indexer for chosen queries, differentiable: what it is trained by.

    ::

        I[t, s] = sum over h of  weights[t, h] * relu(q[t, h] . k[s]),      -inf where `mask` hides s from t

    DeepSeek trains the indexer apart from the model: its inputs are detached, and its loss is the divergence of
    softmax(I) from attention's own probabilities, summed over heads and divided by their sum: over all keys while
    attention is still full, then over the chosen ones.

    Parameters
    ----------
    q : Tensor, shape (B, Hi, Lq, Di)
    k : Tensor, shape (B, 1, Lk, Di)
    weights : Tensor, shape (B, Lq, Hi)
        As in `select_tokens`.
    rows : slice, int, or ints
        The query indices wanted; all of them by default.
    keys : int32 or int64 Tensor, shape (B or 1, rows, n)
        For each of those queries the keys wanted, negative for none; all keys by default.
    mask, positions
        As in `attention`; one mask for all heads.

    Returns
    -------
    scores : Tensor, shape (B, rows, Lk or n)
        float32 (float64 for float64 input).

    Raises
    ------
    QKVError
        As `attention`; ArgumentError for rows or keys that there are not and for a mask that differs by head.

    Notes
    -----
    Cost: 2 Hi Di FLOPs a pair and 4 bytes a score returned. A backward pass computes the products of heads again, a
    few rows at a time, and so keeps none of them.
    Source: DeepSeek-AI (2025), DeepSeek-V3.2, arXiv 2512.02556, equations 1 to 4.

    Examples
    --------
    >>> import torch, qkv
    >>> q, k = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 1, 6, 8)
    >>> target = qkv.weights(torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16), mask=qkv.causal()).mean(1)
    >>> scores = qkv.index_scores(q, k, torch.ones(1, 6, 4) / 8, mask=qkv.causal())
    >>> loss = -(target * scores.log_softmax(-1).masked_fill(target == 0, 0)).sum(-1).mean()
    >>> loss.backward()
    >>> scores.shape, q.grad.shape
    (torch.Size([1, 6, 6]), torch.Size([1, 4, 6, 8]))
    """
    call = "qkv.index_scores()"
    if unknown:
        raise keywords.unknown(call, unknown, index_scores)
    known = as_mask(mask, call)
    if isinstance(k, KVView):
        rule, fix = "scores are those of tensors: a cache keeps no gradients", "Pass k as (B, 1, Lk, Di)"
        raise ArgumentTypeError.of(call, rule, "a cache's view", fix)
    _check(call, q, k, weights)
    if known is not None and known.varies_by_head:
        raise ArgumentError.of(call, "scores are one for all heads", repr(known), "Leave out what differs by head")
    problem, inputs = validate(call, q[:, :1], k, k[..., :0], known, Options(positions))
    chosen = indices_of(call, "rows", rows, problem.Lq, "Lq").to(q.device)
    wanted = None if keys is None else _wanted(call, keys, problem, len(chosen))
    step = max(1, _KEPT // max(problem.B * q.shape[1] * (problem.Lk if wanted is None else wanted.shape[2]), 1))
    parts = []
    with no_autocast(problem.device):
        for at, some in zip(range(0, max(len(chosen), 1), step), chosen.split(step), strict=True):
            mine = None if wanted is None else wanted[:, at : at + step]
            seen = _seen_by(problem, inputs, some, mine)
            parts.append(_again(_scores_of, q[:, :, some], k[:, 0], weights[:, some], mine, seen, problem.accumulate))
    return torch.cat(parts, dim=1)


# ------------------------------------------------------------------------------------------------------------- checks
def _check(call: str, q: Any, k: Any, weights: Any) -> None:
    """Raise unless the indexer's tensors fit together; the rest is checked as in any call."""
    if not isinstance(q, Tensor) or (not isinstance(k, Tensor) and not isinstance(k, KVView)):
        name, x = ("k", k) if isinstance(q, Tensor) else ("q", q)
        raise no_tensor(call, name, x, "Pass q (B, Hi, Lq, Di), k (B, 1, Lk, Di) and weights (B, Lq, Hi)")
    keys = k.k if isinstance(k, KVView) else k
    if q.dim() != 4 or keys.dim() != 4 or keys.shape[1] != 1 or q.shape[1] == 0:
        rule = "an indexer has queries (B, Hi, Lq, Di) of Hi >= 1 heads and keys (B, 1, Lk, Di) of one"
        fix = "Add the dimension of heads with k.unsqueeze(1); of a cache take index_view()"
        raise ShapeError.of(call, rule, named(q=q, k=keys), fix)
    if not isinstance(weights, Tensor):
        raise no_tensor(call, "weights", weights, "Pass one number a query and head: (B, Lq, Hi)")
    want = (q.shape[0], q.shape[2], q.shape[1])
    if not weights.is_floating_point() or weights.device != q.device:
        given = f"{shown(weights)} on {weights.device}"
        rule = "weights must be a floating tensor on q's device"
        raise ArgumentTypeError.of(call, rule, given, "Convert them with .to(q)")
    if tuple(weights.shape) != want:
        rule, fix = "weights must be (B, Lq, Hi)", "Transpose them, or check the heads of q"
        raise ShapeError.of(call, rule, f"{named(q=q, weights=weights)}, wanted {want}", fix)
    if torch.compiler.is_compiling() or any(map(transformed, (q, keys, weights))):
        rule, fix = "what an indexer chooses depends on the data", "Call it outside of the traced or mapped function"
        raise UnsupportedError.of(call, rule, f"{named(q=q, k=keys)} inside of one", fix)


def _heads(call: str, mask: Mask | None, heads: Any) -> int:
    if mask is None or not mask.varies_by_head:
        return 1
    if heads is None:
        rule, given = "a mask that differs by head needs to know how many there are", repr(mask)
        raise ArgumentError.of(call, rule, given, "Pass heads=Hq, or choose under what all heads share")
    return integer(call, "heads", heads, low=1)


def _wanted(call: str, keys: Any, problem: Problem, rows: int) -> Tensor:
    found = integers(call, "keys", keys, low=None, dims=(3,))
    if found.shape[0] not in (1, problem.B) or found.shape[1] != rows:
        given = f"keys {tuple(found.shape)}, B={problem.B} and {rows} rows"
        raise ShapeError.of(call, "keys must be (B or 1, rows, n)", given, "Pass a list for each chosen row")
    if found.numel() and int(found.max()) >= problem.Lk:
        given = f"a key {int(found.max())} and Lk={problem.Lk}"
        raise ArgumentError.of(call, "keys must be those that there are", given, "Use -1 for none")
    return found.to(keys.device if isinstance(keys, Tensor) else "cpu").expand(problem.B, -1, -1)


# --------------------------------------------------------------------------------------------------------- batch rows
def _of_tensors(
    call: str, q: Tensor, k: Tensor, weights: Tensor, mask: Mask | None, options: Options, Hq: int
) -> list[_Row]:
    problem, inputs = validate(call, q[:, :1].expand(-1, Hq, -1, -1), k, k[..., :0], mask, options)
    at = inputs.positions
    lines = [None if at is None else at[b if at.shape[0] > 1 else 0] for b in range(problem.B)]
    q, k = q.resolve_neg(), k.resolve_neg()

    def keys(b: int) -> Callable[[int, int], Tensor]:
        return lambda start, stop: k[b, 0, start:stop]

    return [_Row(b, q[b], weights[b], keys(b), problem, line) for b, line in enumerate(lines)]


def _of_view(
    call: str, q: Tensor, view: KVView, weights: Tensor, mask: Mask | None, options: Options, Hq: int
) -> list[_Row]:
    alone = q[:, :1].expand(-1, Hq, -1, -1)
    check_view(call, alone, view, None, options)
    lengths, queries = view.layout.lengths, view.layout.queries
    seen, first, rows = joined(call, mask, view.held), 0, []
    for i, Lk in enumerate(lengths):
        Lq = q.shape[2] if queries is None else queries[i]
        problem, _ = problem_of(call, alone, view, seen, options, Group(Lq, Lk, (i,)))
        here = (i, slice(None)) if queries is None else (0, slice(first, first + Lq))
        rows.append(_Row(i, q[here[0], :, here[1]], weights[here], reader(view, i), problem, None))
        first += Lq
    return rows


# ------------------------------------------------------------------------------------------------------------- choice
class _Scratch(NamedTuple):
    """Memory that tiles use in turn: fresh memory for each costs a fifth of the time."""

    keys: Tensor  # (K, Di)
    products: Tensor  # (T Hi K,)


class _Best(NamedTuple):
    """Candidates in ascending order of keys, as many for each head and query; -inf is a key that it does not see."""

    scores: Tensor  # (H, T, n)
    keys: Tensor  # int64 (H, T, n)


def _chosen(row: _Row, top_k: int) -> Tensor:
    """The chosen keys of all queries, int32 (H, Lq, min(top_k, Lk)), ascending, -1 for none."""
    p, (Hi, Lq, Di) = row.problem, row.q.shape
    T = max(1, min(_QUERIES, Lq, _PRODUCTS // (Hi * _KEYS[0])))
    K = max(_KEYS[0], min(_KEYS[1], _PRODUCTS // max(Hi * T, Di)))
    H = p.Hq if p.varies_by_head else 1
    made: Any = {"dtype": p.accumulate, "device": row.q.device}
    if row.positions is None:
        lines = [HeadRow(row.b, h, p.offset(row.b), None) for h in range(H)]
    else:
        lines = [HeadRow(row.b, h, 0, row.positions.cpu()) for h in range(H)]
    one = H * Lq * p.Lk <= _SEEN and Lq <= T
    schedule = None if one else Schedule(p.mask, lines, Lq, p.Lk, T, K)
    scratch = _Scratch(torch.empty((K, Di), **made), torch.empty((T * Hi * K,), **made))
    chosen = torch.full((H, Lq, min(top_k, p.Lk)), -1, dtype=torch.int32, device=row.q.device)
    for tile, first in enumerate(range(0, Lq, T)):
        here = slice(first, min(first + T, Lq))
        tiles = _tiles(row, H, K) if schedule is None else list(schedule.keys(tile))
        found = _best(row, here, tiles, H, top_k, scratch)
        if found is not None:
            keys = found.keys.masked_fill(found.scores == -torch.inf, -1).sort(-1).values
            chosen[:, here, chosen.shape[2] - keys.shape[2] :] = keys.to(torch.int32)
    return chosen


def _tiles(row: _Row, H: int, K: int) -> list[KeyTile]:
    """The tiles that few queries see, by looking: in decode that takes less than a mask's intervals."""
    p, ends = row.problem, range(0, row.problem.Lk, K)
    if p.mask is None:
        return [KeyTile(start, min(start + K, p.Lk), True) for start in ends]
    j = torch.arange(p.Lk, device=row.q.device)
    seen = _visible(row, slice(0, row.q.shape[1]), j, H).expand(H, row.q.shape[1], p.Lk).flatten(0, 1)
    some, every = seen.any(0), seen.all(0)
    spare = -p.Lk % K
    touched = torch.nn.functional.pad(some, (0, spare)).view(-1, K).any(1).tolist()
    full = torch.nn.functional.pad(every, (0, spare), value=True).view(-1, K).all(1).tolist()
    return [KeyTile(start, min(start + K, p.Lk), full[n]) for n, start in enumerate(ends) if touched[n]]


def _best(row: _Row, here: slice, tiles: list[KeyTile], H: int, top_k: int, scratch: _Scratch) -> _Best | None:
    """The best keys of a tile of queries; None where its mask shows no tile of keys."""
    p, T, device = row.problem, here.stop - here.start, row.q.device
    q = row.q[:, here].to(p.accumulate).transpose(0, 1).flatten(0, 1)  # (T Hi, Di)
    weights = row.weights[here, None].to(p.accumulate)  # (T, 1, Hi)
    all_fit = sum(tile.stop - tile.start for tile in tiles) <= top_k  # no score can matter
    best: _Best | None = None
    waiting: list[Tensor] = []
    keys: list[Tensor] = []
    width = 0
    for at, tile in enumerate(tiles):
        if all_fit:
            scores = torch.zeros((T, tile.stop - tile.start), dtype=p.accumulate, device=device)
        else:
            scores = _scores(q, weights, row.keys(tile.start, tile.stop), scratch)
        j = torch.arange(tile.start, tile.stop, device=device)
        scores = scores.expand(H, -1, -1)
        if not tile.full:
            scores = torch.where(_visible(row, here, j, H), scores, -torch.inf)
        waiting.append(scores)
        keys.append(j)
        width += len(j)
        if width >= max(_SPAN, 4 * top_k) or at + 1 == len(tiles):
            best = _top(best, torch.cat(waiting, -1), torch.cat(keys), top_k)
            waiting, keys, width = [], [], 0
    return best


def _scores(q: Tensor, weights: Tensor, k: Tensor, scratch: _Scratch) -> Tensor:
    """(T, K) scores of queries (T Hi, Di) with weights (T, 1, Hi); what is NaN is +inf, -inf a finite number."""
    rows, width = q.shape[0], k.shape[0]
    if k.dtype != q.dtype:
        k = scratch.keys[:width].copy_(k)
    products = scratch.products[: rows * width].view(rows, width)
    torch.mm(q, k.t(), out=products).relu_()
    scores = torch.bmm(weights, products.view(weights.shape[0], weights.shape[2], width))[:, 0]
    return scores.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(scores.dtype).min)


def _visible(row: _Row, here: slice, j: Tensor, H: int) -> Tensor:
    """bool, broadcasts to (H, T, keys)."""
    p, device = row.problem, j.device
    i = torch.arange(here.start, here.stop, device=device)
    at = i + p.offset(row.b) if row.positions is None else row.positions[here]
    b, h = torch.tensor([[[[row.b]]]], device=device, dtype=torch.int64), torch.arange(H, device=device)
    assert p.mask is not None
    seen = p.mask.visible(Tile.pairs(b, h[:, None, None], i[:, None], at[:, None], j), p.sizes)
    return seen[0] if seen.dim() == 4 else seen


def _top(best: _Best | None, scores: Tensor, keys: Tensor, top_k: int) -> _Best:
    """The best of what was best and of new scores (H, T, n), whose keys (n,) come later; of equal ones the first."""
    if best is not None:
        scores = torch.cat((best.scores, scores), -1)
        own = torch.cat((best.keys, keys.expand(*best.keys.shape[:2], -1)), -1)
    if scores.shape[-1] <= top_k:
        return _Best(scores, keys.expand_as(scores) if best is None else own)
    found = scores.topk(top_k, dim=-1, sorted=False)
    least = found.values.amin(-1, keepdim=True)
    equal = scores == least
    at = found.indices.sort(-1).values
    left_out = equal.sum(-1) > (found.values == least).sum(-1)  # which of them topk takes is not said
    if bool((left_out & (least[..., 0] > -torch.inf)).any()):
        above = scores > least
        kept = above | (equal & (equal.cumsum(-1) <= top_k - above.sum(-1, keepdim=True)))
        at = kept.nonzero()[:, -1].view(*scores.shape[:-1], top_k)
    return _Best(scores.gather(-1, at), keys[at] if best is None else own.gather(-1, at))


# ---------------------------------------------------------------------------------------------- scores with gradients
def _seen_by(problem: Problem, inputs: Inputs, rows: Tensor, keys: Tensor | None) -> Tensor | None:
    """Which keys the chosen queries see, (B or 1, rows, keys); None: all."""
    seen = None if keys is None else keys >= 0
    if problem.mask is None:
        return seen
    device = rows.device
    b = torch.arange(problem.B if problem.varies_by_batch or keys is not None else 1, device=device)[:, None, None]
    offset = torch.tensor([problem.offset(n) for n in range(len(b))], dtype=torch.int64, device=device)[:, None]
    p = rows + offset if inputs.positions is None else inputs.positions[:, rows]
    j = torch.arange(problem.Lk, device=device) if keys is None else keys.clamp(min=0).to(torch.int64)
    zero = torch.zeros_like(b)[..., None]
    j = j[:, None] if keys is not None else j
    at = Tile.pairs(b[..., None], zero[:1], rows[:, None], p[:, None, :, None], j)
    shown = problem.mask.visible(at, problem.sizes).expand(len(b), 1, len(rows), j.shape[-1])[:, 0]
    return shown if seen is None else shown & seen


def _again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """The function, computed anew in a backward pass in place of what it would keep."""
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return function(*args)
    found: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return found


def _scores_of(
    q: Tensor, k: Tensor, weights: Tensor, keys: Tensor | None, seen: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(B, rows, keys) of q (B, Hi, rows, Di), k (B, Lk, Di), weights (B, rows, Hi), and keys (B, rows, n)."""
    q, k, weights = q.to(dtype), k.to(dtype), weights.to(dtype)
    if keys is None:
        if seen is not None:  # a key that no chosen query sees may hold anything
            k = k.masked_fill(~seen.any(1)[..., None], 0)
        products = torch.einsum("bhrd,bsd->brhs", q, k)
    else:
        b = torch.arange(len(k), device=k.device)[:, None, None]
        own = k[b, keys.clamp(min=0).to(torch.int64)]
        if seen is not None:
            own = own.masked_fill(~seen[..., None], 0)
        products = torch.einsum("bhrd,brsd->brhs", q, own)
    scores = torch.einsum("brh,brhs->brs", weights, products.relu())
    return scores if seen is None else torch.where(seen, scores, -torch.inf)
