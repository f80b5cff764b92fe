"""Native sparse attention as a layer: three branches of keys and values, their gates, and cached decoding."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor, nn

from qkv.cache.sparse import SparseCache, SparseLayerStep
from qkv.call import keywords
from qkv.call.keys import KVLayout, KVView
from qkv.call.view import gathered
from qkv.checks import integer
from qkv.errors import ArgumentError, ArgumentTypeError
from qkv.graph import eager
from qkv.nn.choice import Pattern, checked
from qkv.nn.divided import Divided, by_head, divided, gates_of, indivisible, joined, key_heads, read_by
from qkv.nn.layer import GATHER, Across, Layer, check_step, check_tokens, whole_only
from qkv.nn.nsa import Keys, branches, mean, windows
from qkv.rotary import Rotary, as_positions

_CALL = "qkv.nn.SparseAttention()"
_FORWARD = "qkv.nn.SparseAttention.forward()"


class Compression(nn.Module):
    """The paper's phi: a block of keys, or of values, to one; a perceptron over the block with learned positions.

    ::

        phi(x_1 .. x_l) = W_down gelu(W_up [x_1 + p_1 | .. | x_l + p_l])

    All heads share it. What the paper leaves open (depth, width, activation, sharing) is chosen here.

    Parameters
    ----------
    block : int
        l, tokens of a block.
    width : int
        Numbers in a key or value.
    hidden : int
    device, dtype : of the parameters
    """

    def __init__(self, block: int, width: int, hidden: int, **made: Any) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(block, width, **made))
        self.up_proj = nn.Linear(block * width, hidden, **made)
        self.down_proj = nn.Linear(hidden, width, **made)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.position)
        self.up_proj.reset_parameters()
        self.down_proj.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Blocks (..., l, width) as one token each (..., width)."""
        flat = (tokens + self.position).to(tokens.dtype).flatten(-2)
        out: Tensor = self.down_proj(nn.functional.gelu(self.up_proj(flat)))
        return out


