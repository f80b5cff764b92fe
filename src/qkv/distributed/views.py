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
from qkv.distributed.transport import Group
from qkv.execute import on_view


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
        Cost: of a call over this rank's keys, and one message of n Hq T (Dv + 1) numbers in float32 to each rank.
        """
        own = options._replace(return_lse=True)
        if options.sinks is not None:
            check_view(call, q, self.own, v, options)  # all that may be wrong is wrong on all ranks
            if self.group.rank:
                own = own._replace(sinks=torch.full_like(options.sinks.detach(), -torch.inf))
        found = on_view(call, q, self.own, v, mask, own, backend)
        if self.group.size == 1:
            return found
        lse = found.lse
        assert lse is not None
        packed = torch.cat((found.out.to(lse.dtype), lse[..., None]), -1)
        joined = join(self.group.gather("a step of decoding", packed))
        return Output(empty_output(q, found.out.shape[3]).copy_(joined[..., :-1]), joined[..., -1].contiguous())


def join(parts: Sequence[Tensor]) -> Tensor:
    """Results over keys that are no others', (..., Dv + 1) with lse in the last column, as one over all of them.

    Sums go in the order of the parts. A part that sees nothing, lse -inf, adds nothing, whatever else it holds.

    >>> one = torch.tensor([[1.0, 2.0, 0.0]])
    >>> join([one, torch.tensor([[3.0, 6.0, 0.0]]), torch.tensor([[0.0, 0.0, -torch.inf]])])
    tensor([[2.0000, 4.0000, 0.6931]])
    """
    lse = torch.stack([part[..., -1] for part in parts])
    top = lse.amax(0)
    base = torch.where(top == -torch.inf, 0.0, top)
    total, out = torch.zeros_like(top), torch.zeros_like(parts[0][..., :-1])
    for part in parts:
        share = torch.exp(part[..., -1] - base)
        total += share
        out += torch.where(share[..., None] == 0, 0.0, share[..., None] * part[..., :-1])
    out /= torch.where(total == 0, 1.0, total)[..., None]
    return torch.cat((out, (base + total.log())[..., None]), -1)
