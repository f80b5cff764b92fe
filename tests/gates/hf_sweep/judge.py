"""One model type, `eager` against `qkv`: logits, gradients, greedy tokens, and whether a wrong scale would show."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

import qkv.integrations.transformers as adapter
from qkv.integrations.transformers import mask, parts, selection
from tests.gates.hf_sweep.build import LENGTH, Subject, Unbuilt, build, construct, result

# Differences are relative to the root mean square of what is compared. Rounding in float32 leaves 1e-6 to 1e-5 in
# two layers; a mask, scale or head map that is wrong moves these outputs by 1e-2 and more, which every type shows of
# itself by a scale that is wrong by a third.
OUTPUT = 5e-5
GRADIENT = 1e-3  # of a parameter's largest gradient; a sum over tokens and layers, with cancellation
_SEEN = 30.0  # a wrong scale must move the output by this many times what is allowed
NEW = 8
Run = Callable[[Any], Any]


class Watched:
    """Counts what reaches qkv in a process, and may make its scale wrong."""

    def __init__(self) -> None:
        self.calls, self.dense, self.factor = 0, set[str](), 1.0
        AttentionInterface.register("qkv", self._attention)
        for module in (parts, mask, selection):
            module.quadratic = lambda why: self.dense.add(why)  # type: ignore[attr-defined]

    def _attention(self, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.factor != 1:
            given = kwargs.get("scaling")
            kwargs["scaling"] = self.factor * (query.shape[-1] ** -0.5 if given is None else given)
        return adapter.attention_forward(module, query, *args, **kwargs)


def judge(name: str) -> dict[str, Any]:
    """The record of a type: its class, and the numbers it rests on."""
    started, watched = time.perf_counter(), Watched()
    record: dict[str, Any] = {"type": name}
    try:
        subject = build(name)
    except Unbuilt as why:
        return {**record, "class": "unbuilt", "why": why.args[0], "seconds": round(time.perf_counter() - started, 1)}
    model = subject.model
    record |= {"model": type(model).__name__, "choice": subject.choice, "inputs": sorted(subject.inputs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record |= _compared(subject, watched)
    record |= {"dense": sorted(watched.dense), "seconds": round(time.perf_counter() - started, 1)}
    return record


def _compared(subject: Subject, watched: Watched) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        other = construct(type(subject.model), subject.config, "qkv")
    except KeyError as error:
        if error.args != ("qkv",):
            return {"class": "failed", "why": f"in its constructor: {_short(error)}"}
        found["way"] = "KeyError: 'qkv' in its constructor; set_attn_implementation afterwards"
        other = construct(type(subject.model), subject.config, "eager")
        try:
            other.set_attn_implementation("qkv")
        except Exception as error_of_set:
            return {**found, "class": "KeyError", "why": _short(error_of_set)}
    except Exception as error:
        return {"class": "refused" if "qkv" in str(error) else "failed", "why": f"in its constructor: {_short(error)}"}
    other.load_state_dict(subject.model.state_dict())
    if not any(_implementation(part) == "qkv" for part in other.modules()):
        found["why"] = "its config does not keep the name"
    cases: dict[str, float] = {}
    wanted: dict[str, tuple[Run, Any]] = {}
    wrong: list[str] = []
    try:
        for case, run, want in _cases(subject):
            apart = _apart(run(other), want)
            wanted[case], cases[case] = (run, want), apart
            allowed = GRADIENT if case == "gradients" else 0.0 if case == "tokens" else OUTPUT
            if apart > allowed:
                theirs = _sdpas(subject, run, want)
                if case != "tokens" and apart <= 4 * _rounding(subject, run):
                    continue
                if theirs is not None and apart <= 8 * theirs:
                    found.setdefault("as sdpa", []).append(case)
                else:
                    wrong.append(case)
    except Exception as error:
        text = _short(error)
        ours = "attn_implementation='qkv'" in text or text.startswith(("ArgumentError: qkv", "ShapeError: qkv"))
        return {**found, "cases": cases, "class": "refused" if ours else "failed", "why": text}
    found |= {"cases": cases, "calls": watched.calls}
    if wrong:
        return {**found, "class": "WRONG", "why": ", ".join(wrong)}
    if watched.calls == 0:
        exact = all(x == 0 for x in cases.values())
        why = "" if exact else "qkv is not called, and yet it differs"
        return {**found, "class": "own" if exact else "WRONG", "why": why}
    if found.get("as sdpa") and any(x > 1e-3 for x in cases.values()):
        return {**found, "class": "disputed"}
    watched.factor = 4 / 3
    found["wrong scale"] = {
        case: _apart(run(other), want) for case, (run, want) in wanted.items() if case in ("plain", "gradients")
    }
    watched.factor = 1.0
    seen = found["wrong scale"]["plain"] > _SEEN * max(OUTPUT, cases["plain"])
    return {**found, "class": "equal" if seen else "blind"}


def _implementation(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _sdpas(subject: Subject, run: Run, want: Any) -> float | None:
    """How far `sdpa` is apart from `eager`; None where the model has none."""
    try:
        model = construct(type(subject.model), subject.config, "sdpa")
        model.load_state_dict(subject.model.state_dict())
        return _apart(run(model), want)
    except Exception:
        return None


def _rounding(subject: Subject, run: Run) -> float:
    """How far `eager` moves when each of its parameters moves by a rounding: what a deep model makes of float32."""
    model = construct(type(subject.model), subject.config, "eager")
    model.load_state_dict(subject.model.state_dict())
    want, gen = run(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-23 * torch.randn(parameter.shape, generator=gen))
    return _apart(run(model), want)


def _cases(subject: Subject) -> Iterator[tuple[str, Run, Any]]:
    """What is compared: its name, how to run it, and what `eager` gives. What `eager` cannot do is left out."""
    for case, run in _runs(subject):
        try:
            want = run(subject.model)
        except Exception:
            if case == "plain":
                raise
            continue
        yield case, run, want


def _runs(subject: Subject) -> Iterator[tuple[str, Run]]:
    model, given = subject.model, subject.inputs
    names = inspect.signature(model.forward).parameters
    decoder = "decoder_input_ids" in given
    yield "plain", lambda m: _forward(m, given, None)
    sided = subject.is_text and "attention_mask" in names and "pixel_values" not in given
    if sided:
        for side in ("right", "left", "holes"):
            yield side, partial(_forward, given=_padded(given, side), rows=None if decoder else padding(side))
    if subject.is_text and "position_ids" in names and not decoder and model.can_generate():
        anew = torch.cat([torch.arange(n) for n in (7, 3, LENGTH - 10)])[None]
        packed = {**given, "input_ids": given["input_ids"][:1], "position_ids": anew}
        packed |= {"use_cache": False} if "use_cache" in names else {}
        yield "packed", partial(_forward, given=packed, rows=None)
    rows = padding("right") if sided and not decoder else None
    yield "gradients", partial(_gradients, given=_padded(given, "right") if sided else given, rows=rows)
    if model.can_generate() and (sided or decoder):
        prompt = _padded(given, "right" if decoder else "left") if sided else dict(given)
        prompt.pop("decoder_input_ids", None)
        yield "tokens", partial(_generated, prompt=prompt)


def _padded(given: dict[str, Any], side: str) -> dict[str, Any]:
    return {**given, "attention_mask": padding(side)}


def padding(side: str) -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if side == "right":
        mask[1, -6:] = 0
    elif side == "left":
        mask[1, :6] = 0
    else:
        mask[1, 4:7] = mask[1, 12] = 0
    return mask


def _forward(model: Any, given: dict[str, Any], rows: Tensor | None) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return _rows(result(model(**given)), rows)


def _rows(found: Tensor, mask: Tensor | None) -> Tensor:
    """What belongs to real tokens."""
    fits = mask is not None and found.ndim >= 2 and found.shape[:2] == mask.shape
    return found[mask.bool()] if fits and mask is not None else found


def _apart(found: Any, want: Any) -> float:
    """How far two results are apart: of tensors by their rms, of gradients by the largest of each."""
    if isinstance(want, dict):
        if found.keys() != want.keys():
            return float("inf")
        sizes = {name: float(g.abs().max()) for name, g in want.items()}
        least = 1e-3 * max(sizes.values(), default=1.0)  # a gradient that is 0 but for rounding
        return max((float((found[n] - g).abs().max()) / max(sizes[n], least) for n, g in want.items()), default=0.0)
    if want.dtype == torch.int64:
        return 0.0 if torch.equal(found, want) else 1.0
    if found.shape != want.shape:
        return float("inf")
    apart = float((found - want).abs().max()) / max(float(want.square().mean().sqrt()), 1e-12)
    return apart if apart == apart else float("inf")


def _gradients(model: Any, given: dict[str, Any], rows: Tensor | None) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    found = _rows(result(model(**given)), rows)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(7))
    (found * weights).sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.numel()}
    model.zero_grad()
    return got


def _generated(model: Any, prompt: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    found: Tensor = model.generate(**prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, num_beams=1)
    return found if isinstance(found, Tensor) else found.sequences


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
