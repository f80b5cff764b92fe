"""The native kernels of csrc/: prefill, decode and gradients on the CPU.

Everything that depends on sizes, strides, dtypes and the mask is prepared once; a call then passes addresses.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qkv.backends.base import Execute, ExecuteView, Gradients
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Output, Problem, dense_strides

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_STORED = {**_TYPES, torch.int8: 4, torch.float8_e4m3fn: 5}
_BIAS_KINDS = {"tensor": 0, "alibi": 1, "relative": 2}


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


class CpuBackend:
    """Native kernels; `isa` forces an instruction set, by default the best is taken."""

    differentiable = False

    def __init__(self, isa: str = "", module: ModuleType | None = None) -> None:
        self.name = f"cpu:{isa}" if isa else "cpu"
        self.isa = isa
        self.module: ModuleType | str = module if module is not None else _module()
        self.missing = self.module if isinstance(self.module, str) else None

    def supports(self, problem: Problem) -> str | None:
        module = self.module
        if isinstance(module, str):
            return module
        if self.isa and self.isa not in module.instruction_sets().split(","):
            return f"this machine or build has no {self.isa}; it has {module.instruction_sets()}"
        p = problem
        if p.device != "cpu":
            return f"tensors are on {p.device}"
        if p.dtype not in _TYPES:
            return f"it has no kernel for {p.dtype}"
        if any(term.kind == "score_mod" for term in p.bias):
            return "score_mod is a Python function"
        if p.mask is not None:
            program = p.mask.program()
            if program is None:
                return "mask_mod is a Python function"
            if not module.program_fits(program.words, len(program.operands)):
                return "the mask is nested too deeply or has more than 96 random blocks a row"
        return None

    def untuned(self, problem: Problem) -> str | None:
        if not self.isa and instruction_sets() == ("portable",):
            return "no kernel tuned for this processor"
        return None

    def tile(self, problem: Problem) -> tuple[int, int]:
        assert not isinstance(self.module, str)
        rows, keys, _ = self.module.limits(self.isa)
        return (rows // 2 if problem.dtype == torch.float64 else rows), keys

    def note(self, problem: Problem) -> str:
        return f"instruction set {self.isa or (instruction_sets() or ('none',))[0]}"

    def run(self, problem: Problem, inputs: Inputs) -> Output:
        inputs = Inputs(
            inputs.q.resolve_neg(),
            inputs.k.resolve_neg(),
            inputs.v.resolve_neg(),
            inputs.positions,
            inputs.bias,
            inputs.sinks,
            inputs.seed,
        )
        execute = self.prepare(problem, inputs)
        assert execute is not None
        terms, given = inputs.bias.tensors() if inputs.bias is not None else (), inputs
        found = execute(
            given.q, given.k, given.v, given.positions, terms, given.sinks, problem.needs_lse, given.seed
        )  # fmt: skip
        return Output(*found)

    def prepare(self, problem: Problem, inputs: Inputs) -> Execute | None:
        if inputs.q.is_neg() or inputs.k.is_neg() or inputs.v.is_neg():
            return None
        return _executor(*self._prepared(problem, inputs), problem)

    def _prepared(self, p: Problem, inputs: Inputs) -> tuple[Any, tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
        """The native call, what it must keep alive, and the size and strides of its output."""
        module = self.module
        assert not isinstance(module, str)
        q, k, v = inputs.q, inputs.k, inputs.v
        size = (p.B, p.Hq, p.Lq, p.Dv)
        strides = dense_strides(size, q.stride())
        words: list[int] = []
        operands: tuple[Tensor, ...] = ()
        if p.mask is not None:
            program = p.mask.program()
            assert program is not None
            words, operands = program.words, program.operands
        terms = inputs.bias.tensors() if inputs.bias is not None else ()
        bias = [_bias(spec.kind, t) for spec, t in zip(p.bias, terms, strict=True)]
        sinks = inputs.sinks
        offsets = (
            [] if p.positions == "tensor" else list(p.positions) if isinstance(p.positions, tuple) else [p.offset(0)]
        )
        call = module.Prepared(
            self.isa, _TYPES[p.dtype], [p.B, p.Hq, p.Hkv, p.Lq, p.Lk, p.D, p.Dv],
            list(q.stride()), list(k.stride()), list(v.stride()), list(strides),
            p.scale, p.softcap or 0.0, list(words), [(t.data_ptr(), _extent(t)) for t in operands],
            bias, [] if sinks is None else [_TYPES[sinks.dtype], sinks.stride(0)], offsets, [], p.dropout_p,
        )  # fmt: skip
        return call, operands, size, strides

    def prepare_view(
        self, problem: Problem, q: Tensor, view: KVView, bias: tuple[Tensor, ...], sinks: Tensor | None
    ) -> ExecuteView:
        """The call on keys and values where they lie in a cache's pages."""
        module, p, k, v = self.module, problem, view.k, view.v
        assert not isinstance(module, str)
        ragged = view.layout.queries is not None
        size = (*q.shape[:3], p.Dv)
        strides = dense_strides(size, q.stride())
        words: list[int] = []
        operands: tuple[Tensor, ...] = ()
        if p.mask is not None:
            program = p.mask.program()
            assert program is not None
            words, operands = program.words, program.operands
        scales = (0, 0, 0) if view.k_scale is None else view.k_scale.stride()
        call = module.Prepared(
            self.isa, _TYPES[p.dtype], [p.B, p.Hq, p.Hkv, q.shape[2], 0, p.D, p.Dv],
            list(q.stride()), list(k.stride()), list(v.stride()), list(strides),
            p.scale, p.softcap or 0.0, list(words), [(t.data_ptr(), _extent(t)) for t in operands],
            [_bias(spec.kind, t) for spec, t in zip(p.bias, bias, strict=True)],
            [] if sinks is None else [_TYPES[sinks.dtype], sinks.stride(0)], [],
            [k.shape[2], k.shape[0], _STORED[k.dtype], *scales], 0.0,
        )  # fmt: skip
        return _view_executor(call, operands, size, strides, p, ragged)

    def backward_supports(self, problem: Problem) -> str | None:
        """None if `backward` can run the problem, else the reason why not."""
        refused = self.supports(problem)
        if refused is None and not isinstance(self.module, str):
            *_, terms = self.module.limits(self.isa)
            if len(problem.bias) > terms:
                return f"it differentiates at most {terms} score terms"
        return refused

    def backward(self, problem: Problem, inputs: Inputs, output: Output, d_out: Tensor, d_lse: Tensor) -> Gradients:
        """Gradients of sum(out * d_out) + sum(lse * d_lse)."""
        p = problem
        q, k, v, d_out = (t.resolve_neg() for t in (inputs.q, inputs.k, inputs.v, d_out))
        out, lse, state = output
        assert lse is not None
        inputs = Inputs(q, k, v, inputs.positions, inputs.bias, inputs.sinks, inputs.seed)
        call, operands, size, strides = self._prepared(p, inputs)
        if out.stride() != strides:
            out = torch.empty_strided(size, strides, dtype=out.dtype, device="cpu").copy_(out)
        if state is not None:
            state = state.contiguous()
        d_lse = d_lse.to(lse.dtype).contiguous()
        to = [
            torch.empty_strided(t.shape, dense_strides(t.shape, t.stride()), dtype=t.dtype, device="cpu")
            for t in (q, k, v)
        ]
        terms = inputs.bias.terms if inputs.bias is not None else ()
        tensors = inputs.bias.tensors() if inputs.bias is not None else ()
        buffers = [buffer for term in terms for buffer in term.new_gradients(p.accumulate)]
        sinks = inputs.sinks
        d_sinks = None if sinks is None else torch.zeros(p.Hq, dtype=torch.float64, device="cpu")
        where = None if inputs.positions is None else inputs.positions.contiguous()
        to_bias = [
            [b.data_ptr(), *_bias(spec.kind, b)[2:6], int(b.dtype == torch.float64)]
            for spec, b in zip(p.bias, buffers, strict=True)
        ]
        call.backward(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if state is None else state.data_ptr(),
            torch.get_num_threads(),
            0 if sinks is None else sinks.data_ptr() or 1,
            0 if where is None else where.data_ptr(), 0 if where is None else where.shape[0],
            [t.data_ptr() for t in tensors], inputs.seed, d_out.data_ptr(), list(d_out.stride()), d_lse.data_ptr(),
            [t.data_ptr() for t in to], [list(t.stride()) for t in to],
            to_bias,
            0 if d_sinks is None else d_sinks.data_ptr(),
        )  # fmt: skip
        del operands  # until here the mask's tensors had to live
        return Gradients(
            to[0],
            to[1],
            to[2],
            None if d_sinks is None or sinks is None else d_sinks.to(sinks.dtype),
            tuple(b.to(t.dtype) for b, t in zip(buffers, tensors, strict=True)),
        )


