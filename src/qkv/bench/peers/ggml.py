"""llama.cpp's ggml as a peer: `ggml_flash_attn_ext` through ctypes, from an installed package that carries the library.

Such a package holds ggml as a shared library with a plain C interface; nothing is compiled here. Looked for in this
order: the path in QKV_GGML, llama-cpp-python (built on this machine, hence for its processor), pywhispercpp (a wheel
built for AVX2). Structures whose size may grow between versions are handed over larger than needed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv.bench.inputs import Inputs
from qkv.bench.peers.base import Prepared, Setup, Unavailable, refuse_unless

_TYPES = {"f32": 0, "f16": 1, "bf16": 30}  # enum ggml_type
_NAMES = ("libggml-cpu.so", "libggml-cpu.dylib", "ggml-cpu.dll")


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(ctypes.Structure):
    _fields_ = [("work_size", c_size_t), ("work_data", c_void_p), ("rest", c_size_t * 30)]


def find_libraries() -> Iterator[Path]:
    """Shared libraries that hold ggml's CPU kernels, the preferred one first."""
    given = os.environ.get("QKV_GGML")
    places = [Path(given)] if given else []
    for package, below in (("llama_cpp", "lib"), ("pywhispercpp", "..")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            places.append(Path(root) / below)
    for place in places:
        if place.is_file():
            yield place
        for name in _NAMES:
            if (place / name).is_file():
                yield (place / name).resolve()


class Ggml:
    def __init__(self, setup: Setup) -> None:
        reasons = []
        for path in find_libraries():
            try:
                lib = _load(path)
            except (OSError, AttributeError) as error:
                reasons.append(f"{path.name}: {error}")
                continue
            wide = bool(lib.ggml_cpu_has_avx512())
            if setup.isa and wide:
                reasons.append("built for AVX-512, cannot be held to AVX2")
                continue
            self.lib, self.threads = lib, setup.threads
            version = lib.ggml_version().decode() if hasattr(lib, "ggml_version") else "version unknown"
            self.version = f"{version} ({'AVX-512' if wide else 'built without AVX-512'})"
            return
        raise Unavailable(
            "; ".join(reasons) or "no package with libggml-cpu is installed (pip install llama-cpp-python)"
        )

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        refuse_unless(case.dtype in _TYPES and not case.backward, "no such call")
        memory = _Memory(self.lib, _bytes(inputs))
        lib, kind = self.lib, _TYPES[case.dtype]
        q = memory.tensor(inputs.q.float(), 0)
        mask = memory.tensor(_half_mask(case.dense_mask()), 1) if case.mask != "full" else None
        calls = []
        for keys, values in inputs.sets:
            k = memory.tensor(keys, kind)
            if case.rank:
                row = case.D * case.torch_dtype.itemsize
                strides = (row, row * case.Lk, row * case.Lk * case.Hkv)
                v = lib.ggml_view_4d(memory.context, k, case.rank, case.Lk, case.Hkv, case.B, *strides, 0)
            else:
                v = memory.tensor(values, kind)
            out = lib.ggml_flash_attn_ext(memory.context, q, k, v, mask, case.scale, 0.0, 0.0)
            calls.append(memory.call(out, self.threads))

        def read(out: Any) -> Tensor:
            count = case.B * case.Lq * case.Hq * case.Dv
            data = (c_float * count).from_address(lib.ggml_get_data(out))
            flat = torch.frombuffer(data, dtype=torch.float32).clone()
            return flat.view(case.B, case.Lq, case.Hq, case.Dv).transpose(1, 2)

        return Prepared(calls, read)


class _Memory:
    """A ggml context of fixed size; freed when the last call that uses it is gone."""

    def __init__(self, lib: Any, data_bytes: int) -> None:
        self.lib = lib
        self.context = lib.ggml_init(_InitParams(data_bytes, None, False))
        if not self.context:
            raise Unavailable("ggml could not allocate its context")

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.lib.ggml_free(self.context)

    def tensor(self, t: Tensor, kind: int) -> int:
        """A copy that starts on a cache line, as in llama.cpp's own buffers (a context alone aligns to 16 bytes)."""
        t = t.contiguous()
        lib, size = self.lib, t.element_size()
        base = lib.ggml_new_tensor_4d(self.context, kind, t.numel() + 64 // size, 1, 1, 1)
        offset = -lib.ggml_get_data(base) % 64
        strides = [t.stride(d) * size for d in (2, 1, 0)]
        made: int = lib.ggml_view_4d(self.context, base, *reversed(t.shape), *strides, offset)
        ctypes.memmove(lib.ggml_get_data(made), t.data_ptr(), t.nbytes)
        return made

    def call(self, out: int, threads: int) -> Any:
        lib = self.lib
        graph = lib.ggml_new_graph(self.context)
        lib.ggml_build_forward_expand(graph, out)
        plan = lib.ggml_graph_plan(graph, threads, None)
        work = ctypes.create_string_buffer(plan.work_size + 64)
        plan.work_data = (ctypes.addressof(work) + 63) // 64 * 64

        def compute(keep: Any = (self, work)) -> int:
            if lib.ggml_graph_compute(graph, ctypes.byref(plan)) != 0:
                raise RuntimeError("ggml_graph_compute failed")
            return out

        return compute


def _bytes(inputs: Inputs) -> int:
    case = inputs.case
    tensors = [t for k, v in inputs.sets for t in ((k,) if case.rank else (k, v))]
    data = sum(t.nbytes for t in tensors) + 4 * inputs.q.numel()
    results = 4 * len(inputs.sets) * case.B * case.Hq * case.Lq * case.Dv
    mask = 0 if case.mask == "full" else 2 * case.Lk * (case.Lq + 64)
    return data + results + mask + (1 << 20) * (1 + len(inputs.sets))


def _half_mask(mask: Tensor | None) -> Tensor:
    """0 where visible and -inf where not, in float16, with rows padded to a multiple of 64 as llama.cpp does."""
    assert mask is not None
    rows = (mask.shape[0] + 63) // 64 * 64
    out = torch.full((1, 1, rows, mask.shape[1]), float("-inf"), dtype=torch.float16)
    out[0, 0, : mask.shape[0]].masked_fill_(mask, 0.0)
    return out


def _load(path: Path) -> Any:
    """Symbols of libggml-base are found through libggml-cpu, which depends on it."""
    lib = ctypes.CDLL(str(path))
    pointer, size = c_void_p, c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_4d": (pointer, [pointer, c_int, size, size, size, size]),
        "ggml_view_4d": (pointer, [pointer, pointer, *[size] * 4, *[c_size_t] * 3, c_size_t]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_flash_attn_ext": (pointer, [pointer, pointer, pointer, pointer, pointer, c_float, c_float, c_float]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_graph_plan": (_Plan, [pointer, c_int, pointer]),
        "ggml_graph_compute": (c_int, [pointer, POINTER(_Plan)]),
        "ggml_cpu_has_avx512": (c_int, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    if hasattr(lib, "ggml_version"):
        lib.ggml_version.restype = ctypes.c_char_p
    if hasattr(lib, "ggml_cpu_init"):
        lib.ggml_cpu_init()
    return lib
