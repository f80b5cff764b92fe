"""The native kernels of csrc/: prefill, decode, gradients and statistics on the CPU.

Everything that depends on sizes, strides, dtypes and the mask is prepared once; a call then passes addresses: by place
where it runs forward, since names would cost it 0.1 of its 7 microseconds. A test compares places with names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qkv.backends import covers, recorded
from qkv.backends.base import Advice, Backend, Gradients, Prepared, Result, Speed
from qkv.backends.isas import UNMEASURED
from qkv.backends.paged import ViewCall
from qkv.backends.places import MOST_TOP, Places
from qkv.backends.tiled.schedule import pairs_of
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Output, Problem, dense_strides, empty_output
from qkv.call.statistics import Statistics, Wanted
from qkv.masks import Sizes
from qkv.masks.counts import Look
from qkv.scores import ScoreTerm

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_STORED = {**_TYPES, torch.int8: 4, torch.float8_e4m3fn: 5}
_BIAS_KINDS = {"tensor": 0, "alibi": 1, "relative": 2}

_CPU = torch.device("cpu")
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
# Looked up once: a call is to cost a few microseconds.
_empty, _empty_strided, _threads = torch.empty, torch.empty_strided, torch.get_num_threads


@lru_cache(maxsize=1)
def _module() -> ModuleType | str:
    """The extension, or why there is none."""
    try:
        return import_module("qkv._native")
    except ImportError as error:
        return f"the native extension was not built ({error})"


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this build has and this machine can run, best first; empty without the extension."""
    module = _module()
    return () if isinstance(module, str) else tuple(module.instruction_sets().split(","))


