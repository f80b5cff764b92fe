"""What a backend is: one way to compute attention, and the calls that it has made ready."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from qkv.backends.tiled.schedule import tiles_of
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Output, Problem
from qkv.call.statistics import Statistics, Wanted
from qkv.scores import ScoreTerm

Result: TypeAlias = tuple[Tensor, "Tensor | None", "Tensor | None"]
"""out, lse or None, state or None: `Output` without its class, which would cost every call."""


class Advice(NamedTuple):
    """Which of a backend and PyTorch's own kernel was measured faster, and how that is told."""

    backend: str  # the faster one's name
    text: str


class Speed(NamedTuple):
    """Seconds that a backend takes for a pair of query and key, a row of queries, a byte of keys and values."""

    dtype: str
    D: int
    backward: bool
    pair: float
    row: float
    byte: float


class Gradients(NamedTuple):
    """Gradients in the shapes and dtypes of the inputs; bias has one entry a tensor of the bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: tuple[Tensor, ...]


class Backend:
    """One way to compute attention. A class of its own declares what differs from the attributes below.

    It defines `run`, or `prepare` where something of a call can be done once for all calls of its kind. A public name
    that is not declared here is an error: nobody would call it.
    """

    name = ""
    missing: str | None = None
    """Why the whole backend is not installed here."""
    differentiable = False
    """True: autograd can go through `run` itself. False: gradients come from a backward pass."""
    has_backward = False
    """Whether it has a backward pass of its own; else gradients come from `tiled`, which makes its own row statistics.

    One that is differentiable by autograd offers it where that differentiates once only, or for callers that cannot
    keep its graph."""
    reads_pages = False
    """Whether it reads keys where they lie on a cache's pages: `prepare_view`."""

    def __init_subclass__(cls) -> None:
        unknown = [name for name in vars(cls) if not name.startswith("_") and not hasattr(Backend, name)]
        if unknown:
            raise TypeError(f"a backend has no {unknown[0]}: qkv.backends.base.Backend declares what it may define")

    def supports(self, problem: Problem) -> str | None:
        """None if it can run the problem, else the reason why not."""
        return "a meta tensor holds no data to compute with" if problem.device == "meta" else None

    def untuned(self) -> str | None:
        """Why PyTorch's own kernel is better on this machine, where it is."""
        return None

    def measured(self, problem: Problem) -> Advice | None:
        """Which of it and PyTorch's own kernel was measured faster on this machine, where something was."""
        return None

    def speed(self, problem: Problem, backward: bool) -> Speed | None:
        """What it takes on this machine, where that was recorded for calls of the problem's dtype and head size."""
        return None

    def tile(self, problem: Problem) -> tuple[int, int]:
        """Queries and keys of one tile."""
        raise NotImplementedError

    def visited(self, problem: Problem, positions: Tensor | None) -> int:
        """Pairs of query and key that it computes, over all batch rows and heads: its tiles, clipped to the sizes.

        `positions` are those of all queries, int64 (B or 1, Lq), where they are data."""
        p, (rows, keys) = problem, self.tile(problem)
        tiles = tiles_of(p, positions, (rows, keys)).visible
        return min(tiles * min(rows, p.Lq) * min(keys, p.Lk), p.B * p.Hq * p.Lq * p.Lk)

    def unit(self, problem: Problem) -> float:
        """What an m of 1 in its states (`Output.state`) comes to in the definition's scores."""
        return 1.0

    def note(self, problem: Problem) -> str:
        """What a reader of the plan should know, such as promises that do not hold here; may be empty."""
        return ""

    def run(self, problem: Problem, inputs: Inputs) -> Output:
        """Compute. lse may be None unless `needs_lse` or `needs_grad`; a state is for the own backward pass alone."""
        raise NotImplementedError

    def observe(self, problem: Problem, inputs: Inputs, wanted: Wanted) -> tuple[Tensor, Statistics] | None:
        """What `run` computes, to the bit, and the statistics of its weights; None where it has none of its own."""
        return None

    def observe_view(
        self, q: Tensor, view: KVView, parts: Sequence[tuple[Sequence[int], Problem, Inputs]], wanted: Wanted
    ) -> tuple[Tensor, Statistics] | None:
        """The same for keys on pages, which it reads; parts: some sequences, or all, and what they are prepared with.

        What sequences of unequal lengths have stands side by side, as in `qkv.observation.Observed`."""
        return None

    def backward(self, problem: Problem, inputs: Inputs, output: Output, d_out: Tensor, d_lse: Tensor) -> Gradients:
        """Gradients of sum(out * d_out) + sum(lse * d_lse); `output` is what `run` returned."""
        raise NotImplementedError

    def no_backward(self, problem: Problem) -> str | None:
        """None if its own backward pass takes the problem, else why not: then `tiled` has one."""
        if not self.has_backward:
            return f"{self.name} has no backward pass of its own"
        return (
            "there is nothing to compute" if 0 in (problem.B, problem.Hq, problem.Lq, problem.Lk, problem.Dv) else None
        )

    def prepare(self, problem: Problem, inputs: Inputs) -> Prepared:
        """Do once what calls of one kind share: shapes, strides, dtypes, device, mask and options are the same."""
        return Prepared(self, problem)

    def prepare_view(
        self, problem: Problem, q: Tensor, view: KVView, bias: tuple[Tensor, ...], sinks: Tensor | None
    ) -> PreparedView:
        """The same for keys on pages, of any lengths, unless the mask or bias is made for some."""
        raise NotImplementedError


class Prepared:
    """Calls of one kind, made ready by a backend: all but their tensors, of which it keeps none alive.

    It is kept between calls, serves forward and backward passes, and is called from any thread.
    """

    operands: tuple[Tensor, ...] = ()
    """What was made of the mask's tensors."""

    def __init__(self, backend: Backend, problem: Problem) -> None:
        self.backend, self.problem = backend, problem

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
        """Compute with the tensors of one call, in the order of `Inputs`."""
        return self.backend.run(self.problem, Inputs(q, k, v, positions, bias, sinks, seed))

    @cached_property
    def no_backward(self) -> str | None:
        """Why `tiled` computes the gradients; None where the backend does."""
        return self.backend.no_backward(self.problem)

    def backward(self, inputs: Inputs, output: Output, d_out: Tensor, d_lse: Tensor) -> Gradients:
        """Gradients by the backend's own backward pass, if `no_backward` is None."""
        return self.backend.backward(self.problem, inputs, output, d_out, d_lse)


class PreparedView:
    """Calls of one kind on keys that lie on a cache's pages: lengths and pages are those of each call."""

    operands: tuple[Tensor, ...] = ()
    unit = 1.0
    """`Backend.unit` of these calls."""

    def run(
        self,
        q: Tensor,
        view: KVView,
        bias: tuple[Tensor, ...],
        sinks: Tensor | None,
        to: Output | None = None,
        sequences: Any = (),
    ) -> Output:
        """Compute all sequences, or into `to` those of `sequences`."""
        raise NotImplementedError
