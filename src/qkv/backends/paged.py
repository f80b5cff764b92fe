"""Calls of the native kernels on keys that lie on a cache's pages."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkv.backends.base import PreparedView
from qkv.backends.places import Places
from qkv.call.keys import KVView
from qkv.call.problem import Output, Problem

_CPU = torch.device("cpu")
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_empty, _empty_strided, _threads = torch.empty, torch.empty_strided, torch.get_num_threads


class ViewCall(PreparedView):
    """Calls of one kind on one native object: lengths and pages are those of each call."""

    def __init__(
        self, native: Any, p: Problem, q: Tensor, strides: tuple[int, ...], operands: tuple[Tensor, ...], unit: float
    ) -> None:
        self.unit = unit
        self.size, self.strides, self.operands, self.native = (*q.shape[:3], p.Dv), strides, operands, native
        self.run_pages, self.plain = native.run_pages, type(q) in _TENSORS
        self.dtype, self.wide, self.with_lse, self.with_state = p.dtype, p.accumulate, p.needs_lse, p.part

    def run(
        self,
        q: Tensor,
        view: KVView,
        bias: tuple[Tensor, ...],
        sinks: Tensor | None,
        to: Output | None = None,
        sequences: Any = (),
    ) -> Output:
        if to is None:
            lse = _empty(self.size[:3], dtype=self.wide, device=_CPU) if self.with_lse else None
            make = q.new_empty_strided if self.plain else partial(_empty_strided, dtype=self.dtype, device=_CPU)
            state = _empty((2, *self.size[:3]), dtype=self.wide, device=_CPU) if self.with_state else None
            to = Output(make(self.size, self.strides), lse, state)
        out, lse, k_scale, v_scale, layout = to.out, to.lse, view.k_scale, view.v_scale, view.layout
        tables, starts, lengths = layout.tables.buffer_info(), layout.starts.buffer_info(), layout.lengths.buffer_info()
        queries = (0, 0) if layout.queries is None else layout.queries.buffer_info()
        self.run_pages(
            [
                q.data_ptr(), view.k.data_ptr(), view.v.data_ptr(), 0 if k_scale is None else k_scale.data_ptr() or 1,
                0 if v_scale is None else v_scale.data_ptr() or 1, out.data_ptr(), 0 if lse is None else lse.data_ptr(),
                0 if to.state is None else to.state.data_ptr(),
            ],
            _threads(), 0 if sinks is None else sinks.data_ptr() or 1, [t.data_ptr() for t in bias],
            [tables[0], starts[0], lengths[0], queries[0]], [tables[1], starts[1], lengths[1], queries[1]], sequences,
        )  # fmt: skip
        return to

    def observing(self, places: Places) -> ViewCall:
        """The call that computes the same, to the bit, and what its weights come to, into `places`."""
        call, observe = copy(self), self.native.observe_pages
        rows, weights = places.of_rows(), places.of_weights()
        call.run_pages = lambda *given: observe(*given, rows, weights)
        return call
