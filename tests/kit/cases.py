"""One attention call as data, and the named ones: what correctness and gradients run, with what the benchmark times.

A `Config` holds no tensor of the call, only sizes and descriptions, so it prints, compares and replays. A mask or a
bias is a nested tuple such as `("and", ("causal",), ("sliding_window", 4))`, which builds the qkv value here and is
read by the oracle's own predicates there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import qkv
from qkv.bench.calls import all_rows
from qkv.masks import as_mask, portion
from tests.kit.masks import MASK_MODS, Spec

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

# Memory layouts: how a tensor's elements lie, its values being the same (`lay` in generator.py).
LAYOUTS = ("dense", "transposed", "step_rows", "step_dim", "column", "offset", "padded", "expand_batch", "expand_heads")


@dataclass(frozen=True)
class Config:
    """One call, replayable: everything random about its values comes from `seed`."""

    seed: int = 0
    name: str = ""
    B: int = 1
    Hq: int = 2
    Hkv: int = 2
    Lq: int = 8
    Lk: int = 8
    D: int = 16
    Dv: int = 16
    dtype: str = "f32"
    mask: Spec | None = None
    positions: Spec = ("none",)  # ("none",) ("start",) ("end",) ("int", 3) ("ints", (3, 1)) ("tensor", array)
    bias: tuple[Spec, ...] = ()  # ("tensor", shape, dtype, share of -inf) ("alibi",) ("relative", R) ("t5", ...) ...
    scale: float | None = None
    softcap: float | None = None
    sinks: str | None = None  # a dtype name; some sinks are -inf
    layouts: dict[str, str] = field(default_factory=dict)  # of q k v dout mask
    v_in_k: bool = False  # v is the view k[..., :Dv], as in absorbed latent attention
    flavour: str = "needles"  # needles flat shifted large small: see generator.py; wide: see wide.py
    wide: Spec | None = None
    poison: str = "nan"  # what hidden slots and gaps hold: nan inf huge magnet zero
    visible_nan: bool = False
    dropout_p: float = 0.0  # its seed is drawn after torch.manual_seed(seed)

    def __str__(self) -> str:
        sizes = f"B{self.B} H{self.Hq}/{self.Hkv} L{self.Lq}x{self.Lk} D{self.D}/{self.Dv} {self.dtype}"
        skip = {"name", "B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv", "dtype"}
        plain = Config()
        rest = [
            f"{key}={_short(value)}"
            for key, value in vars(self).items()
            if key not in skip and (key in ("seed", "mask") or repr(value) != repr(getattr(plain, key)))
        ]
        return " ".join([sizes, *rest])

    @property
    def group(self) -> int:
        return max(1, self.Hq // max(1, self.Hkv))

    @property
    def real_scale(self) -> float:
        return self.D**-0.5 if self.scale is None else self.scale


def _short(value: Any) -> str:
    text = np.array2string(value.astype(int), threshold=6) if isinstance(value, np.ndarray) else repr(value)
    return text if len(text) < 160 else text[:150] + "…"


def query_positions(config: Config) -> NDArray[np.int64]:
    """(B, Lq): what the positions of the config mean."""
    kind, *rest = config.positions
    start: Any = 0
    if kind == "end":
        start = config.Lk - config.Lq
    elif kind == "int":
        start = rest[0]
    elif kind == "ints":
        start = np.array(rest[0], np.int64).reshape(-1, 1)
    elif kind == "tensor":
        return np.broadcast_to(rest[0], (config.B, config.Lq)).astype(np.int64)
    return np.broadcast_to(np.arange(config.Lq) + start, (config.B, config.Lq)).astype(np.int64)


def positions_argument(config: Config) -> Any:
    kind, *rest = config.positions
    if kind == "ints":
        return torch.tensor(rest[0], dtype=torch.int64) if config.seed % 2 else list(rest[0])
    if kind == "tensor":
        return torch.from_numpy(rest[0])
    return {"none": None, "start": "start", "end": "end"}.get(kind) if kind != "int" else rest[0]


_BY_INDEX = ("padding", "prefix", "dense", "selected_blocks")


def uses_position(spec: Spec | None) -> bool:
    """Whether the position of a query, not only its index, decides what it sees."""
    if spec is None or spec[0] in _BY_INDEX:
        return False
    if spec[0] in ("and", "or", "not", "per_head"):
        return any(uses_position(part) for part in spec[1:])
    if spec[0] == "portion":
        return uses_position(spec[1])
    return spec[0] not in ("documents", "segments") or spec[2] is None


def qkv_mask(spec: Spec | None, device: str = "cpu") -> qkv.Mask | torch.Tensor | None:
    """The mask of the library that the description names; a tensor that it holds by reference is on the device."""
    if spec is None:
        return None
    kind, *args = spec
    if kind in ("and", "or", "not", "per_head"):
        parts: list[Any] = [qkv_mask(part, device) for part in args]
        parts = [qkv.dense(part) if isinstance(part, torch.Tensor) else part for part in parts]
        if kind == "per_head":
            return qkv.per_head(parts)
        return ~parts[0] if kind == "not" else parts[0] & parts[1] if kind == "and" else parts[0] | parts[1]
    if kind == "portion":
        whole = as_mask(qkv_mask(args[0], device))
        assert whole is not None
        return portion(whole, **dict(zip(("first_key", "first_query", "Lq", "Lk"), args[1:], strict=True)))
    if kind == "dense":
        return torch.from_numpy(args[0].copy()).to(device)
    if kind == "segments":
        ids, k_ids = (None if x is None else torch.from_numpy(x) for x in args)
        return qkv.documents(segment_ids=ids, k_segment_ids=k_ids)
    if kind == "documents":
        return qkv.documents(*(None if x is None else list(x) for x in args))
    if kind == "padding":
        return qkv.padding(list(args[0]), side=args[1])
    if kind == "prefix":
        return qkv.prefix(args[0] if isinstance(args[0], int) else list(args[0]))
    if kind == "blocks":
        return qkv.blocks(torch.from_numpy(args[0]), args[1])
    if kind == "selected_blocks":
        return qkv.selected_blocks(torch.from_numpy(args[0].copy()).to(device), args[1], queries=args[2])
    if kind == "global_tokens":
        return qkv.global_tokens(list(args[0]))
    if kind == "mask_mod":
        return qkv.mask_mod(MASK_MODS[args[0]])
    if kind == "bigbird":
        keys = ("block", "window_blocks", "global_blocks", "random_blocks", "seed")
        return qkv.bigbird(**dict(zip(keys, args, strict=True)))
    if kind == "longformer":
        return qkv.longformer(args[0], global_indices=tuple(args[1]), dilation=args[2])
    return getattr(qkv, kind)(*args)


def qkv_bias(spec: Spec, values: torch.Tensor | None) -> Any:
    """The bias term of the library; `values` is the tensor that the term holds."""
    kind, *args = spec
    if kind == "tensor":
        return values
    if kind == "alibi":
        return qkv.alibi(values)
    if kind == "relative":
        return qkv.relative(values)
    if kind == "t5":
        return qkv.relative(values, buckets="t5", max_distance=args[1], bidirectional=args[2])
    gain, drift = args
    return qkv.score_mod(lambda s, b, h, p, j: s * (gain * (1 + 0.25 * h)) + drift * (j - p))


def _case(name: str, **fields: Any) -> Config:
    fields.setdefault("Hkv", fields.get("Hq", 2))
    fields.setdefault("Lk", fields.get("Lq", 8))
    fields.setdefault("Dv", fields.get("D", 16))
    return Config(name=name, **fields)


_CAUSAL: Spec = ("causal",)
_NEAR: Spec = ("and", _CAUSAL, ("or", ("prefix", 4), ("sliding_window", 24)))


def timed() -> dict[str, Config]:
    """What `qkv bench` times, once of each kind and type, small enough to judge row by row.

    So a kind of call that a benchmark measures is one that the oracle has judged, forward and backward.
    """
    found: dict[str, Config] = {}
    for row in all_rows(32 << 20):
        case, group = row.case, row.case.Hq // row.case.Hkv
        Hkv, Lq = min(case.Hkv, 2), min(case.Lq, 33)
        Lk = Lq if case.Lq == case.Lk else min(case.Lk, 129)
        masks: dict[str, Spec | None] = {
            "full": None,
            "causal": ("causal",),
            "window": ("sliding_window", 9),
            "documents": ("documents", (20, Lk - 20), None),
        }
        kind = "latent" if case.rank else "decode" if case.Lq == 1 else case.mask
        name = f"timed {kind}{' grouped' if group > 1 else ''} {case.dtype}"
        size = {"D": case.D, "Dv": case.rank} if case.rank else {"D": min(case.D, 64), "Dv": min(case.D, 64)}
        sizes = {"B": min(case.B, 2), "Hq": Hkv * min(group, 8), "Hkv": Hkv, "Lq": Lq, "Lk": Lk, **size}
        more = {"dtype": case.dtype, "mask": masks[case.mask], "v_in_k": bool(case.rank)}
        found.setdefault(name, Config(name=name, **sizes, **more))
    return found


_SPARSE_SIZES: dict[str, Any] = {"Hq": 2, "Lq": 150, "Lk": 170, "positions": ("end",)}
_DROPS: dict[str, Any] = {"dropout_p": 0.3, "seed": 5}
_draw = np.random.default_rng(14)

# Masks whose tiles see keys that are no neighbours, or whose rows stand otherwise than in order: with every part of a
# call that asks which key, or which row, a number belongs to.
SPARSE: dict[str, tuple[Spec, dict[str, Any]]] = {
    "strided": (("strided", 7, 0), {}),
    "strided, causal, alibi": (("and", ("strided", 5, 2), _CAUSAL), {"Hq": 4, "Hkv": 2, "bias": (("alibi",),)}),
    "strided, dropout": (("strided", 6, 1), _DROPS | {"dtype": "bf16"}),
    "strided twice": (("or", ("strided", 4, 0), ("strided", 6, 2)), {"bias": (("relative", 9),)}),
    "strided or near": (("or", ("sliding_window", 9), ("and", ("strided", 16, 0), _CAUSAL)), {}),
    "strided or near, dropout": (("or", ("sliding_window", 9), ("strided", 16, 3)), _DROPS),
    "not strided": (("not", ("strided", 2, 0)), {"bias": (("tensor", (2, 150, 170), "f32", 0.1),)}),
    "dilated": (("dilated", 5, 6), {"B": 2, "positions": ("ints", (20, -3)), "sinks": "f32"}),
    "dilated, f16": (("dilated", 4, 9), {"Hq": 4, "Hkv": 1, "dtype": "f16"}),
    "positions in any order": (("strided", 7, 0), {"positions": ("tensor", _draw.permutation(170)[None, :150])}),
    "blocks of 8": (("blocks", _draw.random((1, 2, 22, 22)) < 0.2, 8), {"positions": ("int", 20)}),
    "blocks of 8, score terms": (
        ("blocks", _draw.random((1, 1, 22, 22)) < 0.2, 8),
        {"bias": (("alibi",), ("tensor", (1, 1, 150, 170), "f32", 0.1)), "softcap": 9.0},
    ),
    "blocks of 64": (("blocks", _draw.random((3, 3)) < 0.6, 64), {"positions": ("int", 11), "dtype": "bf16"}),
    "blocks of 20": (("blocks", _draw.random((9, 9)) < 0.3, 20), {"Hq": 4, "Hkv": 2, "dtype": "f64"}),
    "random blocks of 8": (("random_blocks", 3, 8, 2), _DROPS),
    "random blocks of 3": (("random_blocks", 6, 3, 2), {}),
    "chunks of 50, causal": (("and", ("chunked", 50), _CAUSAL), {}),
    "bigbird": (("bigbird", 16, 3, 1, 2, 0), {"dtype": "bf16"}),
    "longformer": (("longformer", 10, (0, 77), 1), {"B": 2}),
    "documents": (("and", _CAUSAL, ("documents", (40, 50, 80), None)), {}),
    "by head": (("per_head", ("strided", 6, 0), ("dilated", 4, 9)), {}),
    "selected tokens": (
        ("selected_blocks", _draw.integers(-1, 170, (1, 2, 150, 20)), 1, 1),
        {"Hq": 8, "Hkv": 2, "positions": ("end",)},
    ),
    "selected, one row": (
        ("selected_blocks", _draw.integers(-1, 1400, (2, 1, 1, 200)), 1, 1),
        {"B": 2, "Hq": 4, "Hkv": 2, "Lq": 1, "Lk": 1400, "bias": (("alibi",),)},
    ),
    "selected, one row, dropout": (
        ("selected_blocks", _draw.integers(-1, 1400, (1, 2, 1, 200)), 1, 1),
        _DROPS | {"Lq": 1, "Lk": 1400},
    ),
    "scattered, few rows": (("strided", 9, 0), {"Lq": 3, "Lk": 700, "Hq": 4, "Hkv": 2, "dtype": "bf16"}),
    "more ranges than a list holds": (("blocks", _draw.random((1, 1, 40, 350)) < 0.5, 2), {"Lq": 60, "Lk": 700}),
    "more ranges than a list holds, and others after those": (
        ("and", ("blocks", _draw.random((3, 32)) < 0.6, 64), ("blocks", _draw.random((70, 1000)) < 0.5, 2)),
        {"Lq": 130, "Lk": 2000, "Hq": 8, "Hkv": 2, "D": 16, "positions": ("start",)},
    ),
    "a part of blocks and documents": (
        (
            "portion",
            ("and", ("documents", (90, 90, 80), None), ("blocks", _draw.random((9, 9)) < 0.6, 32)),
            64,
            7,
            170,
            260,
        ),
        {"Hq": 4, "Hkv": 2, "positions": ("int", -13)},
    ),
    "a part of drawn blocks": (
        ("portion", ("or", ("random_blocks", 5, 16, 3), ("padding", (60,), "left")), 75, 30, 200, 260),
        {"positions": ("int", 9), "dtype": "bf16"},
    ),
    "a part of lists and a table": (
        (
            "portion",
            (
                "or",
                ("selected_blocks", _draw.integers(-1, 260, (1, 2, 190, 12)), 1, 1),
                ("dense", _draw.random((190, 260)) < 0.05),
            ),
            41,
            40,
            190,
            260,
        ),
        {"Hq": 4, "Hkv": 2},
    ),
    "a part of steps, two parts": (
        (
            "and",
            ("portion", ("or", ("strided", 6, 2), ("global_tokens", (3, 100))), 50, 9, 160, 230),
            ("not", ("portion", ("chunked", 11), 7, 0, 150, 177)),
        ),
        {"bias": (("alibi",),)},
    ),
    "a part of segments, few rows": (
        ("portion", ("segments", _draw.integers(-1, 5, 9), _draw.integers(-1, 5, 900)), 150, 4, 9, 900),
        {"Lq": 3, "Lk": 700, "Hq": 4, "Hkv": 2},
    ),
}

# The variants that have names, small enough to judge row by row, and those that the benchmark times.
CASES: tuple[Config, ...] = (
    _case("self", B=2, Hq=4, Lq=50, D=64),
    _case("cross", B=2, Hq=2, Lq=17, Lk=65, D=32, Dv=48),
    _case("causal", Hq=2, Lq=65, D=64, mask=_CAUSAL),
    _case("causal bf16", Hq=2, Lq=97, D=128, dtype="bf16", mask=_CAUSAL),
    _case("causal f16", Hq=2, Lq=49, D=64, dtype="f16", mask=_CAUSAL),
    _case("causal f64", Hq=2, Lq=33, D=32, dtype="f64", mask=_CAUSAL),
    _case("multi-query", Hq=8, Hkv=1, Lq=33, D=64, mask=_CAUSAL),
    _case("grouped-query", B=2, Hq=6, Hkv=2, Lq=33, D=64, dtype="bf16", mask=_CAUSAL),
    _case("odd group", Hq=7, Hkv=1, Lq=3, Lk=129, D=80, mask=_CAUSAL, positions=("end",)),
    _case("chunk of a prefill", Hq=4, Hkv=2, Lq=16, Lk=80, D=64, mask=_CAUSAL, positions=("int", 48)),
    _case("decode", B=2, Hq=8, Hkv=2, Lq=1, Lk=513, D=128, dtype="bf16", mask=_CAUSAL, positions=("end",)),
    _case("decode f32", B=2, Hq=4, Hkv=4, Lq=1, Lk=1025, D=64, mask=_CAUSAL, positions=("end",)),
    _case("absorbed latent", Hq=16, Hkv=1, Lq=1, Lk=67, D=576, Dv=512, dtype="bf16", v_in_k=True),
    _case("absorbed latent causal", Hq=5, Hkv=1, Lq=7, Lk=7, D=36, Dv=32, v_in_k=True, mask=_CAUSAL),
    _case("sliding window", Hq=2, Lq=96, D=64, dtype="bf16", mask=("sliding_window", 17)),
    _case("streaming", Hq=2, Lq=80, D=32, mask=_NEAR),
    # Many tiles of a head whose keys have to be converted, and which see different ones.
    _case(
        "tiles in turns, the first keys kept",
        **{"Hq": 8, "Hkv": 2, "Lq": 330, "D": 17, "Dv": 16, "dtype": "bf16"},
        mask=("and", _CAUSAL, ("or", ("prefix", 10), ("sliding_window", 60))),
    ),
    _case(
        "tiles in turns",
        **{"Hq": 8, "Hkv": 2, "Lq": 200, "Lk": 420, "D": 17, "Dv": 16, "dtype": "bf16"},
        mask=("or", ("random_blocks", 3, 16, 1), ("sliding_window", 90)),
        positions=("end",),
    ),
    # Few of a tile's keys are seen: they are gathered, in chunks whose last granule has some to spare.
    *(
        _case(f"sparse {name}", Hq=2, Lk=560, **{"Lq": 150, "D": 128, "positions": ("end",), **rest}, mask=mask)
        for name, mask, rest in (
            ("blocks", ("random_blocks", 9, 5, 1), {"dtype": "bf16"}),
            ("blocks f32", ("random_blocks", 9, 8, 2), {"D": 64}),
            ("blocks beside a window", ("or", ("random_blocks", 4, 3, 1), ("sliding_window", 40)), {"dtype": "bf16"}),
            ("blocks, biased", ("random_blocks", 3, 8, 1), {"Lq": 70, "bias": (("relative", 20),), "sinks": "f32"}),
            ("blocks, dropped", ("random_blocks", 5, 8, 1), {"Lq": 70, "dropout_p": 0.4}),
            ("steps", ("and", _CAUSAL, ("strided", 3, 1)), {"dtype": "bf16"}),
            ("steps f32", ("dilated", 40, 7), {"Hkv": 1, "D": 33, "Dv": 20}),
            ("globals", ("or", ("sliding_window", 9), ("global_tokens", (0, 431))), {"dtype": "bf16"}),
        )
    ),
    # Rows dealt to tiles as the mask's pattern asks for, and keys that are no neighbours.
    *(_case(f"sparse: {name}", **_SPARSE_SIZES | rest, mask=mask) for name, (mask, rest) in SPARSE.items()),
    _case("documents", Hq=2, Lq=64, D=64, mask=("and", _CAUSAL, ("documents", (5, 0, 27, 32), None))),
    _case("padded batch", B=3, Hq=2, Lq=20, Lk=40, D=32, mask=("padding", (0, 40, 17), "left")),
    _case("prefix language model", B=2, Hq=2, Lq=40, D=32, mask=("or", _CAUSAL, ("prefix", (9, 0)))),
    _case("alibi", Hq=4, Lq=40, D=32, mask=_CAUSAL, bias=(("alibi",),)),
    _case("t5", Hq=2, Lq=60, D=32, bias=(("t5", 32, 64, True),)),
    _case("learned bias", B=2, Hq=2, Lq=20, Lk=30, D=16, bias=(("tensor", (1, 2, 20, 30), "f32", 0.2),)),
    _case("gemma", Hq=4, Hkv=2, Lq=40, D=64, dtype="bf16", softcap=30.0, mask=("sliding_window", 16)),
    _case("sinks", Hq=4, Hkv=2, Lq=40, D=64, dtype="bf16", sinks="bf16", mask=("sliding_window", 16)),
    *(
        _case(name, flavour="wide", wide=wide, **rest)
        for name, wide, rest in (
            ("scores of 1e12", ("units", 20, 20, -1, 3, True), {"Lq": 33, "Lk": 70, "scale": 1.0}),
            (
                "scores of 1e12, shifted, sinks",
                ("units", 18, 18, 9, 3, False),
                {"Lq": 9, "Lk": 70, "scale": 0.5, "sinks": "f32"},
            ),
            ("lse of 16,384", ("units", 0, 0, 16, 3, False), {"Lq": 33, "D": 32, "scale": 0.25, "mask": _CAUSAL}),
            ("lse of 16,384, bf16", ("units", 0, 0, 16, 3, True), {"Lq": 33, "dtype": "bf16", "scale": 0.25}),
            ("lse of 16,384, f16", ("units", 2, -3, 16, 3, True), {"Lq": 33, "dtype": "f16", "scale": 0.5}),
            ("the largest floats", ("edge", 0, 0, -1, 1, True), {"Lq": 33, "Lk": 40, "scale": 1.0}),
            (
                "the largest floats, f64",
                ("edge", 0, 0, -1, 1, False),
                {"Lq": 9, "Lk": 40, "dtype": "f64", "scale": 1.0},
            ),
            (
                "a bias of the lowest float",
                ("edge", 0, 0, -1, 1, True),
                {"Lq": 20, "Lk": 20, "scale": 1.0, "bias": (("tensor", (2, 20, 20), "f32", 0.1),)},
            ),
            (
                "decode at a scale of 1e10",
                ("decimal", 0, 0, -1, 3, True),
                {"Lq": 1, "Lk": 200, "Hq": 4, "Hkv": 2, "dtype": "bf16", "scale": 1e10},
            ),
            ("large products, a small scale", ("units", 50, 50, -1, 3, False), {"Lq": 20, "Lk": 90, "scale": 2.0**-99}),
            (
                "small products, a large scale",
                ("units", -30, -30, -1, 3, False),
                {"Lq": 20, "Lk": 90, "scale": 2.0**100},
            ),
        )
    ),
    _case("one key", Hq=2, Lq=3, Lk=1, D=8),
    _case("no keys", B=2, Hq=2, Lq=3, Lk=0, D=8, sinks="f32"),
    _case("no rows", B=2, Hq=2, Lq=0, Lk=5, D=8),
    _case("no batch rows", B=0, Hq=2, Lq=6, Lk=5, D=8, mask=_CAUSAL, positions=("ints", ())),
    *timed().values(),
)


def case(name: str) -> Config:
    return next(config for config in CASES if config.name == name)
