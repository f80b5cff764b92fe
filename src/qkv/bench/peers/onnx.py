"""ONNX Runtime's attention operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkv.bench.cases import Case
from qkv.bench.inputs import Inputs
from qkv.bench.peers.base import Prepared, Setup, as_numpy, refuse_unless, version_of


class OnnxRuntime:
    """GroupQueryAttention for causal, windowed and cached calls, MultiHeadAttention for full ones."""

    def __init__(self, setup: Setup) -> None:
        refuse_unless(setup.isa is None, "its kernels cannot be held to AVX2")
        version_of("onnx")
        import onnxruntime as ort

        self.ort, self.threads = ort, setup.threads

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        refuse_unless(case.dtype in ("f32", "f16"), "no bfloat16 attention on the CPU")
        refuse_unless(not case.rank and not case.backward, "no such call")
        refuse_unless(case.mask in ("full", "causal", "window"), "would need a dense mask")
        if case.Lq == 1:
            return self._cached(inputs)
        return self._full(inputs) if case.mask == "full" else self._causal(inputs)

    def _full(self, inputs: Inputs) -> Prepared:
        refuse_unless(inputs.case.Hq == inputs.case.Hkv, "MultiHeadAttention takes no grouped heads")
        case = inputs.case
        session = self._session(case, "MultiHeadAttention", ["q", "k", "v"], ["o"], {"num_heads": case.Hq}, {})
        return self._prepared(session, inputs, ["o"])

    def _causal(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        wide = {"ok": (case.B, case.Hkv, case.Lk, case.D), "ov": (case.B, case.Hkv, case.Lk, case.D)}
        attributes = {"num_heads": case.Hq, "kv_num_heads": case.Hkv}
        if case.mask == "window":
            attributes["local_window_size"] = case.size
        names = ["q", "k", "v", "", "", "sl", "tl"]
        session = self._session(case, "GroupQueryAttention", names, ["o", "ok", "ov"], attributes, wide)
        return self._prepared(session, inputs, ["o", "ok", "ov"], self._lengths(case))

    def _cached(self, inputs: Inputs) -> Prepared:
        """The last key arrives with the query, the others lie in the cache, which past and present share."""
        case = inputs.case
        cache = (case.B, case.Hkv, case.Lk, case.D)
        wide = {name: cache for name in ("pk", "pv", "ok", "ov")}
        names = ["q", "k", "v", "pk", "pv", "sl", "tl"]
        attributes = {"num_heads": case.Hq, "kv_num_heads": case.Hkv}
        session = self._session(case, "GroupQueryAttention", names, ["o", "ok", "ov"], attributes, wide)
        calls = []
        for k, v in inputs.sets:
            caches = [self._value(t) for t in (k, v)]
            feeds = {"q": self._value(inputs.q.transpose(1, 2).flatten(2)), **self._lengths(case)}
            feeds |= {n: self._value(t[:, :, -1:].transpose(1, 2).flatten(2)) for n, t in (("k", k), ("v", v))}
            feeds |= dict(zip(("pk", "pv"), caches, strict=True))
            calls.append(self._bind(session, feeds, ["o"], dict(zip(("ok", "ov"), caches, strict=True))))
        return Prepared(calls, self._reader(case))

    def _lengths(self, case: Case) -> dict[str, Any]:
        value = self.ort.OrtValue.ortvalue_from_numpy
        return {
            "sl": value(np.full(case.B, case.Lk - 1, np.int32)),
            "tl": value(np.array([case.Lk], np.int32)),
        }

    def _prepared(
        self, session: Any, inputs: Inputs, outputs: list[str], more: dict[str, Any] | None = None
    ) -> Prepared:
        calls = []
        for k, v in inputs.sets:
            feeds = {n: self._value(t.transpose(1, 2).flatten(2)) for n, t in zip("qkv", (inputs.q, k, v), strict=True)}
            calls.append(self._bind(session, feeds | (more or {}), outputs, {}))
        return Prepared(calls, self._reader(inputs.case))

    def _value(self, t: Tensor) -> Any:
        return self.ort.OrtValue.ortvalue_from_numpy(as_numpy(t))

    def _bind(self, session: Any, feeds: dict[str, Any], outputs: list[str], shared: dict[str, Any]) -> Any:
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name)
        for name, value in shared.items():
            binding.bind_ortvalue_output(name, value)

        def call() -> Any:
            session.run_with_iobinding(binding)
            return binding

        return call

    def _reader(self, case: Case) -> Any:
        def read(binding: Any) -> Tensor:
            out = torch.from_numpy(binding.copy_outputs_to_cpu()[0])
            return out.view(case.B, case.Lq, case.Hq, case.Dv).transpose(1, 2)

        return read

    def _session(
        self,
        case: Case,
        operator: str,
        names: list[str],
        outputs: list[str],
        attributes: dict[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> Any:
        from onnx import TensorProto, helper

        element = TensorProto.FLOAT if case.dtype == "f32" else TensorProto.FLOAT16
        tokens = 1 if case.Lq == 1 else case.Lk
        known: dict[str, tuple[int, ...]] = {
            "q": (case.B, case.Lq, case.Hq * case.D),
            "k": (case.B, tokens, case.Hkv * case.D),
            "v": (case.B, tokens, case.Hkv * case.D),
            "o": (case.B, case.Lq, case.Hq * case.D),
        }
        known |= shapes

        def info(name: str) -> Any:
            if name in ("sl", "tl"):
                return helper.make_tensor_value_info(name, TensorProto.INT32, [case.B if name == "sl" else 1])
            return helper.make_tensor_value_info(name, element, known[name])

        node = helper.make_node(operator, names, outputs, domain="com.microsoft", **attributes)
        graph = helper.make_graph([node], "attention", [info(n) for n in names if n], [info(n) for n in outputs])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        return self.ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