class SparseAttention(Layer):
    """Native sparse attention: each token reads compressed blocks, the tokens of a few chosen blocks, and a window.

    ::

        q = rotary(x W_Q)      k_b = rotary(x W_K,b)      v_b = x W_V,b           b: compressed, selected, window
        compressed    attention(q, phi(blocks of k_c), phi(blocks of v_c))        blocks wholly at or before the token
        selected      attention(q, k_s, v_s)                                      in the top_k most important blocks
        window        attention(q, k_w, v_w)                                      the last tokens
        out = (g_c compressed + g_s selected + g_w window) W_O                    g = sigmoid(x W_G), one a head

    It is causal. Importance, ties and short sequences: `qkv.native_sparse_attention`, which is its arithmetic.

    Parameters
    ----------
    dim, num_heads, num_kv_heads, head_dim, value_dim, bias, out_bias, rotary
        As in `qkv.nn.Attention`. Query heads of one key/value head share their selected blocks.
    block, stride, selected_block, top_k, initial, local, window : int
        As in `qkv.native_sparse_attention`.
    compress : "mlp" or "mean"
        phi: a learned perceptron with positions within the block, one for keys and one for values, or their mean.
    compress_hidden : int
        Hidden width of "mlp"; 2 D unless given.
    shared_kv : bool
        One set of keys and values for all branches, as in flash-linear-attention: a third of the projections and of the
        cache. False, as in the paper: a set for each branch, so that no branch learns for another.
    scale, dropout_p, backend
        As in `qkv.attention`; dropout acts in training mode only, and not on what is selected.
    device, dtype : of the parameters

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes that do not fit, or an argument of another type.

    Notes
    -----
    ==================  ==========================  ===============================================
    here                the paper                   weight
    ==================  ==========================  ===============================================
    q_proj              W_Q                         (Hq D, dim)
    k_proj, v_proj      W_K, W_V of the branches    (3 Hkv D, dim), (3 Hkv Dv, dim): compressed,
                                                    selected, window; (Hkv D, dim) with shared_kv
    gate_proj           the MLP of the gates        (3 Hq, dim): of each head its three gates
    k_compress          phi, of keys                position (l, D), up_proj, down_proj
    v_compress          phi, of values              position (l, Dv), up_proj, down_proj
    o_proj              W_O                         (dim, Hq Dv)
    ==================  ==========================  ===============================================

    With shared_kv, compress="mean", block = stride = selected_block and gate_proj as its g_proj, this is
    flash-linear-attention's layer. Keys are compressed after rotary, as there; the paper does not say.

    Padding goes to the right of a row, where no token sees it. Packed documents would share compressed blocks: give
    them rows, or sequences of a cache, of their own.

    A cache holds 3 Hkv (D + Dv) numbers a token and Hkv (D + Dv) for each `stride` of them; a third of the first with
    shared_kv. Cost: 2 FLOPs a weight and token, phi's of each block, and those of `qkv.native_sparse_attention`.
    Source: Yuan et al. (2025), Native Sparse Attention, arXiv 2502.11089.

    Examples
    --------
    >>> import torch, qkv
    >>> layer = SparseAttention(64, 4, num_kv_heads=2, block=8, stride=4, selected_block=8, top_k=4, window=16,
    ...                         rotary=qkv.rotary.Rotary(16))
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        rotary: Rotary | None = None,
        block: int = 32,
        stride: int = 16,
        selected_block: int = 64,
        top_k: int = 16,
        initial: int = 1,
        local: int = 2,
        window: int = 512,
        compress: str = "mlp",
        compress_hidden: int | None = None,
        shared_kv: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._hold_heads(_CALL, dim, num_heads, num_kv_heads, head_dim, value_dim, rotary)
        self.rotary = rotary
        self.compress, self.shared_kv = compress, shared_kv
        self.pattern = checked(_CALL, Pattern(block, stride, selected_block, top_k, initial, local, window))
        if compress not in ("mlp", "mean"):
            raise ArgumentError.of(_CALL, 'compress is "mlp" or "mean"', f"compress={compress!r}", "Pass one of them")
        self._hold(_CALL, None, None, scale, dropout_p, backend)

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        out_bias = bias if out_bias is None else out_bias
        Hq, Hkv, D, Dv = self.num_heads, self.kept_heads, self.head_dim, self.value_dim
        self.q_proj = nn.Linear(self.dim, Hq * D, bias=bias, **made)
        self.k_proj = nn.Linear(self.dim, Hkv * D, bias=bias, **made)
        self.v_proj = nn.Linear(self.dim, Hkv * Dv, bias=bias, **made)
        self.gate_proj = nn.Linear(self.dim, 3 * Hq, bias=False, **made)
        self.o_proj = nn.Linear(Hq * Dv, self.dim, bias=out_bias, **made)
        hidden = 2 * D if compress_hidden is None else integer(_CALL, "compress_hidden", compress_hidden, low=1)
        learned = compress == "mlp"
        self.k_compress = Compression(self.pattern.block, D, hidden, **made) if learned else None
        self.v_compress = Compression(self.pattern.block, Dv, hidden, **made) if learned else None

    @property
    def kept_heads(self) -> int:
        """Heads of keys, and of values, of all branches."""
        return self.num_kv_heads * (1 if self.shared_kv else 3)

    def cache(
        self,
        *,
        pages: int | None = None,
        page_size: int = 64,
        sequences: int | None = None,
        capacity: int | None = None,
        layers: int = 1,
        dtype: torch.dtype | None = None,
        storage: torch.dtype | None = None,
        identity: str | bytes | int | None = None,
        debug: bool = False,
    ) -> SparseCache:
        """A cache for layers of these sizes, on the device of the parameters.

        Parameters
        ----------
        pages, page_size, sequences, capacity, layers, storage, identity, debug
            As for `qkv.cache.SparseCache`: pages, or sequences for a dense one.
        dtype : torch.dtype
            That of the parameters unless given: under autocast, its own.

        Returns
        -------
        SparseCache
        """
        weight = self.k_proj.weight
        return SparseCache(
            stride=self.pattern.stride,
            num_kv_heads=key_heads(self) * (1 if self.shared_kv else 3),
            compressed_heads=key_heads(self),
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            pages=pages,
            page_size=page_size,
            sequences=sequences,
            capacity=capacity,
            layers=layers,
            dtype=weight.dtype if dtype is None else dtype,
            storage=storage,
            device=weight.device,
            identity=identity,
            debug=debug,
        )

    def forward(
        self,
        x: Tensor,
        *,
        positions: int | Tensor | None = None,
        cache: SparseLayerStep | None = None,
        across: Across | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Attend within x, each token to itself and those before it.

        Parameters
        ----------
        x : Tensor, shape (B, L, dim)
        positions : int, or int Tensor (L,) or (B or 1, L)
            The tokens' positions for rotary, the first one's or each one's; 0 unless given. Blocks and the window go by
            the places 0 .. L - 1 in x.
        cache : qkv.cache.sparse.SparseLayerStep
            One layer of a step of a cache of this layer's sizes, `self.cache(...).step(seqs, T=...).layer(i)`. x is
            (n, T, dim), the next T tokens of each sequence, or ragged (1, sum T, dim). Their keys and values are
            stored, and the entries of the blocks that they complete; each token reads what its sequence holds. For
            inference only.
        across : qkv.distributed.Context
            Refused: blocks are compressed and chosen of whole sequences. `across.unshard(x)` gathers them.

        Returns
        -------
        Tensor, shape (B, L, dim)

        Raises
        ------
        ShapeError, ArgumentError, ArgumentTypeError
            Inputs that do not fit the layer or each other.
        UnsupportedError
            A cache and gradients, dropout, or a rotary scaling whose frequencies have changed since keys were stored;
            `across`.
        PagesExhausted
            A cache without room for the step; nothing was changed.

        Examples
        --------
        >>> import torch, qkv
        >>> layer = SparseAttention(64, 4, num_kv_heads=2, block=4, stride=2, selected_block=4, top_k=3, window=4)
        >>> cache = layer.cache(pages=8, page_size=16)
        >>> seqs, x = [cache.add(), cache.add()], torch.randn(2, 30, 64)
        >>> with torch.inference_mode():
        ...     prompt = layer(x[:, :29], cache=cache.step(seqs, T=29).layer(0))
        ...     last = layer(x[:, 29:], cache=cache.step(seqs, T=1).layer(0))
        ...     torch.allclose(last, layer(x)[:, 29:], atol=1e-5)
        True
        """
        if unknown:
            raise keywords.unknown(_FORWARD, unknown, SparseAttention.forward)
        check_tokens(_FORWARD, "x", x, "dim", self.dim)
        whole_only(_FORWARD, across, "a choice of blocks", GATHER)
        if cache is not None:
            return eager(SparseAttention._step)(self, x, positions, cache)
        at = 0 if positions is None else as_positions(_FORWARD, positions, x.shape[0], x.shape[1])
        q, k, v = self._project(x, at)
        ks, vs = self._by_branch(k), self._by_branch(v)
        ranks = self._ranks(q.shape[1])
        k_cmp, v_cmp = self._compressed(windows(ks[0], self.pattern), windows(vs[0], self.pattern), ranks)
        places = torch.arange(x.shape[1], device=x.device)[None]
        keys = Keys(k_cmp, v_cmp, ks[1], vs[1], ks[2], vs[2])
        return self._out(self._branches(q, keys, self._gates(x, q), places, x.shape[1]))

    def _step(self, x: Tensor, positions: Any, cache: SparseLayerStep) -> Tensor:
        """`forward` over a cache."""
        at = check_step(_FORWARD, self, x, positions, self.rotary, cache)
        self._check_cache(cache)
        q, k, v = self._project(x, at)
        blocks = cache.blocks(k, v, self.pattern.block)
        ranks = self._ranks(q.shape[1])
        cache.append(k, v, compressed=None if blocks is None else self._compressed(*blocks, ranks))
        view, entries, gates = cache.view(), cache.entries(), self._gates(x, q)
        counts = view.layout.queries
        if counts is None:
            return self._out(self._over(q, view, entries, gates, at))
        out = q.new_empty(*q.shape[:3], self.value_dim)
        starts = torch.tensor([0, *counts], device="cpu", dtype=torch.int64).cumsum(0).tolist()
        for count in sorted(set(counts) - {0}):
            chosen = [i for i, n in enumerate(counts) if n == count]

            def rows(t: Tensor, first: list[int] = [starts[i] for i in chosen], count: int = count) -> Tensor:  # noqa: B006
                return torch.cat([t[:, :, a : a + count] for a in first])  # (sequences, H, count, ...)

            mine = [rows(gate) for gate in gates]
            got = self._over(rows(q), _of(view, chosen), _of(entries, chosen), mine, rows(at[:, None])[:, 0])
            for one, i in zip(got, chosen, strict=True):
                out[0, :, starts[i] : starts[i + 1]] = one
        return self._out(out)

    def _over(self, q: Tensor, view: KVView, entries: KVView, gates: Any, at: Tensor) -> Tensor:
        """The branches over a cache's view, for sequences with equal numbers of queries."""
        first = self.pattern.block // self.pattern.stride - 1  # before it no entry is of a whole block
        slc, swa = (self._head_view(view, b) for b in (1, 2))
        if q.shape[2] == 1 and min(entries.layout.lengths, default=0):
            keys = Keys(_keys_of(entries)[:, :, first:], None, slc, None, swa, None, entries, first)
        else:  # some queries see fewer than their sequence has, or it has none
            k_cmp, v_cmp = gathered(entries)
            keys = Keys(k_cmp[:, :, first:], v_cmp[:, :, first:], slc, None, swa, None)
        return self._branches(q, keys, gates, at, max(view.layout.lengths, default=0))

    def _branches(self, q: Tensor, keys: Keys, gates: Any, places: Tensor, Lk: int) -> Tensor:
        return branches(self._attend, q, keys, gates, places, self.pattern, self.scale, Lk)

    def _project(self, x: Tensor, at: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, Hq, L, D), and the keys and values of all branches."""
        q = by_head(_FORWARD, "q_proj", self.q_proj(x), self.head_dim, self.num_heads)
        k = by_head(_FORWARD, "k_proj", self.k_proj(x), self.head_dim, self.kept_heads)
        v = by_head(_FORWARD, "v_proj", self.v_proj(x), self.value_dim, self.kept_heads)
        k, v = read_by(_FORWARD, self, self._ranks(q.shape[2]), k, v, 1 if self.shared_kv else 3)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rotary is not None:
            dtype = torch.promote_types(q.dtype, torch.float32)
            tables = self.rotary.tables(at, x.shape[1], device=x.device, dtype=dtype)
            q, k = self.rotary.apply(q, *tables), self.rotary.apply(k, *tables)
        return q, k, v

    def _ranks(self, here: int) -> Divided | None:
        """The ranks among which query heads are divided, `here` of them on this one; each must hold whole groups."""
        ranks = divided(_FORWARD, self, "q_proj", here)
        if ranks is not None and self.num_kv_heads % ranks.ranks:
            raise indivisible(_FORWARD, "num_kv_heads", self.num_kv_heads, ranks.ranks)
        return ranks

    def _gates(self, x: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        """A number for each branch, head and token: three of (B, heads of q, L)."""
        ranks = self._ranks(q.shape[1])
        gates = by_head(_FORWARD, "gate_proj", self.gate_proj(x), 3, self.num_heads)
        return gates_of(_FORWARD, self, ranks, gates, q.shape[1]).sigmoid().transpose(1, 2).unbind(-1)

    def _compressed(self, k: Tensor, v: Tensor, ranks: Divided | None) -> tuple[Tensor, Tensor]:
        """The keys and values of blocks (B, Hkv, Lc, block, D and Dv) as one each."""
        if self.k_compress is None or self.v_compress is None:
            return mean(k), mean(v)
        if ranks is not None:
            return ranks.shared(self.k_compress, k), ranks.shared(self.v_compress, v)
        return self.k_compress(k), self.v_compress(v)

    def _by_branch(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x, x, x) if self.shared_kv else x.chunk(3, dim=1)

    def _head_view(self, view: KVView, branch: int) -> KVView:
        """A cache's view with the heads of one branch."""
        if self.shared_kv:
            return view
        each = view.k.shape[1] // 3
        heads = slice(branch * each, (branch + 1) * each)
        k_scale, v_scale = (None if s is None else s[:, heads] for s in (view.k_scale, view.v_scale))
        return view._replace(k=view.k[:, heads], v=view.v[:, heads], k_scale=k_scale, v_scale=v_scale)

    def _out(self, heads: Tensor) -> Tensor:
        return joined(_FORWARD, self, self._ranks(heads.shape[1]), heads.transpose(1, 2))

    def _check_cache(self, cache: Any) -> None:
        rule, fix = "a SparseAttention needs a cache that keeps its entries", "Make one with layer.cache(pages=...)"
        if not callable(getattr(cache, "entries", None)) or not callable(getattr(cache, "blocks", None)):
            raise ArgumentTypeError.of(_FORWARD, rule, f"cache of type {type(cache).__name__}", fix)
        if cache.stride != self.pattern.stride:
            given = f"stride={self.pattern.stride} and a cache with stride={cache.stride}"
            raise ArgumentError.of(_FORWARD, "a cache has the stride of its layers", given, fix)

    def extra_repr(self) -> str:
        """The sizes and options, for `print`."""
        sizes = f"{self.dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        own = [f"{name}={value!r}" for name, value in self.pattern._asdict().items()]
        return ", ".join([sizes, *own, *self._options("rotary", "compress", "shared_kv")])


