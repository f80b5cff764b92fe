"""Native sparse attention as a function: compressed blocks, selected blocks and a window, added by gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.call import keywords
from qkv.call.keys import KVView
from qkv.errors import ArgumentError, ShapeError
from qkv.functional import attention
from qkv.masks import Mask, causal, prefix, selected_blocks, sliding_window
from qkv.masks.positions import resolve_positions
from qkv.nn.choice import Pattern, checked, chosen_blocks

_CALL = "qkv.native_sparse_attention()"


class Keys(NamedTuple):
    """What each branch attends to; a cache's view has no values beside it."""

    k_cmp: Tensor
    v_cmp: Tensor | None  # None: `entries` holds them
    k_slc: Tensor | KVView
    v_slc: Tensor | None
    k_swa: Tensor | KVView
    v_swa: Tensor | None
    entries: KVView | None = None  # compressed keys and values where they lie, for queries that see them all
    first: int = 0  # the first of those that is one


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_swa: Tensor | None = None,
    v_swa: Tensor | None = None,
    block: int = 32,
    stride: int = 16,
    selected_block: int = 64,
    top_k: int = 16,
    initial: int = 1,
    local: int = 2,
    window: int = 512,
    positions: Any = None,
    scale: float | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor:
    """Attend to compressed blocks, to the tokens of selected blocks and to a window, and add the three by their gates.

    ::

        o = g_cmp attention(q, k_cmp, v_cmp, blocks wholly at or before the query)
          + g_slc attention(q, k, v, selected_blocks(the top_k most important) & causal())
          + g_swa attention(q, k_swa, v_swa, sliding_window(window))

    Parameters
    ----------
    q : Tensor, shape (B, Hq, Lq, D)
    k : Tensor, shape (B, Hkv, Lk, D)
    v : Tensor, shape (B, Hkv, Lk, Dv)
        Of the selected blocks; of the other branches where those have none of their own.
    g_cmp, g_slc, g_swa : Tensor, shape (B, Hq, Lq)
        What each branch's output is multiplied by. A branch without a gate is left out, and costs nothing but for the
        importance of blocks.
    k_cmp : Tensor, shape (B, Hkv, Lc, D)
    v_cmp : Tensor, shape (B, Hkv, Lc, Dv)
        Compressed keys and values, Lc = (Lk - block) // stride + 1, or 0 where Lk < block: number c stands for the
        tokens c stride .. c stride + block - 1. The means of k and v over those unless given.
    k_swa, v_swa : Tensor, as k and v
        Of the window.
    block, stride, selected_block, top_k, window : int
        The paper's l, d, l', n and w. stride divides block and selected_block.
    initial, local : int
        How many first blocks and how many last ones, the query's own among these, are always selected, within top_k.
    positions : "start", "end", int, B ints or int Tensor (B or 1, Lq)
        Where the queries stand among the keys; needed where Lq != Lk.
    scale, backend
        As in `qkv.attention`.

    Returns
    -------
    Tensor, shape (B, Hq, Lq, Dv)
        A query that stands before the end of the first compressed block gets 0 from that branch.

    Raises
    ------
    ShapeError, ArgumentError, ArgumentTypeError
        Arguments that do not fit.

    Notes
    -----
    Selection. The weights of the compressed branch say how important each block of `selected_block` tokens is to a
    query: their sum over the query heads of a key/value head, each counted by the strides that both blocks share. All
    those heads read the top_k blocks with the largest sums among the blocks that begin at or before the query; of equal
    ones the lower, and all of them where there are fewer. The choice has no gradient: g_cmp's branch is what learns.
    Importance is computed in float32 for some rows at a time and never held for all.

    Cost: pairs of Lq / stride compressed blocks, top_k selected_block tokens and window tokens a query, forward and
    backward, 2 (D + Dv) FLOPs each forward, and 2 D for the importance of a compressed block.
    Source: Yuan et al. (2025), Native Sparse Attention, arXiv 2502.11089. Names of arguments: flash-linear-attention,
    whose block_size is block, stride and selected_block in one and whose block_counts is top_k.

    Examples
    --------
    >>> import torch, qkv
    >>> q, k, v = torch.randn(1, 8, 100, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    >>> g_cmp, g_slc, g_swa = torch.rand(3, 1, 8, 100)
    >>> qkv.native_sparse_attention(q, k, v, g_cmp=g_cmp, g_slc=g_slc, g_swa=g_swa, block=8, stride=4,
    ...                             selected_block=8, top_k=4, window=16).shape
    torch.Size([1, 8, 100, 16])
    """
    if unknown:
        raise keywords.unknown(_CALL, unknown, native_sparse_attention)
    pattern = checked(_CALL, Pattern(block, stride, selected_block, top_k, initial, local, window))
    gates = (g_cmp, g_slc, g_swa)
    _check(q, k, gates, {"k_cmp": (k_cmp, v_cmp), "k_swa": (k_swa, v_swa)})
    places = _places(q, k.shape[2], positions)
    if k_cmp is None or v_cmp is None:
        k_cmp, v_cmp = mean(windows(k, pattern)), mean(windows(v, pattern))
    if k_cmp.shape[2] != pattern.compressed(k.shape[2]):
        given = f"k_cmp {tuple(k_cmp.shape)}, k {tuple(k.shape)}, block={block} and stride={stride}"
        fix = f"Pass {pattern.compressed(k.shape[2])} of them"
        raise ShapeError.of(_CALL, "there must be a compressed key for each whole block", given, fix)
    keys = Keys(k_cmp, v_cmp, k, v, *((k, v) if k_swa is None else (k_swa, v_swa)))

    def attend(q: Tensor, k: Tensor | KVView, v: Tensor | None, mask: Mask, **more: Any) -> Any:
        return attention(q, k, v, mask, scale=scale, backend=backend, **more)

    where = positions if q.shape[2] != k.shape[2] or positions is not None else None
    return branches(attend, q, keys, gates, places, pattern, scale, k.shape[2], where)


