"""The instruction sets of the native kernels: known by name where the extension is not, too."""

from __future__ import annotations

# As in csrc/isas.def, which a test compares: best first, and what a processor has to have, by the compiler's names.
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c")
ISAS: dict[str, tuple[str, ...]] = {
    "avx512bf16": ("avx512bf16", *_AVX512),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma", "f16c"),
    "neonbf16": ("simd", "bf16"),
    "neon": ("simd",),
    "portable": (),
}
UNMEASURED = ("neonbf16", "neon")  # nobody has timed these: PyTorch's own kernel goes first until somebody has

SHARED = "avx2"  # what the peers of `qkv bench` can be held to, too
TUNED = tuple(name for name, needed in ISAS.items() if needed)  # for some processors, unlike "portable"


def tuned_for(flags: str) -> list[str]:
    """Those of TUNED that a processor with these flags has. Linux writes avx512_bf16, and asimd for simd."""
    found = set(flags.replace("_", "").replace("asimd", "simd").split())
    return [name for name in TUNED if found.issuperset(ISAS[name])]
