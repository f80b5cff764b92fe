"""What a backend is, and where each one lives. Nothing is imported before its first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from qkv.backends.isas import ISAS
from qkv.call.problem import Inputs, Output, Problem

# execute(q, k, v, positions, bias_tensors, sinks, return_lse, seed=0) -> (out, lse or None, state or None), as in
# spec.Output; the seed is dropout's
Execute: TypeAlias = Callable[..., "tuple[Tensor, Tensor | None, Tensor | None]"]


# execute(q, view, bias_tensors, sinks, return_lse, to=None, sequences=[]) -> output; the last two: a part of a batch
ExecuteView: TypeAlias = Callable[..., Output]


class Gradients(NamedTuple):
    """Gradients in the shapes and dtypes of the inputs; bias has one entry a tensor of the bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: tuple[Tensor, ...]


class Backend(Protocol):
    """One way to compute attention.

    A backend may offer more, each looked up by name:

    * ``prepare(problem, inputs) -> Execute``: do per call only what depends on data pointers. The plan cache keeps the
      callable for calls with the same shapes, strides, dtypes, device, mask and options, and the same answer to "does v
      start where k starts". It must not keep a tensor of `inputs` alive, and is called from any thread.
    * ``prepare_view(problem, q, view, bias_tensors, sinks) -> ExecuteView``: the same for keys on a cache's pages. What
      is prepared holds for any lengths and pages of as many sequences, unless the mask or bias is made for some.
    * ``backward(problem, inputs, output, d_out, d_lse) -> Gradients`` and ``backward_supports(problem)`` (None, or the
      reason why not): gradients by kernels of its own, which find in `output` what `run` returned, its state included.
      Without them gradients come from `tiled`, which makes its own row statistics.
      One that is differentiable by autograd offers `backward` where that differentiates once only, or for callers that
      cannot keep its graph.
    * ``has_lse``: False, if it computes no lse even where a backward pass is to follow.
    * ``missing``: a reason, if the whole backend is not installed here (str or None).
    * ``untuned(problem)``: a reason, if it can run but PyTorch's own kernel is better on this machine (str or None);
      problem is None where the machine as a whole is asked about.
    """

    name: str
    differentiable: bool
    """True: autograd can go through `run` itself. False: gradients come from a backward pass."""

    def supports(self, problem: Problem) -> str | None:
        """None if it can run the problem, else the reason why not."""
        ...

    def run(self, problem: Problem, inputs: Inputs) -> Output:
        """Compute; lse may be None unless `problem.needs_lse`, and a state is for `problem.needs_state` only."""
        ...

    def tile(self, problem: Problem) -> tuple[int, int]:
        """Queries and keys of one tile."""
        ...

    def note(self, problem: Problem) -> str:
        """What a reader of the plan should know, such as promises that do not hold here; may be empty."""
        ...


_PLACES = {
    "reference": ("qkv.backends.reference", "ReferenceBackend"),
    "tiled": ("qkv.backends.tiled.forward", "TiledBackend"),
    "sdpa": ("qkv.backends.sdpa", "SdpaBackend"),
    "cpu": ("qkv.backends.cpu", "CpuBackend"),
}
NAMES = (*_PLACES, *(f"cpu:{isa}" for isa in ISAS))


def no_backward(backend: Backend, problem: Problem) -> str | None:
    """None if the backend has a backward pass of its own for the problem, else why not: then `tiled` has."""
    if getattr(backend, "backward", None) is None:
        return f"{backend.name} has no backward pass of its own"
    if 0 in (problem.B, problem.Hq, problem.Lq, problem.Lk, problem.Dv):
        return "there is nothing to compute"
    supports: Callable[[Problem], str | None] | None = getattr(backend, "backward_supports", None)
    return supports(problem) if supports is not None else None


@cache
def load(name: str) -> Backend:
    """The backend called `name`, one of NAMES."""
    base, _, isa = name.partition(":")
    module, attribute = _PLACES[base]
    factory = getattr(import_module(module), attribute)
    backend: Backend = factory(isa=isa) if isa else factory()
    return backend
