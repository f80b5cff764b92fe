"""JAX's attention under jit."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkv.bench.inputs import Inputs
from qkv.bench.peers.base import Prepared, Setup, refuse_unless


class Jax:
    """jax.nn.dot_product_attention under jit."""

    def __init__(self, setup: Setup) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["NPROC"] = str(setup.threads)  # what XLA's CPU client sizes its thread pool by
        if setup.isa:
            os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_max_isa=AVX2"
        import jax

        self.jax = jax

    def prepare(self, inputs: Inputs) -> Prepared:
        jax, case = self.jax, inputs.case
        refuse_unless(case.dtype in ("f32", "bf16"), "no float16 matrix product on the CPU")
        refuse_unless(case.mask in ("full", "causal"), "would need a dense mask")
        refuse_unless(not case.rank and not case.backward, "no such call")

        def array(t: Tensor) -> Any:  # (B, L, H, D); copied, so that XLA owns aligned memory
            return jax.numpy.array(jax.dlpack.from_dlpack(t.transpose(1, 2).contiguous()), copy=True)

        function = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=case.mask == "causal"))

        def wait(q: Any, k: Any, v: Any) -> Any:
            return function(q, k, v).block_until_ready()

        q = array(inputs.q)
        calls = []
        for k, v in inputs.sets:
            calls.append(partial(wait, q, array(k), array(v)))
        calls[0]()

        def read(out: Any) -> Tensor:
            return torch.from_numpy(np.array(out.astype("float32"))).transpose(1, 2)

        return Prepared(calls, read)
