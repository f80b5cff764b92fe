"""Every check of a call, made once, before it is planned: the result is a `Problem` that backends need not check."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qkv import _torch
from qkv.call.problem import Inputs, Options, Problem
from qkv.checks import DTYPES, no_dtensor, no_tensor, number, short, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError, UnsupportedError
from qkv.masks import Mask, Sizes, as_mask, read_positions
from qkv.scores import ScoreTerm, as_bias

_LAYOUT = "(B, H, L, D)"


def validate(call: str, q: Any, k: Any, v: Any, mask: Any, options: Options) -> tuple[Problem, Inputs]:
    """Check one call and build its problem and inputs; raises a typed error that says what to do."""
    check_metadata(call, q, k, v)
    check_storage(call, q, k, v)
    q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()  # no kernel knows the lazy sign of x.conj().imag
    return checked(call, (q, k, v), (*q.shape[:2], *k.shape[1:3], v.shape[3]), q.shape[2], mask, options)


def checked(
    call: str, qkv: tuple[Tensor, Tensor, Tensor], size: tuple[int, ...], Lq: int, mask: Any, options: Options
) -> tuple[Problem, Inputs]:
    """`validate` behind its checks of q, k and v. `size`: B, Hq, Hkv, Lk and Dv; of pages k and v do not tell them."""
    (q, k, v), (B, Hq, Hkv, Lk, Dv), D, o = qkv, size, qkv[0].shape[3], options
    sizes = Sizes(B, Hq, Lq, Lk, q.dtype, q.device)
    known = mask if mask is None or isinstance(mask, Mask) else as_mask(mask, call)
    if known is not None:
        known.check(call, sizes)
    bias = None if o.bias is None else as_bias(o.bias, call)
    if bias is not None:
        bias.check(call, sizes)
        bias = bias.lowered(q.device)
    reading = "start" if o.positions is None else read_positions(call, o.positions, B, Lq)
    if o.positions is None and Lq != Lk:
        _require_positions(call, known, bias, sizes)
    scale = None if o.scale is None else _finite(call, "scale", o.scale, "Leave it out for 1/sqrt(D)")
    softcap = None if o.softcap is None else _finite(call, "softcap", o.softcap, "Leave it out for no cap")
    if softcap is not None and softcap <= 0:
        raise ArgumentError.of(call, "softcap must be > 0", f"softcap={softcap}", "Leave it out for no cap")
    sinks = None if o.sinks is None else check_sinks(call, o.sinks, sizes)
    if not isinstance(o.return_lse, bool):
        given = f"return_lse={shown(o.return_lse)}"
        raise ArgumentTypeError.of(call, "return_lse is a bool", given, "Pass True or False")
    learns = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    if bias is not None:
        learns = learns or any(t.requires_grad for t in bias.tensors())
    kept = o.dropout_p.__class__ is float and o.dropout_p == 0
    problem = Problem(
        call, B, Hq, Hkv, Lq, Lk, D, Dv, q.dtype, q.device.type,
        mask=known,
        positions="tensor" if isinstance(reading, Tensor) else reading,
        scale=1.0 / math.sqrt(D) if scale is None else scale,
        softcap=softcap,
        bias=() if bias is None else bias.specs(),
        has_sinks=sinks is not None,
        dropout_p=0.0 if kept else dropout(call, "dropout_p", o.dropout_p),
        needs_grad=torch.is_grad_enabled() and learns,
        needs_lse=o.return_lse,
    )  # fmt: skip
    positions = reading.to(q.device) if isinstance(reading, Tensor) else None
    return problem, Inputs(q, k, v, positions, bias, sinks)


def check_metadata(call: str, q: Any, k: Any, v: Any) -> None:
    """Raise unless q, k and v are tensors that fit together; no data is looked at."""
    _check_tensors(call, q, k, v)
    _check_shapes(call, q, k, v)


def named(**tensors: Tensor) -> str:
    """Tensors as a message names them: q (2, 10, 64, 64), k (2, 4, 64, 64)."""
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())


def _check_tensors(call: str, q: Any, k: Any, v: Any) -> None:
    given = (("q", q), ("k", k), ("v", v))
    for name, x in given:
        if not isinstance(x, Tensor):
            left_out = name == "v" and x is None
            fix = "Pass v; it is left out only where k is a cache's view" if left_out else f"Pass a tensor {_LAYOUT}"
            raise no_tensor(call, name, x, fix)
        if x.layout != torch.strided or x.is_nested:
            fix = "Use .to_dense(); a batch of unequal lengths is qkv.padding or qkv.documents over a plain tensor"
            if x.is_nested:
                fix = (
                    "Pack it: with x = values() as (T, H, D), pass x.transpose(0, 1)[None] as (1, H, T, D) and "
                    "mask=qkv.documents(lengths), where lengths = offsets().diff(); & qkv.causal() if it is causal"
                )
            raise ArgumentTypeError.of(call, f"{name} must be a plain strided tensor", f"{name} {x.layout}", fix)
        if x.dtype not in DTYPES:
            refuse_dtype(call, name, x)
    if not q.dtype == k.dtype == v.dtype:
        got = ", ".join(f"{name} {short(x.dtype)}" for name, x in given)
        raise ArgumentTypeError.of(call, "q, k and v must share one dtype", got, "Convert them with .to(q.dtype)")
    if not q.device == k.device == v.device:
        got = ", ".join(f"{name} on {x.device}" for name, x in given)
        raise ArgumentTypeError.of(call, "q, k and v must be on one device", got, "Move them with .to(q.device)")


def refuse_dtype(call: str, name: str, x: Tensor) -> None:
    """Raise, because no backend computes with x's dtype."""
    rule = f"{name} must be float64, float32, bfloat16 or float16"
    raise ArgumentTypeError.of(call, rule, f"{name} {short(x.dtype)}", "Convert it with .to()")


