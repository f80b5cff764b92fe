"""Who takes part, by name; a module for each library, imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import ClassVar

from qkv.bench.cases import Case
from qkv.bench.inputs import Inputs
from qkv.bench.peers.base import Peer, Prepared, Setup, Unavailable, first_line, version_of
from qkv.bench.peers.torch import Qkv

LEFT_OUT = "left out"


class Roster:
    """Peers by name, made on first use; a name may end in a type, as in "ggml f16"."""

    # Name -> module of this package, class, distribution whose version is reported ("" for one without).
    KNOWN: ClassVar[dict[str, tuple[str, str, str]]] = {
        "sdpa": ("torch", "Sdpa", "torch"),
        "matmuls": ("torch", "Matmuls", "torch"),
        "flex": ("torch", "Flex", "torch"),
        "openvino": ("openvino", "OpenVino", "openvino"),
        "onnxruntime": ("onnx", "OnnxRuntime", "onnxruntime"),
        "jax": ("jax", "Jax", "jax"),
        "ggml": ("ggml", "Ggml", ""),
    }

    def __init__(self, setup: Setup, backend: str | None = None, only: set[str] | None = None) -> None:
        self.setup, self.backend, self.only = setup, backend, only
        self.ours: Peer = Qkv(setup, backend)
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
                peer = getattr(importlib.import_module(f"{__name__}.{module}"), cls)(self.setup)
            except Unavailable as reason:
                self.missing[name] = str(reason)
                raise
            except Exception as error:  # a broken installation must not end the run
                self.missing[name] = f"failed to load: {first_line(error)}"
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
            raise Unavailable(f"failed: {first_line(error)}") from None


def describe_case(case: Case) -> str:
    """Shapes in one line: B Hq/Hkv Lq x Lk D/Dv."""
    return f"B={case.B} H={case.Hq}/{case.Hkv} L={case.Lq}x{case.Lk} D={case.D}/{case.Dv} {case.dtype} {case.mask}"
