"""Who takes part: ours and PyTorch's own here, the other libraries in `external` and `ggml`.

A peer turns a case into ready calls, one for each set of K and V, each the way its users would make it: in the layout
it likes, its inputs already converted, its graph already compiled. What it cannot do it refuses with a reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.bench import machine
from qkv.bench.cases import Case, Inputs

LEFT_OUT = "left out"


class Unavailable(Exception):
    """This peer cannot run this case here; the text says why."""


@dataclass
class Prepared:
    """Calls that are ready to be timed, and how to see a call's result as out (B, Hq, Lq, Dv), or out, dq, dk, dv."""

    calls: Sequence[Callable[[], Any]]
    read: Callable[[Any], Any]
    note: str = ""


@dataclass(frozen=True)
class Setup:
    threads: int
    isa: str | None = None  # "avx2" when everybody is held to it


class Peer(Protocol):
    def __init__(self, setup: Setup) -> None: ...

    def prepare(self, inputs: Inputs) -> Prepared: ...


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"{distribution} is not installed (pip install {distribution})") from None


class Qkv:
    """Ours, through the public function."""

    def __init__(self, setup: Setup, backend: str | None = None) -> None:
        self.backend = backend

    def prepare(self, inputs: Inputs) -> Prepared:
        import qkv

        case = inputs.case
        masks: dict[str, Callable[[], Any]] = {
            "full": lambda: None,
            "causal": qkv.causal,
            "window": lambda: qkv.sliding_window(case.size),
            "documents": lambda: qkv.documents(
                [min(case.size, case.Lk - i) for i in range(0, case.Lk, case.size)],
            ),
        }
        mask, backend = masks[case.mask](), self.backend

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = qkv.attention(q, k, v, mask=mask, backend=backend)  # no pair: return_lse is not set
            return out

        with torch.set_grad_enabled(case.backward):
            tensors = inputs.leaves() if case.backward else (inputs.q, *inputs.sets[0])
            plan = qkv.plan(*tensors, mask=mask, backend=backend)
        return _torch_calls(inputs, call, note=f"{plan.backend}, {plan.note}" if plan.note else plan.backend)


class Sdpa:
    """torch.nn.functional.scaled_dot_product_attention; masks it has no flag for as boolean tensors."""

    def __init__(self, setup: Setup) -> None:
        pass

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        causal = case.mask == "causal"
        mask = None if causal else case.dense_mask()
        gqa = case.Hq != case.Hkv

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)

        return _torch_calls(inputs, call)


class Matmuls:
    """Attention of one query token as two plain matmuls and a softmax, on float32 copies where its type is slower."""

    def __init__(self, setup: Setup) -> None:
        pass

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        if (case.B, case.Hkv, case.Lq, case.mask) != (1, 1, 1, "full"):
            raise Unavailable("written for one sequence, one key head and one query token")
        kind = machine.product_type(case.torch_dtype)
        note = "" if kind == case.torch_dtype else "on float32 copies"
        inputs = inputs.to("f32") if note else inputs

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = torch.mm(q[0, :, 0] * case.scale, k[0, 0].t())
            return torch.mm(torch.softmax(scores, -1), v[0, 0])[None, :, None]

        return _torch_calls(inputs, call, note)


class Flex:
    """FlexAttention under torch.compile, with its block mask built beforehand."""

    def __init__(self, setup: Setup) -> None:
        if setup.isa:
            raise Unavailable("its generated code cannot be held to AVX2 (compiled for the native processor)")

    def prepare(self, inputs: Inputs) -> Prepared:
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        except ImportError as error:
            raise Unavailable(f"this torch has no FlexAttention ({error})") from None
        case = inputs.case
        size = case.size
        rules: dict[str, Callable[..., Any]] = {
            "causal": lambda b, h, i, j: j <= i,
            "window": lambda b, h, i, j: (j <= i) & (i - j < size),
            "documents": lambda b, h, i, j: i // size == j // size,
        }
        block_mask = None
        torch.compiler.reset()  # otherwise one shape more would be compiled with unknown sizes, or not at all
        try:
            if case.mask in rules:
                block_mask = create_block_mask(rules[case.mask], None, None, case.Lq, case.Lk, device="cpu")
            compiled = torch.compile(flex_attention, dynamic=False)
            gqa = case.Hq != case.Hkv

            def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
                return compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)

            call(inputs.q, *inputs.sets[0])
        except Exception as error:  # a missing compiler surfaces as any of a dozen types
            raise Unavailable(f"torch.compile failed: {_first_line(error)}") from None
        return _torch_calls(inputs, call)


