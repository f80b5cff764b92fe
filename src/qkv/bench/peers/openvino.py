"""OpenVINO's operator ScaledDotProductAttention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkv.bench.inputs import Inputs
from qkv.bench.peers.base import Prepared, Setup, as_numpy, refuse_unless


class OpenVino:
    """Inputs in the case's own type, computed in that type."""

    def __init__(self, setup: Setup) -> None:
        import openvino as ov

        self.ov, self.core, self.threads = ov, ov.Core(), setup.threads

    def prepare(self, inputs: Inputs) -> Prepared:
        ov, case = self.ov, inputs.case
        refuse_unless(case.Hq == case.Hkv, "the operator takes no grouped heads")
        refuse_unless(case.mask in ("full", "causal"), "would need a dense mask")
        refuse_unless(not case.rank and not case.backward, "no such call")
        from openvino import opset13

        element = {"f32": ov.Type.f32, "bf16": ov.Type.bf16, "f16": ov.Type.f16}[case.dtype]
        shapes = [list(t.shape) for t in (inputs.q, *inputs.sets[0])]
        parameters = [opset13.parameter(shape, element) for shape in shapes]
        node = opset13.scaled_dot_product_attention(*parameters, causal=case.mask == "causal")
        # float16 is computed in float32: the CPU plug-in's own half hint computes in bfloat16 on most processors.
        precision = "bf16" if case.dtype == "bf16" else "f32"
        config = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = self.core.compile_model(ov.Model([opset13.result(node)], parameters), "CPU", config)
        calls = []
        for k, v in inputs.sets:
            request = compiled.create_infer_request()
            for n, t in enumerate((inputs.q, k, v)):
                holder = ov.Tensor(element, list(t.shape))
                holder.data.view(np.int16 if element != ov.Type.f32 else np.float32)[...] = (
                    as_numpy(t) if case.dtype != "f16" else as_numpy(t).view(np.int16)
                )
                request.set_input_tensor(n, holder)
            calls.append(lambda request=request: (request.infer(share_outputs=True), request)[1])

        def read(request: Any) -> Tensor:
            data = request.get_output_tensor(0).data
            if case.dtype == "bf16":
                return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
            return torch.from_numpy(data.copy())

        return Prepared(calls, read)