class CpuBackend(Backend):
    """Native kernels; `isa` forces an instruction set, by default the best is taken."""

    has_backward = True
    reads_pages = True

    def __init__(self, isa: str = "", module: ModuleType | None = None) -> None:
        self.name = f"cpu:{isa}" if isa else "cpu"
        self.isa = isa
        self.module: ModuleType | str = module if module is not None else _module()
        self.missing = self.module if isinstance(self.module, str) else None

    def supports(self, problem: Problem) -> str | None:
        module, p = self.module, problem
        if isinstance(module, str):
            return module
        if self.isa and self.isa not in module.instruction_sets().split(","):
            return f"this machine or build has no {self.isa}; it has {module.instruction_sets()}"
        if p.device != "cpu":
            return f"tensors are on {p.device}"
        if p.dtype not in _TYPES:
            return f"it has no kernel for {p.dtype}"
        if p.bias and "score_mod" in [term.kind for term in p.bias]:
            return "score_mod is a Python function"
        if p.mask is not None:
            if p.program is None:
                return "mask_mod is a Python function"
            if not module.program_fits(p.program.words, len(p.program.sources)):
                return "the mask is nested too deeply or has more than 96 random blocks a row"
        return None

    def untuned(self) -> str | None:
        if self.isa:
            return None
        best = (instruction_sets() or ("",))[0]
        if best == "portable":
            return "no kernel tuned for this processor"
        if best in UNMEASURED:
            return f"the kernel for {best} was not measured here (qkv doctor --tune does)"
        return None

    def measured(self, problem: Problem) -> Advice | None:
        found = self._recorded()
        return None if found is None else found.advice(problem)

    def speed(self, problem: Problem, backward: bool) -> Speed | None:
        found = self._recorded() if problem.Dv == problem.D else None
        return None if found is None else found.speed(problem.dtype, problem.D, backward)

    def _recorded(self) -> recorded.Recording | None:
        """What `qkv doctor --tune` found on this machine."""
        sets = () if self.isa else instruction_sets()
        return recorded.current(sets[0], torch.get_num_threads()) if sets else None

    def no_backward(self, problem: Problem) -> str | None:
        refused = super().no_backward(problem) or self.supports(problem)
        if refused is None and not isinstance(self.module, str):
            *_, terms = self.module.limits(self.isa)
            if len(problem.bias) > terms:
                return f"it differentiates at most {terms} score terms"
        return refused

    def tile(self, problem: Problem) -> tuple[int, int]:
        assert not isinstance(self.module, str)
        rows, keys, _ = self.module.limits(self.isa)
        return (rows // 2 if problem.dtype == torch.float64 else rows), keys

    def visited(self, problem: Problem, positions: Tensor | None) -> int:
        found = self._cover(problem, positions, covers.LOOKED_AT)
        covering = super().visited(problem, positions)
        if found is None or found.in_order:
            return covering
        # Few of many tiles may miss those that see most, or tell of too many.
        return min(max(found.pairs, pairs_of(problem, positions, Look(0)).least), covering)

    def note(self, problem: Problem) -> str:
        found = None if problem.positions == "tensor" else self._cover(problem, None, 0)
        isa = f"instruction set {self.isa or (instruction_sets() or ('none',))[0]}"
        return "; ".join(filter(None, (isa, "" if found is None else found.words())))

    def _cover(self, p: Problem, positions: Tensor | None, granules: int) -> covers.Cover | None:
        """What is computed; None where that is what covering tiles say."""
        if not covers.told(p) or self.supports(p) is not None:
            return None
        plain = covers.PLAIN
        native = self._native(
            p, (plain, plain, plain), plain, (), None, sizes=(p.Lq, p.Lk), offsets=_offsets(p), pages=[]
        )
        return covers.cover(native, positions, granules)

    def prepare(self, problem: Problem, inputs: Inputs) -> Prepared:
        return _TensorCall(self, problem, inputs)

    def unit(self, problem: Problem) -> float:
        p, size = problem, abs(problem.scale)  # as `Job` of csrc/kernel/score.h
        return size if p.softcap is None and not (p.bias or p.has_sinks) and 1e-30 < size < 1e30 else 1.0

    def prepare_view(
        self, problem: Problem, q: Tensor, view: KVView, bias: tuple[Tensor, ...], sinks: Tensor | None
    ) -> ViewCall:
        strides = dense_strides((*q.shape[:3], problem.Dv), q.stride())
        scales = (0, 0, 0) if view.k_scale is None else view.k_scale.stride()
        pages = [view.k.shape[2], view.k.shape[0], _STORED[view.k.dtype], *scales]
        whole = replace(problem, part=False)  # is for states that gradients start from; here any kernel's will do
        given = q.stride(), view.k.stride(), view.v.stride()
        native = self._native(whole, given, strides, bias, sinks, sizes=(q.shape[2], 0), offsets=[], pages=pages)
        unit = self.unit(problem) if view.k_scale is None else 1.0  # scores of scaled keys are the definition's
        return ViewCall(native, problem, q, strides, _operands(whole), unit)

    def observe(self, problem: Problem, inputs: Inputs, wanted: Wanted) -> tuple[Tensor, Statistics] | None:
        if wanted.top > MOST_TOP:
            return None
        return _TensorCall(self, problem, inputs).observe(inputs, wanted)

    def observe_view(
        self, q: Tensor, view: KVView, parts: Sequence[tuple[Sequence[int], Problem, Inputs]], wanted: Wanted
    ) -> tuple[Tensor, Statistics] | None:
        if wanted.top > MOST_TOP:
            return None
        lengths, queries = view.layout.lengths, view.layout.queries
        longest = max(lengths, default=0)
        if wanted.bins is not None:
            rows = q.shape[2] if queries is None else max(queries, default=0)
            wanted = wanted._replace(bins=(min(wanted.bins[0], rows), min(wanted.bins[1], longest)))
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        B, H, L, _ = q.shape
        places, out = Places((B, H, L), len(lengths), longest, kind, wanted), empty_output(q, view.v.shape[3])
        for sequences, problem, (_, _, _, _, bias, sinks, _) in parts:
            terms = () if bias is None else bias.tensors()
            call = self.prepare_view(problem, q, view, terms, sinks)
            which = () if len(sequences) == len(lengths) else list(sequences)
            with places.telling(wanted.progress):
                call.observing(places).run(q, view, terms, sinks, Output(out, places.lse), which)
        return out, places.statistics(queries)

    def _native(
        self,
        p: Problem,
        given: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
        strides: tuple[int, ...],
        bias: tuple[Tensor, ...],
        sinks: Tensor | None,
        *,
        sizes: tuple[int, int],
        offsets: list[int],
        pages: list[int],
    ) -> Any:
        """The native object: every size, stride and mask of a call.

        `given`: the strides of q, k, v; `strides`: of out; `sizes`: Lq, Lk.
        """
        module = self.module
        assert not isinstance(module, str)
        program = None if p.mask is None else p.program
        words, operands = ([], ()) if program is None else (program.words, program.operands)
        return module.Prepared(
            isa=self.isa, type=_TYPES[p.dtype], sizes=(p.B, p.Hq, p.Hkv, *sizes, p.D, p.Dv),
            q_stride=given[0], k_stride=given[1], v_stride=given[2], out_stride=strides,
            scale=p.scale, softcap=p.softcap or 0.0, program=words,
            operands=operands and [(t.data_ptr(), _extent(t)) for t in operands],
            bias=bias and [_bias(spec.kind, t) for spec, t in zip(p.bias, bias, strict=True)],
            sinks=[] if sinks is None else [_TYPES[sinks.dtype], sinks.stride(0)],
            positions=offsets, pages=pages, dropout_p=p.dropout_p, part=p.part,
        )  # fmt: skip


class _TensorCall(Prepared):
    """One native object for both directions: sizes, strides and the mask are lowered and checked once."""

    def __init__(self, backend: CpuBackend, problem: Problem, inputs: Inputs) -> None:
        self.backend, self.problem, p = backend, problem, problem
        q, k, v, _, bias, sinks, _ = inputs
        self.size, self.layout = (p.B, p.Hq, p.Lq, p.Dv), _layout(inputs)
        self.strides = dense_strides(self.size, q.stride())
        self.operands = _operands(p)
        terms = () if bias is None else bias.tensors()
        self.native = backend._native(
            p,
            (q.stride(), k.stride(), v.stride()),
            self.strides,
            terms,
            sinks,
            sizes=(p.Lq, p.Lk),
            offsets=_offsets(p),
            pages=[],
        )
        self.run_plain = self.native.run
        self.dtype, self.wide, self.with_state = p.dtype, p.accumulate, p.needs_grad
        self.with_lse = p.needs_lse or p.needs_grad
        # What one kernel call does and a new tensor of q's kind holds: a subclass may answer for its own.
        self.plain = not self.with_lse and p.dropout_p == 0 and type(q) in _TENSORS

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None = None,
        bias: ScoreTerm | None = None,
        sinks: Tensor | None = None,
        seed: int = 0,
    ) -> Result:
        if self.plain and positions is None and sinks is None and bias is None:
            out = q.new_empty_strided(self.size, self.strides)
            self.run_plain(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0, _threads())
            return out, None, None
        out = _empty_strided(self.size, self.strides, dtype=self.dtype, device=_CPU)
        lse = _empty(self.size[:3], dtype=self.wide, device=_CPU) if self.with_lse else None
        state = _empty((2, *self.size[:3]), dtype=self.wide, device=_CPU) if self.with_state else None
        where = None if positions is None else positions.contiguous()
        self.native.run_full(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), _threads(),
            0 if sinks is None else sinks.data_ptr() or 1,
            0 if where is None else where.data_ptr(), 0 if where is None else where.shape[0],
            [] if bias is None else [t.data_ptr() for t in bias.tensors()],
            0 if state is None else state.data_ptr(), seed,
        )  # fmt: skip
        return out, lse, state

    def observe(self, inputs: Inputs, wanted: Wanted) -> tuple[Tensor, Statistics]:
        """What `run` computes, to the bit, and what its weights come to."""
        p, (q, k, v, positions, bias, sinks, seed) = self.problem, inputs
        out = _empty_strided(self.size, self.strides, dtype=self.dtype, device=_CPU)
        places = Places(self.size[:3], p.B, p.Lk, self.wide, wanted)
        where = None if positions is None else positions.contiguous()
        with places.telling(wanted.progress):
            self.native.observe(
                q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), threads=_threads(),
                sinks=0 if sinks is None else sinks.data_ptr() or 1,
                positions=0 if where is None else where.data_ptr(),
                position_rows=0 if where is None else where.shape[0],
                bias=[] if bias is None else [t.data_ptr() for t in bias.tensors()], seed=seed,
                rows=places.of_rows(), wanted=places.of_weights(),
            )  # fmt: skip
        return out, places.statistics()

    def backward(self, inputs: Inputs, output: Output, d_out: Tensor, d_lse: Tensor) -> Gradients:
        lazy = any(t.is_neg() for t in inputs[:3])
        if lazy or self.layout != _layout(inputs):  # hooks on saved tensors may copy them
            inputs = inputs._replace(**{name: getattr(inputs, name).resolve_neg() for name in "qkv"})
            return self.backend.prepare(self.problem, inputs).backward(inputs, output, d_out, d_lse)
        p, (q, k, v, positions, bias, sinks, seed) = self.problem, inputs
        if p.mask is not None:  # its tensor may have been changed since the forward pass
            p.mask.check(p.call, Sizes(p.B, p.Hq, p.Lq, p.Lk, p.dtype, q.device))
        out, lse, state = output
        assert lse is not None
        d_out, d_lse = d_out.resolve_neg(), d_lse.to(lse.dtype).contiguous()
        if out.stride() != self.strides:
            out = _empty_strided(self.size, self.strides, dtype=out.dtype, device=_CPU).copy_(out)
        state = None if state is None else state.contiguous()
        kind = p.accumulate if p.part else p.dtype  # parts are added up before they are rounded
        to = [_empty_strided(t.shape, dense_strides(t.shape, t.stride()), dtype=kind, device=_CPU) for t in (q, k, v)]
        tensors = () if bias is None else bias.tensors()
        buffers = [] if bias is None else [b for term in bias.terms for b in term.new_gradients(p.accumulate)]
        to_bias = [
            [b.data_ptr(), *_bias(spec.kind, b)[2:6], int(b.dtype == torch.float64)]
            for spec, b in zip(p.bias, buffers, strict=True)
        ]
        d_sinks = None if sinks is None else torch.zeros(p.Hq, dtype=torch.float64, device=_CPU)
        where = None if positions is None else positions.contiguous()
        self.native.backward(
            q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(),
            state=0 if state is None else state.data_ptr(), threads=_threads(),
            sinks=0 if sinks is None else sinks.data_ptr() or 1,
            positions=0 if where is None else where.data_ptr(), position_rows=0 if where is None else where.shape[0],
            bias=[t.data_ptr() for t in tensors], seed=seed,
            d_out=d_out.data_ptr(), d_out_stride=d_out.stride(), d_lse=d_lse.data_ptr(),
            to=[t.data_ptr() for t in to], strides=[t.stride() for t in to],
            d_bias=to_bias, d_sinks=0 if d_sinks is None else d_sinks.data_ptr(),
        )  # fmt: skip
        found = tuple(b if p.part else b.to(t.dtype) for b, t in zip(buffers, tensors, strict=True))
        return Gradients(
            to[0], to[1], to[2], None if d_sinks is None or sinks is None else d_sinks.to(sinks.dtype), found
        )


