"""Attention over keys that several ranks hold: each over its own, results joined in the order of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkv.call.keys import KVLayout, KVView
from qkv.call.problem import Options, Output, empty_output
from qkv.call.view import check_view
from qkv.distributed.agreement import Told, agree_once, together, words_of
from qkv.distributed.remembered import remembered
from qkv.distributed.transport import Group
from qkv.execute import on_view
from qkv.masks import Mask, as_mask
from qkv.scores import as_bias


@dataclass(frozen=True, eq=False)
class ShardedView:
    """Keys and values of one layer for some sequences in a cache of several ranks; `qkv.attention(q, view)` takes it.

    The call is one of all ranks: each makes it with the same arguments, and all get the same bits. Sinks count once;
    masks and biases go by the keys' numbers in their sequences, wherever they lie.

    Parameters
    ----------
    own : KVView
        This rank's pages, and of the others -1; its mask `held` hides their keys.
    group
        The ranks.
    """

    own: KVView
    group: Group

    @property
    def layout(self) -> KVLayout:
        """Where the keys lie on this rank, and how many there are on all."""
        return self.own.layout

    def attend(self, call: str, q: Any, v: Any, mask: Any, options: Options, backend: Any) -> Output:
        """What `attention` returns for these queries, with lse.

        Parameters
        ----------
        call : str
            The public function, for messages.
        q, v, mask, options, backend
            As the caller gave them; the same on all ranks.

        Returns
        -------
        Output

        Raises
        ------
        RankError
            A rank did not answer.

        Notes
        -----
        Cost: of a call over this rank's keys, and one message of n Hq T (Dv + 4) numbers in float32 to each rank, after
        one of 32 bytes.
        """
        own = options._replace(return_lse=True)
        with together((self.group,)):
            check_view(call, q, self.own, v, options)
            if options.sinks is not None and self.group.rank:
                own = own._replace(sinks=torch.full_like(options.sinks.detach(), -torch.inf))
            told = self._told(q, as_mask(mask, call), options, backend)
        agree_once((self.group,), told)
        self.group.connect(q.device)
        if self.group.size == 1:
            return on_view(call, q, self.own, v, mask, own, backend)
        out, _, rows = on_view(call, q, self.own, v, mask, own, backend, part=True)
        assert rows is not None
        # One message: out, and m and l of each row, which are wider, as numbers of its dtype.
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        state = rows.permute(1, 2, 3, 0).contiguous().view(kind)
        parts = self.group.gather("a step of decoding", torch.cat((out.to(kind), state), -1))
        Dv = out.shape[3]
        outs, states = (
            [part[..., :Dv] for part in parts],
            [part[..., Dv:].contiguous().view(rows.dtype) for part in parts],
        )
        joined, lse = join(outs, [state.unbind(-1) for state in states])
        return Output(empty_output(q, Dv).copy_(joined), lse.to(kind))

    def _told(self, q: Tensor, mask: Mask | None, options: Options, backend: Any) -> Told:
        """What has to be the same on all ranks."""
        o, layout = options, self.layout
        bias = as_bias(o.bias)
        terms = None if bias is None else [(term.kind, term.shape) for term in bias.specs()]
        key = tuple(q.shape), q.dtype, mask, o.scale, o.softcap, terms and tuple(terms), o.sinks is not None, backend
        queries = None if layout.queries is None else layout.queries.tolist()
        return Told.of(f"{_words(mask)} {key[:2]} {key[3:]} lengths={layout.lengths.tolist()} queries={queries}")


@remembered(64)
def _words(mask: Mask | None) -> str:
    return words_of(mask)


def join(outs: Sequence[Tensor], rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Results over keys that are no others', each (..., Dv) with its rows' m and l, as out and lse over all of them.

    Sums go in the order of the parts. A part that sees nothing, l = 0, adds nothing, whatever else it holds.

    >>> m, l = torch.zeros(1), torch.ones(1)
    >>> join([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])], [(m, l), (m, l)])
    (tensor([[2., 4.]]), tensor([0.6931]))
    """
    top = torch.stack([torch.where(l == 0, -torch.inf, m) for m, l in rows]).amax(0)
    base = torch.where(top == -torch.inf, 0.0, top)
    shares = [torch.where(l == 0, 0.0, l * torch.exp(m - base)) for m, l in rows]
    total = torch.zeros_like(base)
    for share in shares:
        total = total + share
    by = torch.where(total == 0, 1.0, total)
    joined = torch.zeros_like(outs[0])
    for out, share, (_, l) in zip(outs, shares, rows, strict=True):
        weight = (share / by)[..., None]
        joined += torch.where((l == 0)[..., None], 0.0, weight.to(out.dtype) * out)
    return joined, base + total.log()
