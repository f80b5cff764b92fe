"""Views of pages that someone else keeps: a pool of the caller's own, with tables as vLLM or FlashInfer have them."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from qkv.cache import checks
from qkv.call.keys import Clock, KVLayout, KVView
from qkv.checks import DTYPES, given_as, integers, no_tensor, short, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError

_CALL = "qkv.cache.stored()"


def stored(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor | tuple[Tensor, Tensor],
    lengths: Any,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    queries: Any = None,
    dtype: torch.dtype | None = None,
) -> KVView:
    """A view of a page pool of your own, for `qkv.attention(q, view)`; nothing is copied but the table.

    Parameters
    ----------
    k_pages : Tensor, shape (N, Hkv, P, D)
        N pages of P slots; rows of D numbers without gaps. A pool (N, P, Hkv, D) is passed as pool.transpose(1, 2).
    v_pages : Tensor, shape (N, Hkv, P, Dv)
        May be a view of k_pages' leading columns.
    table : Tensor, int32, shape (n, max_pages), or tuple (indptr (n + 1,), indices)
        The pages of each sequence in order, padded with anything, or all tables one after the other. Entries past a
        sequence's length are not looked at.
    lengths : n ints or int Tensor (n,)
        Keys of each sequence.
    k_scale, v_scale : Tensor, float32, shape (N, Hkv, P)
        For int8 and float8_e4m3fn pools: what a stored number stands for.
    queries : n ints
        Ragged: queries of each sequence, packed as q (1, Hq, sum, D).
    dtype : torch.dtype
        Of queries and outputs; the pool's unless it is in 8 bits, where it must be given.

    Returns
    -------
    KVView
        Of the pages as they are when attention reads them; the table is the one of now.

    Raises
    ------
    ShapeError, ArgumentError, ArgumentTypeError
        A page number that is negative or too large in the used part, a table that is too short, or shapes, dtypes and
        devices that do not fit.

    Notes
    -----
    Cost: a pass over the table.

    Examples
    --------
    >>> import torch, qkv
    >>> k, v = torch.randn(2, 9, 4, 16, 8).unbind(0)
    >>> table = torch.tensor([[7, 2, -1], [0, 5, 8]], dtype=torch.int32)
    >>> view = qkv.cache.stored(k, v, table, [20, 40])
    >>> view.layout.tables.tolist(), view.layout.starts.tolist()
    ([7, 2, 0, 5, 8], [0, 2, 5])
    """
    _check_pool(k_pages, v_pages, k_scale, v_scale)
    dtype = _read_as(k_pages.dtype, dtype)
    N, _, P, _ = k_pages.shape
    held = _amounts("lengths", lengths)
    pages = -(-held // P)
    if isinstance(table, tuple):
        used, starts = _from_csr(table, pages)
    else:
        used, starts = _from_table(table, pages)
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= N):
        wrong = int(used.min()) if int(used.min()) < 0 else int(used.max())
        given = f"page {wrong} in the table, {N} pages in the pool"
        fix = "Give each sequence ceil(length / P) pages of the pool; only entries past them are not looked at"
        raise ArgumentError.of(_CALL, f"page numbers of the used part must be in 0 .. {N - 1}", given, fix)
    counts = None
    if queries is not None:
        asked = checks.counts(_CALL, "queries", queries, len(held))
        for count, length in zip(asked, held.tolist(), strict=True):
            if count > length:
                given = f"{count} queries and {length} keys"
                fix = "Store the keys of the queries' own tokens first"
                raise ArgumentError.of(_CALL, "queries are a sequence's last tokens", given, fix)
        counts = array("q", asked)
    layout = KVLayout(
        array("i", used.tolist()), array("q", starts.tolist()), array("q", held.tolist()), counts, Clock()
    )  # fmt: skip
    return KVView(k_pages.detach(), v_pages.detach(), k_scale, v_scale, dtype, layout, None)


def _check_pool(k: Any, v: Any, k_scale: Any, v_scale: Any) -> None:
    for name, x in (("k_pages", k), ("v_pages", v)):
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            raise no_tensor(_CALL, name, x, f"Pass {name} (N, Hkv, P, D)")
        if x.ndim != 4:
            rule, fix = f"{name} must be (N, Hkv, P, D)", "Reshape it; (N, P, Hkv, D) is pool.transpose(1, 2)"
            raise ShapeError.of(_CALL, rule, f"{name} {tuple(x.shape)}", fix)
        if x.is_meta:
            raise ArgumentError.of(_CALL, "pages must have values", f"{name} on meta", "Pass tensors with data")
        if x.shape[3] > 1 and x.stride(3) != 1:
            rule = f"a row of {name} must lie in memory without gaps"
            raise ShapeError.of(_CALL, rule, f"strides {x.stride()}", f"Pass {name}.contiguous()")
    if k.shape[:3] != v.shape[:3] or 0 in k.shape[1:]:
        given = f"k_pages {tuple(k.shape)} and v_pages {tuple(v.shape)}"
        rule = "k_pages and v_pages must have the same N, Hkv and P, with Hkv, P and D of at least 1"
        raise ShapeError.of(_CALL, rule, given, "Pass pools of the same pages")
    if k.dtype != v.dtype or k.device != v.device:
        given = f"k_pages {short(k.dtype)} on {k.device}, v_pages {short(v.dtype)} on {v.device}"
        rule = "k_pages and v_pages must share dtype and device"
        raise ArgumentTypeError.of(_CALL, rule, given, "Convert or move one of them")
    if k.dtype not in checks.LARGEST and k.dtype not in DTYPES:
        fix = "Use float64, float32, bfloat16, float16, or int8 and float8_e4m3fn with scales"
        raise ArgumentTypeError.of(_CALL, "pages must be in a dtype of caches", short(k.dtype), fix)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is None) == (k.dtype in checks.LARGEST):
            given = f"{name}={'None' if scale is None else shown(scale)} and pages in {short(k.dtype)}"
            fix = f"{'Pass' if scale is None else 'Leave out'} {name}"
            raise ArgumentError.of(_CALL, "int8 and float8 pages have scales, and only they", given, fix)
        if scale is not None:
            if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.device != k.device:
                rule = f"{name} must be a float32 tensor on the pool's device"
                raise ArgumentTypeError.of(_CALL, rule, given_as(name, scale), f"Pass {name} (N, Hkv, P)")
            if scale.shape != k.shape[:3]:
                given = f"{name} {tuple(scale.shape)} and pages {tuple(k.shape)}"
                raise ShapeError.of(_CALL, f"{name} must be (N, Hkv, P)", given, "Pass one scale a slot and head")


def _read_as(stored_as: torch.dtype, dtype: Any) -> torch.dtype:
    if stored_as in checks.LARGEST:
        if dtype is None:
            fix = "Pass dtype=torch.bfloat16, or the dtype of your queries"
            rule = "8-bit pages need the dtype of queries and outputs"
            raise ArgumentError.of(_CALL, rule, f"pages in {short(stored_as)} and no dtype", fix)
        return checks.float_dtype(_CALL, dtype)
    if dtype is not None and checks.float_dtype(_CALL, dtype) != stored_as:
        given = f"dtype={short(dtype)} and pages in {short(stored_as)}"
        raise ArgumentTypeError.of(_CALL, "queries have the dtype of pages without scales", given, "Leave dtype out")
    return stored_as


def _amounts(name: str, value: Any) -> Tensor:
    found = integers(_CALL, name, value)
    if found.numel() and int(found.max()) > 2**31 - 1:
        given = f"{name} with {int(found.max())}"
        raise ArgumentError.of(_CALL, f"{name} must be below 2**31", given, "Pass the keys of each sequence")
    return found


def _pages_tensor(name: str, value: Any, ndim: int) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.int32:
        given = f"{name}={shown(value)}" + ("" if isinstance(value, Tensor) else f" ({type(value).__name__})")
        rule = f"{name} must be an int32 tensor"
        raise ArgumentTypeError.of(_CALL, rule, given, f"Convert it with torch.as_tensor({name}, dtype=torch.int32)")
    if value.ndim != ndim:
        rule = f"{name} must have {ndim} dimension{'s' * (ndim > 1)}"
        raise ShapeError.of(_CALL, rule, f"{name} {tuple(value.shape)}", "Reshape it")
    if value.device.type != "cpu":
        given = f"{name} on {value.device}"
        raise ArgumentTypeError.of(_CALL, "page tables are read on the CPU", given, "Move it with .cpu()")
    return value.detach().to(torch.int64)


def _starts(pages: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), pages.cumsum(0)))


def _from_table(table: Any, pages: Tensor) -> tuple[Tensor, Tensor]:
    rows = _pages_tensor("table", table, 2)
    if rows.shape[0] != len(pages):
        given = f"table {tuple(rows.shape)} and {len(pages)} lengths"
        raise ShapeError.of(_CALL, "table must have one row a sequence", given, "Pass (n, max_pages) and n lengths")
    if len(pages) and int(pages.max()) > rows.shape[1]:
        given = f"rows of {rows.shape[1]} pages, and a sequence that needs {int(pages.max())}"
        raise ShapeError.of(_CALL, "each row must name ceil(length / P) pages", given, "Pass the whole table")
    return rows[torch.arange(rows.shape[1], device="cpu") < pages[:, None]], _starts(pages)


def _from_csr(table: tuple[Any, ...], pages: Tensor) -> tuple[Tensor, Tensor]:
    if len(table) != 2:
        rule = "a table as a tuple is (indptr, indices)"
        raise ArgumentTypeError.of(_CALL, rule, f"{len(table)} entries", "Pass both, as int32 tensors")
    indptr, indices = _pages_tensor("indptr", table[0], 1), _pages_tensor("indices", table[1], 1)
    if len(indptr) != len(pages) + 1:
        given = f"indptr of {len(indptr)} and {len(pages)} lengths"
        raise ShapeError.of(_CALL, "indptr must have one entry a sequence and one more", given, "Pass n + 1 of them")
    spans = indptr.diff()
    if int(indptr[0]) != 0 or (spans < 0).any() or int(indptr[-1]) > len(indices):
        given = f"indptr from {int(indptr[0])} to {int(indptr[-1])}, {len(indices)} indices"
        rule = "indptr must begin at 0, not decrease, and stay within the indices"
        raise ArgumentError.of(_CALL, rule, given, "Pass the running sum of the sequences' page counts")
    if (spans < pages).any():
        row = int((spans < pages).nonzero()[0])
        given = f"{int(spans[row])} pages for sequence {row}, which needs {int(pages[row])}"
        raise ShapeError.of(_CALL, "each sequence must have ceil(length / P) pages", given, "Pass the whole table")
    starts = _starts(pages)
    at = torch.arange(int(starts[-1]), device="cpu")
    owner = torch.searchsorted(starts, at, right=True) - 1
    return indices[indptr[owner] + at - starts[owner]], starts