def _of(view: KVView, chosen: list[int]) -> KVView:
    """Some sequences of a view, whose queries are not ragged."""
    layout = view.layout
    tables, starts, lengths = array("i"), array("q", [0]), array("q")
    for i in chosen:
        tables.extend(layout.tables[layout.starts[i] : layout.starts[i + 1]])
        starts.append(len(tables))
        lengths.append(layout.lengths[i])
    return view._replace(layout=KVLayout(tables, starts, lengths, None, layout.clock))


def _keys_of(view: KVView) -> Tensor:
    """Keys (n, H, L, D) of a view's sequences in its dtype; those that a sequence does not have may be anything."""
    layout, P = view.layout, view.k.shape[2]
    longest = max(layout.lengths)
    pages = -(-longest // P)
    table = array("q", bytes(8 * pages * len(layout.lengths)))
    for i in range(len(layout.lengths)):
        own = layout.tables[layout.starts[i] : layout.starts[i + 1]]
        table[i * pages : i * pages + len(own)] = array("q", own)
    at = torch.frombuffer(table, dtype=torch.int64).to(view.k.device)
    held = view.k.index_select(0, at)  # (n pages, H, P, D)
    if view.k_scale is not None:
        held = (held.float() * view.k_scale.index_select(0, at)[..., None]).to(view.dtype)
    keys: Tensor = held.unflatten(0, (-1, pages)).transpose(1, 2).flatten(2, 3)
    return keys[:, :, :longest]
