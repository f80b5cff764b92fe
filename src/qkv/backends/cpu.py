"""The native kernels of csrc/ as a backend: prefill, decode, gradients and statistics on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from qkv.backends import recorded
from qkv.backends.base import Advice, Backend, Prepared, PreparedView
from qkv.backends.isas import UNMEASURED
from qkv.backends.native import TYPES, Kernels, TensorCall, ViewCall
from qkv.backends.places import MOST_TOP, Places
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Output, Problem, empty_output
from qkv.call.statistics import Statistics, Wanted


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
        if p.dtype not in TYPES:
            return f"it has no kernel for {p.dtype}"
        if p.bias and "score_mod" in [term.kind for term in p.bias]:
            return "score_mod is a Python function"
        if p.mask is not None:
            if p.program is None:
                return "mask_mod is a Python function"
            if not module.program_fits(p.program.words, len(p.program.operands)):
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
        sets = () if self.isa else instruction_sets()
        found = recorded.current(sets[0], torch.get_num_threads()) if sets else None
        return None if found is None else found.advice(problem)

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

    def note(self, problem: Problem) -> str:
        return f"instruction set {self.isa or (instruction_sets() or ('none',))[0]}"

    def prepare(self, problem: Problem, inputs: Inputs) -> Prepared:
        assert not isinstance(self.module, str)
        return TensorCall(self, Kernels(self.module, self.isa), problem, inputs)

    def prepare_view(
        self, problem: Problem, q: Tensor, view: KVView, bias: tuple[Tensor, ...], sinks: Tensor | None
    ) -> PreparedView:
        assert not isinstance(self.module, str)
        return ViewCall(Kernels(self.module, self.isa), problem, q, view, bias, sinks)

    def observe(self, problem: Problem, inputs: Inputs, wanted: Wanted) -> tuple[Tensor, Statistics] | None:
        if wanted.top > MOST_TOP:
            return None
        assert not isinstance(self.module, str)
        return TensorCall(self, Kernels(self.module, self.isa), problem, inputs).observe(inputs, wanted)

    def observe_view(
        self, q: Tensor, view: KVView, parts: Sequence[tuple[Sequence[int], Problem, Inputs]], wanted: Wanted
    ) -> tuple[Tensor, Statistics] | None:
        if wanted.top > MOST_TOP:
            return None
        assert not isinstance(self.module, str)
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
            call = ViewCall(Kernels(self.module, self.isa), problem, q, view, terms, sinks)
            which = () if len(sequences) == len(lengths) else list(sequences)
            with places.telling(wanted.progress):
                call.observing(places).run(q, view, terms, sinks, Output(out, places.lse), which)
        return out, places.statistics(queries)