def _executor(
    call: Any, operands: tuple[Tensor, ...], size: tuple[int, ...], strides: tuple[int, ...], p: Problem
) -> Execute:
    # Looked up once: the call itself is to cost a few microseconds. The mask's operands live as long as the closure.
    run, run_full, threads = call.run, call.run_full, torch.get_num_threads
    empty, dtype, accumulate, rows = torch.empty_strided, p.dtype, p.accumulate, size[:3]
    keeps_state = p.needs_state
    plain = not keeps_state and p.dropout_p == 0
    cpu = torch.device("cpu")

    def execute(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None,
        bias: tuple[Tensor, ...],
        sinks: Tensor | None,
        return_lse: bool,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out = empty(size, strides, dtype=dtype, device=cpu)
        lse = torch.empty(rows, dtype=accumulate, device=cpu) if return_lse else None
        to_lse = 0 if lse is None else lse.data_ptr()
        state = torch.empty((2, *rows), dtype=accumulate, device=cpu) if keeps_state else None
        if plain and positions is None and sinks is None and not bias:
            run(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), to_lse, threads())
            return out, lse, state
        where = None if positions is None else positions.contiguous()
        run_full(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), to_lse, threads(),
            0 if sinks is None else sinks.data_ptr() or 1,
            0 if where is None else where.data_ptr(), 0 if where is None else where.shape[0],
            [t.data_ptr() for t in bias], 0 if state is None else state.data_ptr(), seed,
        )  # fmt: skip
        return out, lse, state

    execute.operands = operands  # type: ignore[attr-defined]
    return execute


