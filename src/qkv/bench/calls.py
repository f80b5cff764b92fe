"""The rows of forward calls: a case, who takes part, and the ratios that this project promised to reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qkv.bench.cases import BEST, BEST_BUT_GGML, LIMIT, Case, Row, Target

# What is promised where everybody is held to AVX2; every row is of that mode.
AVX2 = {
    "full 2048 d128 f32": (Target(BEST, 1.05), Target(LIMIT, 0.93)),
    "full 2048 d64 f32": (Target(BEST, 1.05), Target(LIMIT, 0.9)),
    **{f"full 2048 d{D} bf16": (Target(BEST, 1.1),) for D in (128, 64)},
    **{f"causal 2048 d{D} {dtype}": (Target(BEST, 1.4),) for D in (128, 64) for dtype in ("f32", "bf16")},
    **{f"causal 512 d{D} f32": (Target(BEST, 1.7),) for D in (128, 64)},
    **{f"{call} d{D} f16": (Target("qkv bf16", 1 / 1.05),) for call in ("full 2048", "causal 2048") for D in (128, 64)},
    **{f"window 256 of 2048 d128 {dtype}": (Target(BEST, 2.5),) for dtype in ("f32", "bf16")},
    **{f"documents 256 of 4096 d64 {dtype}": (Target(BEST, 4.0),) for dtype in ("f32", "bf16")},
    **{f"decode {heads} bf16 warm": (Target("sdpa", 3.0),) for heads in ("32/32", "32/8", "8x32/8")},
    "decode 32/32 f32 cold": (Target(LIMIT, 0.85),),
    "decode 32/32 bf16 cold": (Target(LIMIT, 0.8),),
    **{
        f"decode {heads} {dtype} cold": (Target(LIMIT, 0.6),)
        for heads in ("32/8", "8x32/8")
        for dtype in ("f32", "bf16")
    },
}


def all_rows(cache_bytes: int, *, more_mla: bool = False) -> list[Row]:
    """Every row, in the order they run. `cache_bytes` decides which decode rows do not fit the cache."""
    rows = [*prefill(), *sparse(), *decode(cache_bytes), *latent(more_mla), *rest()]
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    return [replace(row, held=AVX2.get(row.name, ())) for row in rows]


def prefill() -> Iterator[Row]:
    # Float16 runs beside the same call in float32, whose time it may exceed by 1.3 at most.
    f16_target = (Target("qkv f32", 1 / 1.3),)
    for D in (128, 64):
        for mask, tokens in (("full", 2048), ("causal", 2048), ("causal", 512)):
            for dtype in ("f32", "bf16", "f16"):
                case = Case(dtype, tokens, tokens, D, mask=mask)
                others = {
                    "f32": ("openvino", "onnxruntime", "jax", "ggml"),
                    "bf16": ("openvino", "jax", "ggml f16"),
                    "f16": ("openvino", "onnxruntime", "ggml"),
                }[dtype]
                flex = ("flex",) if (mask, tokens, D) == ("causal", 2048, 128) and dtype != "f16" else ()
                if dtype == "f16":
                    targets = f16_target
                elif tokens == 512:
                    targets = (Target("sdpa", 3.0 if dtype == "bf16" else 1.8),)
                elif mask == "full":
                    targets = (Target(BEST, 1.1 if dtype == "bf16" else 1.0),)
                else:
                    targets = (Target(BEST, 2.0 if dtype == "bf16" else 1.3),)
                yield Row(
                    f"{mask} {tokens} d{D} {dtype}",
                    case,
                    ("sdpa", *flex, *others),
                    targets,
                    {f"qkv {of}": replace(case, dtype=of) for of in ("f32", "bf16")} if dtype == "f16" else {},
                    "gemm",
                    quick=D == 128 and tokens == 2048 and dtype != "f16",
                )
    case = Case("f16", 512, 512, 64, B=8)
    yield Row("full 8x512 d64 f16", case, ("sdpa",), f16_target, {"qkv f32": replace(case, dtype="f32")}, "gemm")


def sparse() -> Iterator[Row]:
    for dtype in ("f32", "bf16"):
        case = Case(dtype, 2048, 2048, Hkv=2, mask="causal")
        peers: tuple[str, ...] = ("sdpa", "onnxruntime") if dtype == "f32" else ("sdpa", "onnxruntime f16")
        yield Row(
            f"gqa 8/2 causal 2048 d128 {dtype}",
            case,
            peers,
            (Target("qkv 8/8", 1.0),),
            {"qkv 8/8": replace(case, Hkv=8)},
            "gemm",
        )
    for dtype in ("f32", "bf16"):
        bf16 = dtype == "bf16"
        case = Case(dtype, 2048, 2048, mask="window", size=256)
        peers = ("flex", "sdpa", "onnxruntime" if not bf16 else "onnxruntime f16")
        yield Row(
            f"window 256 of 2048 d128 {dtype}", case, peers, (Target("flex", 4.5 if bf16 else 1.8),), {}, "gemm", bf16
        )
    for dtype in ("f32", "bf16"):
        case = Case(dtype, 4096, 4096, 64, mask="documents", size=256)
        target = Target("sdpa", 25.0 if dtype == "bf16" else 14.0)
        yield Row(f"documents 256 of 4096 d64 {dtype}", case, ("sdpa", "flex"), (target,), {}, "gemm")


def decode(cache_bytes: int) -> Iterator[Row]:
    shapes = {"32/32": (1, 32, 32), "32/8": (1, 32, 8), "8x32/8": (8, 32, 8)}
    warm = {
        ("32/32", "bf16"): (Target(BEST_BUT_GGML, 6.5), Target("ggml f16", 1.0)),
        ("32/8", "bf16"): (Target(BEST_BUT_GGML, 12.0), Target("ggml f16", 4.0)),
        ("8x32/8", "bf16"): (Target("sdpa", 22.0), Target("ggml f16", 3.0)),
        ("32/32", "f32"): (Target(BEST, 0.95),),
        ("32/8", "f32"): (Target(BEST, 2.0),),
        ("8x32/8", "f32"): (Target("sdpa", 3.0),),
    }
    for dtype in ("bf16", "f32", "f16"):
        for label, (B, Hq, Hkv) in shapes.items():
            for cold in (False, True):
                case = Case(dtype, 1, 4096, B=B, Hq=Hq, Hkv=Hkv, cold=cold)
                if cold and (dtype == "f16" or (B > 1 and case.cold_sets(cache_bytes) == 1)):
                    continue  # where one set is four times the cache, the warm row is as cold as can be
                if dtype == "f16" and B > 1:
                    continue
                peers = ["sdpa", "flex", "jax", "ggml"]
                peers += ["openvino"] if Hq == Hkv else []
                peers += ["onnxruntime f16", "ggml f16"] if dtype == "bf16" else ["onnxruntime"]
                targets = () if cold else warm.get((label, dtype), ())
                if cold or (dtype != "f16" and case.kv_bytes > cache_bytes):
                    targets += (Target(LIMIT, 0.85),)
                yield Row(
                    f"decode {label} {dtype} {'cold' if cold else 'warm'}",
                    case,
                    tuple(peers),
                    targets,
                    {},
                    "read",
                    quick=dtype == "bf16" and B == 1,
                )


def latent(more: bool) -> Iterator[Row]:
    for heads, keys in ((128, 4096), *(((16, 4096), (32, 4096), (64, 4096), (128, 16384)) if more else ())):
        case = Case("bf16", 1, keys, 576, Hq=heads, Hkv=1, rank=512)
        peers = ("matmuls", "ggml f16", "sdpa") if more else ("matmuls", "ggml f16")
        yield Row(f"mla {heads} heads {keys} bf16", case, peers, (Target("matmuls", 1.0),), {}, "gemm", heads == 128)


def rest() -> Iterator[Row]:
    for dtype in ("f32", "bf16"):
        case = Case(dtype, 32, 32, 32, Hq=4, Hkv=4)
        yield Row(
            f"tiny 1x4x32x32 {dtype}", case, ("sdpa",), (Target("sdpa", 1.0, slack_us=3.0),), quick=dtype == "f32"
        )