def _places(q: Tensor, Lk: int, positions: Any) -> Tensor:
    """Where the queries stand among the keys, int64 (B or 1, Lq)."""
    B, _, Lq, _ = q.shape
    if positions is None:
        if Lq != Lk:
            rule = "positions= must say where the queries stand when Lq != Lk"
            fix = f'Pass positions="end" ({Lk - Lq} .. {Lk - 1}), "start", an int or a tensor'
            raise ArgumentError.of(_CALL, rule, f"Lq={Lq} and Lk={Lk}", fix)
        return torch.arange(Lq, device=q.device)[None]
    return resolve_positions(_CALL, positions, B=B, Lq=Lq, Lk=Lk).to(q.device)


def _check(q: Tensor, k: Tensor, gates: tuple[Tensor | None, ...], pairs: dict[str, tuple[Any, Any]]) -> None:
    """What attention() does not see or would not name."""
    if q.dim() != 4 or k.dim() != 4:
        given = f"q {tuple(q.shape)} and k {tuple(k.shape)}"
        raise ShapeError.of(_CALL, "q and k must be (B, H, L, D)", given, "Reshape them")
    if all(gate is None for gate in gates):
        fix = "Pass one of g_cmp, g_slc and g_swa, such as torch.ones(B, Hq, Lq)"
        raise ArgumentError.of(_CALL, "a branch without a gate is left out", "no gate at all", fix)
    for name, gate in zip(("g_cmp", "g_slc", "g_swa"), gates, strict=True):
        if gate is not None and gate.shape != q.shape[:3]:
            given = f"{name} {tuple(gate.shape)} and q {tuple(q.shape)}"
            raise ShapeError.of(_CALL, f"{name} must be (B, Hq, Lq)", given, "Transpose it from (B, Lq, Hq)")
    for name, (keys, values) in pairs.items():
        if (keys is None) != (values is None):
            given = f"{name} and no {name.replace('k', 'v', 1)}" if values is None else f"no {name} but its values"
            raise ArgumentError.of(_CALL, "a branch has keys and values of its own, or neither", given, "Pass both")


def branches(
    attend: Callable[..., Any],
    q: Tensor,
    keys: Keys,
    gates: tuple[Tensor | None, ...],
    places: Tensor,
    pattern: Pattern,
    scale: float | None,
    Lk: int,
    positions: Any = None,
) -> Tensor:
    """The sum of the gated branches; `attend` is attention() with options, `positions` None over a cache's view."""
    g_cmp, g_slc, g_swa = gates
    parts: list[Tensor] = []
    if g_cmp is not None or g_slc is not None:
        if keys.entries is not None:
            out, lse = attend(q, keys.entries, None, ~prefix(keys.first) if keys.first else None, return_lse=True)
        else:
            # In numbers of blocks, a query sees up to the newest that lies before it: causal, but for where it stands.
            newest = pattern.newest(places)
            out, lse = attend(q, keys.k_cmp, keys.v_cmp, causal(), positions=newest, return_lse=True)
        if g_cmp is not None:
            parts.append(out * g_cmp[..., None])
    if g_slc is not None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with torch.no_grad():
            indices = chosen_blocks(q, keys.k_cmp, lse, places, pattern, scale, Lk)
        parts.append(_selected(attend, q, keys, indices, places, pattern, positions) * g_slc[..., None])
    if g_swa is not None:
        near = sliding_window(pattern.window)
        parts.append(attend(q, keys.k_swa, keys.v_swa, near, positions=positions) * g_swa[..., None])
    return sum(parts[1:], parts[0])


def _selected(
    attend: Callable[..., Any],
    q: Tensor,
    keys: Keys,
    indices: Tensor,
    places: Tensor,
    pattern: Pattern,
    positions: Any,
) -> Tensor:
    """Attention to the selected blocks."""
    Hkv, group = indices.shape[1], q.shape[1] // max(indices.shape[1], 1)
    out: Tensor
    if group == 1 or isinstance(keys.k_slc, KVView):
        mask = selected_blocks(indices, pattern.selected_block) & causal()
        out = attend(q, keys.k_slc, keys.v_slc, mask, positions=positions)
        return out
    # As queries of one head, one after the other: the heads of a group read the same blocks, so a tile of queries that
    # holds all of them meets fewer blocks than one of as many tokens.
    mask = selected_blocks(indices, pattern.selected_block, queries=group) & causal()
    turned = q.unflatten(1, (Hkv, group)).transpose(2, 3).flatten(2, 3)
    out = attend(turned, keys.k_slc, keys.v_slc, mask, positions=places.repeat_interleave(group, 1))
    by_head: Tensor = out.unflatten(2, (q.shape[2], group)).transpose(2, 3)
    return by_head.flatten(1, 2)


def windows(x: Tensor, pattern: Pattern) -> Tensor:
    """The tokens of each compressed block, a view (B, H, Lc, block, width) of x (B, H, L, width)."""
    if x.shape[2] < pattern.block:
        return x[:, :, :0, None].expand(-1, -1, -1, pattern.block, -1)
    return x.unfold(2, pattern.block, pattern.stride).mT


def mean(tokens: Tensor) -> Tensor:
    """Blocks (..., block, width) as their means, added up in float32 or wider."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return tokens.mean(-2, dtype=wide).to(tokens.dtype)