def _view_executor(
    call: Any, operands: tuple[Tensor, ...], size: tuple[int, ...], strides: tuple[int, ...], p: Problem, ragged: bool
) -> ExecuteView:
    run, threads, empty = call.run_pages, torch.get_num_threads, torch.empty_strided
    dtype, accumulate, rows = p.dtype, p.accumulate, size[:3]
    cpu = torch.device("cpu")

    def execute(
        q: Tensor,
        view: KVView,
        bias: tuple[Tensor, ...],
        sinks: Tensor | None,
        return_lse: bool,
        to: Output | None = None,
        sequences: list[int] = [],  # noqa: B006 (never changed)
    ) -> Output:
        out, lse = to[:2] if to is not None else (empty(size, strides, dtype=dtype, device=cpu), None)
        if to is None and return_lse:
            lse = torch.empty(rows, dtype=accumulate, device=cpu)
        k_scale, v_scale, layout = view.k_scale, view.v_scale, view.layout
        tables, starts, lengths = layout.tables.buffer_info(), layout.starts.buffer_info(), layout.lengths.buffer_info()
        queries = (0, 0) if layout.queries is None else layout.queries.buffer_info()
        run(
            [
                q.data_ptr(), view.k.data_ptr(), view.v.data_ptr(), 0 if k_scale is None else k_scale.data_ptr() or 1,
                0 if v_scale is None else v_scale.data_ptr() or 1, out.data_ptr(), 0 if lse is None else lse.data_ptr(),
            ],
            threads(), 0 if sinks is None else sinks.data_ptr() or 1, [t.data_ptr() for t in bias],
            [tables[0], starts[0], lengths[0], queries[0]], [tables[1], starts[1], lengths[1], queries[1]], sequences,
        )  # fmt: skip
        return Output(out, lse)

    execute.operands = operands  # type: ignore[attr-defined]
    return execute


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


__all__ = ["CpuBackend", "instruction_sets"]