def check_storage(call: str, *given: Tensor) -> None:
    """Raise unless q, k and v hold data, or wrap what does."""
    for name, x in zip("qkv", given, strict=False):
        if hasattr(x, "to_local"):  # asked here: a call of plain tensors is spared a stop
            no_dtensor(call, name, x)
        try:
            x.data_ptr()
        except RuntimeError:
            if _torch.transformed(x):  # what it wraps has memory
                continue
            rule = f"{name} must have memory of its own"
            fix = "Pass tensors that hold data; torch.compile, torch.export, torch.vmap and torch.func are followed"
            raise UnsupportedError.of(call, rule, f"{name} without storage", fix) from None


def _check_shapes(call: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            fix = "Add the missing dimensions with unsqueeze; split heads with unflatten(-1, (H, D)).transpose(1, 2)"
            raise ShapeError.of(call, f"{name} must have 4 dimensions {_LAYOUT}", named(**{name: x}), fix)
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        fix = "Expand the smaller one: k.expand(B, -1, -1, -1) is free"
        raise ShapeError.of(call, "q, k and v must have one batch size B", named(q=q, k=k, v=v), fix)
    if q.shape[3] != k.shape[3]:
        got = f"{named(q=q)} → D={q.shape[3]} and {named(k=k)} → D={k.shape[3]}"
        fix = f"Project both to one head size, or check that they are {_LAYOUT}"
        raise ShapeError.of(call, "q and k must have one head size D", got, fix)
    if q.shape[3] == 0:
        raise ShapeError.of(call, "the head size D must be at least 1", named(q=q), "Give q and k a last dimension")
    if k.shape[2] != v.shape[2]:
        got = f"{named(k=k)} → Lk={k.shape[2]} and {named(v=v)} → Lk={v.shape[2]}"
        rule = "k and v must have one length Lk"
        raise ShapeError.of(call, rule, got, "Every key has one value: give them the same tokens")
    if k.shape[1] != v.shape[1]:
        got = f"{named(k=k)} → Hkv={k.shape[1]} and {named(v=v)} → Hkv={v.shape[1]}"
        raise ShapeError.of(call, "k and v must have the same heads", got, "Expand the one with fewer heads")
    Hq, Hkv = q.shape[1], k.shape[1]
    if (Hq == 0) != (Hkv == 0) or (Hkv and Hq % Hkv):
        fits = ", ".join(str(n) for n in range(1, Hq + 1) if Hq % n == 0) if Hq else "0"
        got = f"{named(q=q)} → Hq={Hq} and {named(k=k)} → Hkv={Hkv}"
        fix = f"Use Hkv in {{{fits}}}, or check that q is (B, H, L, D)"
        raise ShapeError.of(call, "query heads must be a multiple of key/value heads", got, fix)


def _require_positions(call: str, mask: Mask | None, bias: ScoreTerm | None, sizes: Sizes) -> None:
    if mask is not None and mask.depends_on_position:
        refuse_positions(call, f"mask {mask!r}", mask.both_readings(sizes), sizes)
    elif bias is not None and bias.depends_on_position:
        refuse_positions(call, f"bias {bias!r}", drawn_positions(sizes.Lq, sizes.Lk), sizes)


def refuse_positions(call: str, name: str, readings: str, sizes: Sizes) -> None:
    """Raise, because `name` depends on position and nothing says where the queries stand."""
    rule = "positions= must say where the queries stand when Lq != Lk and the mask or bias depends on position"
    fix = f"The two readings are\n{readings}\nPass one of them, or the positions themselves"
    raise ArgumentError.of(call, rule, f"Lq={sizes.Lq}, Lk={sizes.Lk} and {name}", fix)


def drawn_positions(Lq: int, Lk: int) -> str:
    """Both readings as bars: which keys (and places beyond them) the queries stand on."""
    lines = []
    for name, offset in (("start", 0), ("end", Lk - Lq)):
        low, high = min(0, offset), max(Lk, offset + Lq)
        step = -(-(high - low) // 48)
        cells = range(low, high, step)
        keys = "".join("─" if 0 <= j < Lk else " " for j in cells)
        queries = "".join("■" if offset <= j < offset + Lq else "·" for j in cells)
        lines.append(f'positions="{name}" (p = i{f" + {offset}" if offset else ""}):')
        lines += [f"  keys    {keys}", f"  queries {queries}"]
    return "\n".join(lines)


def _finite(call: str, name: str, x: Any, fix: str, of_kind: str = "Use float(x), or scale q itself. ") -> float:
    number(call, name, x, of_kind + fix)
    try:
        value = float(x)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentError.of(call, f"{name} must be finite", f"{name}={shown(x)}", fix)
    return value


def dropout(call: str, name: str, x: Any) -> float:
    """The probability that `name` is."""
    fix = "Use 0 for no dropout"
    value = _finite(call, name, x, fix, "")
    if not 0 <= value < 1:
        raise ArgumentError.of(call, f"{name} must be in [0, 1)", f"{name}={shown(x)}", fix)
    return value


def check_sinks(call: str, sinks: Any, sizes: Sizes) -> Tensor:
    """The sinks as kernels take them; raises unless they fit the call."""
    fix = "Pass one number a query head as a tensor (Hq,); -inf for none"
    if not isinstance(sinks, Tensor) or sinks.dtype not in DTYPES:
        raise ArgumentTypeError.of(call, "sinks must be a floating tensor", f"sinks={shown(sinks)}", fix)
    no_dtensor(call, "sinks", sinks)
    if tuple(sinks.shape) != (sizes.Hq,):
        raise ShapeError.of(call, "sinks must have shape (Hq,)", f"sinks {tuple(sinks.shape)} and Hq={sizes.Hq}", fix)
    if sinks.device != sizes.device:
        given = f"sinks on {sinks.device} and q on {sizes.device}"
        raise ArgumentTypeError.of(call, "sinks must be on q's device", given, "Move them with .to(q.device)")
    if sinks.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        sinks = sinks.clone()  # one that may be saved for a backward pass
    kept: Tensor = sinks.resolve_neg()
    return kept