def _offsets(p: Problem) -> list[int]:
    """Positions of the first query: of all batch rows, or of each; none where positions are a tensor."""
    if isinstance(p.positions, tuple):
        return list(p.positions)
    return [] if p.positions == "tensor" else [p.offset(0)]


def _operands(p: Problem) -> tuple[Tensor, ...]:
    """The tensors of the lowered mask, whose addresses a native object has."""
    return () if p.mask is None or p.program is None else p.program.operands


def _layout(inputs: Inputs) -> tuple[Any, ...]:
    """The strides that a native object is made for."""
    q, k, v, _, bias, sinks, _ = inputs
    terms = () if bias is None else tuple([t.stride() for t in bias.tensors()])
    return q.stride(), k.stride(), v.stride(), None if sinks is None else sinks.stride(), terms


def _extent(t: Tensor) -> int:
    """Elements from the first to the last that a tensor of any strides reaches."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def _bias(kind: str, term: Tensor) -> list[int]:
    """(kind, type, strides of b h i j, reach) of a term's tensor."""
    if kind == "tensor":
        strides = [0] * (4 - term.dim()) + [s if n != 1 else 0 for n, s in zip(term.shape, term.stride(), strict=True)]
        return [_BIAS_KINDS[kind], _TYPES[term.dtype], *strides, 0]
    if kind == "alibi":
        return [_BIAS_KINDS[kind], _TYPES[term.dtype], 0, term.stride(0), 0, 0, 0]
    return [_BIAS_KINDS[kind], _TYPES[term.dtype], 0, term.stride(0), 0, term.stride(1), (term.shape[1] - 1) // 2]