def _torch_calls(inputs: Inputs, call: Callable[[Tensor, Tensor, Tensor], Tensor], note: str = "") -> Prepared:
    if inputs.case.backward:
        return _with_backward(inputs, call, note)
    return Prepared([partial(call, inputs.q, k, v) for k, v in inputs.sets], lambda out: out, note)


def _with_backward(inputs: Inputs, call: Callable[[Tensor, Tensor, Tensor], Tensor], note: str) -> Prepared:
    tensors = inputs.leaves()

    def both() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            out = call(*tensors)
            return (out.detach(), *torch.autograd.grad(out, tensors, inputs.d_out))

    return Prepared([both], lambda result: result, note)


def _first_line(error: BaseException) -> str:
    """The telling line of a message: the first, but OpenVINO begins with where in its source it was thrown."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if lines[0].startswith("Exception from") else lines[0])[:160]


class Roster:
    """Peers by name, made on first use; a name may end in a type, as in "ggml f16"."""

    # Name -> module, class, distribution whose version is reported ("" for one without).
    KNOWN: ClassVar[dict[str, tuple[str, str, str]]] = {
        "sdpa": ("qkv.bench.peers", "Sdpa", "torch"),
        "matmuls": ("qkv.bench.peers", "Matmuls", "torch"),
        "flex": ("qkv.bench.peers", "Flex", "torch"),
        "openvino": ("qkv.bench.external", "OpenVino", "openvino"),
        "onnxruntime": ("qkv.bench.external", "OnnxRuntime", "onnxruntime"),
        "jax": ("qkv.bench.external", "Jax", "jax"),
        "ggml": ("qkv.bench.ggml", "Ggml", ""),
    }

    def __init__(self, setup: Setup, backend: str | None = None, only: set[str] | None = None) -> None:
        self.setup, self.only = setup, only
        self.ours = Qkv(setup, backend)
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self._made: dict[str, Peer] = {}

    def get(self, name: str) -> Peer:
        if self.only is not None and name not in self.only:
            raise Unavailable(LEFT_OUT)
        if name in self.missing:
            raise Unavailable(self.missing[name])
        if name not in self._made:
            module, cls, distribution = self.KNOWN[name]
            try:
                version = version_of(distribution) if distribution else ""
                peer = getattr(importlib.import_module(module), cls)(self.setup)
            except Unavailable as reason:
                self.missing[name] = str(reason)
                raise
            except Exception as error:  # a broken installation must not end the run
                self.missing[name] = f"failed to load: {_first_line(error)}"
                raise Unavailable(self.missing[name]) from None
            self.versions[name] = version or getattr(peer, "version", "")
            self._made[name] = peer
        return self._made[name]

    def prepare(self, contender: str, inputs: Inputs) -> Prepared:
        """Ready calls of "qkv", or of a peer by name; raises Unavailable with the reason."""
        name, _, dtype = contender.partition(" ")
        if name == "qkv":
            return self.ours.prepare(inputs)
        peer = self.get(name)
        try:
            return peer.prepare(inputs.to(dtype or inputs.case.dtype))
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"failed: {_first_line(error)}") from None


def refuse_unless(condition: bool, reason: str) -> None:
    if not condition:
        raise Unavailable(reason)


def describe_case(case: Case) -> str:
    """Shapes in one line: B Hq/Hkv Lq x Lk D/Dv."""
    return f"B={case.B} H={case.Hq}/{case.Hkv} L={case.Lq}x{case.Lk} D={case.D}/{case.Dv} {case.dtype} {case.mask}"
