"""`qkv.watch`: what attention does in a live model, step by step, without changing a bit of it."""

from __future__ import annotations

import fnmatch
import itertools
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from qkv.checks import given_as, shown, whole
from qkv.errors import ArgumentError, ArgumentTypeError
from qkv.insight.watch import points, summary
from qkv.insight.watch.calls import Call, Unseen
from qkv.insight.watch.findings import History
from qkv.insight.watch.hooks import told
from qkv.insight.watch.modules import compiled, like_attention, named, within
from qkv.insight.watch.numbers import few_rows, look, of_all_rows, of_few_rows, of_values
from qkv.insight.watch.outputs import Board, Lines
from qkv.insight.watch.steps import HERE, callers

__all__ = ["SCHEMA", "watch"]

SCHEMA = 1
"""The version of a line; a name is never given another meaning within one."""
_CALL = "qkv.watch()"
_KEPT = 1000  # lines and errors that the handle itself remembers
_HEADS = ("entropy", "tokens", "logit", "weight", "sure", "sink", "first", "away")


class watch:
    """Watch the attention of a live model, in training or generation, on the backend that it has.

    Every n-th forward pass of the model, each call of attention inside of it is looked at: its results, gradients and
    random numbers are bitwise those without `watch`. Called are `qkv.attention` and all that stands on it, PyTorch's
    scaled_dot_product_attention, MultiheadAttention and TransformerEncoderLayer, and models of transformers on "qkv",
    "sdpa" or "eager". Printed, it is one screen; what it could not see stands there too.

    Parameters
    ----------
    model : torch.nn.Module
    layers : names, patterns such as "blocks.*.attention", or numbers in the order of their first call; all by default
    every : int
        Look at each so many-th forward pass of the model, the first included. Generation counts each token's.
    heads : "all", or ints
    to : path or open file
        Gets a JSON line for each layer and step that is looked at; a file that is there is added to.
    tensorboard : folder or SummaryWriter
        Gets scalars of each layer. A folder needs TensorBoard.
    first : int
        How many keys count as the first ones, whose share is told: attention sinks.
    summary : bool
        Print the screen when the block ends.

    Raises
    ------
    ArgumentError, ArgumentTypeError, UnsupportedError
        Arguments that do not fit. Nothing is raised into the model: what fails while looking is kept in `errors`, and
        one warning at the end says so.

    Notes
    -----
    It is entered with `with`, or by `start()` and left by `stop()`; several may watch one model, from any threads. Then
    all that was put in place is taken back, also after an exception. `steps` counts forward passes, `lines` holds the
    last 1,000 lines, `layers` what is known of each layer, `warnings` what was wrong, `not_seen` what was not seen and
    why. A module whose `forward` is called directly is not noticed; what torch.compile has made of a model shows qkv's
    calls without their layers' names, and none of PyTorch's.

    Cost: in a step that is looked at, the statistics of each call (about a forward pass of attention) and 16 rows of
    each head in float64; else one look at a list for each call. Keeps numbers only, no tensor.

    Examples
    --------
    >>> import torch, qkv
    >>> layer = qkv.nn.Attention(64, 4, mask=qkv.causal())
    >>> with qkv.watch(layer, every=2) as w:
    ...     for _ in range(3):
    ...         y = layer(torch.randn(2, 16, 64))
    >>> w.steps, [line["step"] for line in w.lines], len(w.lines[0]["entropy"])
    (3, [0, 2], 4)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | int | Sequence[str | int] | None = None,
        every: int = 1,
        heads: str | Sequence[int] = "all",
        to: str | Path | Any = None,
        tensorboard: str | Path | Any = None,
        *,
        first: int = 1,
        summary: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError.of(
                _CALL, "model must be a torch.nn.Module", given_as("model", model), "Pass the model"
            )
        self.model, self.every, self.first = model, _positive("every", every), _positive("first", first)
        self._chosen, self._heads, self._print = _layers(layers), _chosen_heads(heads), bool(summary)
        self._file, self._board = Lines(_CALL, to), Board(_CALL, tensorboard)
        self._names: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._undo: Callable[[], None] = _nothing
        self._running, self._lock, self._count = False, threading.RLock(), itertools.count()
        self._inside = threading.local()
        self.steps = 0
        self.lines: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self.layers: dict[str, History] = {}
        self.errors: deque[str] = deque(maxlen=_KEPT)
        self._failed, self._unseen, self._looked = 0, Counter[tuple[str, str]](), 0

    # ------------------------------------------------------------------------------------------------- as a handle
    def start(self) -> watch:
        """Begin to watch; returns itself."""
        if self._running:
            raise ArgumentError.of(
                _CALL, "a watch is entered once at a time", "one that is running", "Make another watch"
            )
        self._names = {id(module): name for name, module in reversed(named(self.model))}
        self._file.open()
        try:
            points.begin()
        except BaseException:
            self._file.close()
            raise
        self._running = True
        self._undo = told(self.model, self._before, self._after)
        return self

    def stop(self) -> None:
        """End, and put everything back as it was; once more does nothing."""
        if not self._running:
            return
        self._running = False
        self._leave()
        self._undo()
        points.end()
        self._file.close()
        self._board.flush()
        self._board.close()
        if self._print:
            print(self)
        if self._failed:
            text = f"{_CALL} failed {self._failed} times while looking, and the model did not notice: {self.errors[0]}"
            warnings.warn(text, stacklevel=2)

    def __enter__(self) -> watch:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ------------------------------------------------------------------------------------------------- step by step
    def _before(self) -> None:
        depth = getattr(self._inside, "depth", 0)
        if depth and sum(module is self.model for module in callers()) < 2:
            self._leave()  # an interrupt ended the step before, and nobody was told
            depth = 0
        self._inside.depth = depth + 1
        if depth:  # a model that calls itself makes one step
            return
        with self._lock:
            number = next(self._count)
            self.steps = number + 1
        if number % self.every == 0:
            self._inside.step = _Step(self, number)
            HERE.steps.append(self._inside.step)

    def _after(self) -> None:
        depth = getattr(self._inside, "depth", 0)
        self._inside.depth = max(depth - 1, 0)
        if depth == 1 and self._leave():
            with self._lock:
                self._looked += 1
                self._guarded(self._file.flush)

    def _leave(self) -> bool:
        """End this thread's step; whether it was looked at."""
        step = getattr(self._inside, "step", None)
        self._inside.step = None
        if step in HERE.steps:
            HERE.steps.remove(step)
        return step is not None

    def _guarded(self, do: Callable[[], Any]) -> Any:
        """What looking does may fail; the model is not to notice."""
        try:
            return do()
        except Exception as error:
            with self._lock:
                self._failed += 1
                self.errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None

    def _wants(self, layer: str, number: int) -> bool:
        if self._chosen is None:
            return True
        return any(number == one if isinstance(one, int) else fnmatch.fnmatchcase(layer, one) for one in self._chosen)

    def _looks_at(self, call: Call, layer: str, module: str, number: int, step: int) -> None:
        record = self._record(call, layer, module, step)
        with self._lock:
            history = self.layers.setdefault(layer, History(number))
            record["number"] = number
            history.add(record)
            if record["nan"]["rows"] and history.nan is None:
                history.nan = {"step": step, "layer": layer, **record["nan"]["first"]}
            self.lines.append(record)
            self._file.write(record)
            self._board.write(record)

    def _record(self, call: Call, layer: str, module: str, step: int) -> dict[str, Any]:
        looked = look(call)
        p = looked.problem
        record: dict[str, Any] = {
            "schema": SCHEMA, "step": step, "layer": layer, "number": 0, "module": module, "via": call.via,
            "shape": {"B": p.B, "Hq": p.Hq, "Hkv": p.Hkv, "Lq": p.Lq, "Lk": p.Lk, "D": p.D},
            "dtype": str(p.dtype).removeprefix("torch."), "heads": list(range(p.Hq)),
        }  # fmt: skip
        record |= of_all_rows(looked)
        record["nan_values"] = of_values(call.v)
        record |= of_few_rows(few_rows(looked), self.first)
        if self._heads is not None:
            _only(record, self._heads)
        return record

    # ------------------------------------------------------------------------------------------------- afterwards
    @property
    def warnings(self) -> list[dict[str, Any]]:
        """What was found to be wrong in the last look at each layer: kind, heads, text, fix, layer and step."""
        return [
            {**warning, "layer": name, "step": history.last["step"]}
            for name, history in self.layers.items()
            for warning in history.last.get("warnings", ())
        ]

    @property
    def nan(self) -> dict[str, Any] | None:
        """Where the first NaN was seen: step, layer, batch row, head and query row; None where there was none."""
        found = [history.nan for history in self.layers.values() if history.nan is not None]
        return min(found, key=lambda at: (at["step"], self.layers[at["layer"]].number), default=None)

    @property
    def not_seen(self) -> list[str]:
        """What was not seen, and why as far as it is known."""
        found = [f"{name or 'the model'}: {count} calls, {why}" for (name, why), count in self._unseen.items()]
        if not self.steps:
            return [*found, "the model itself was not called: watch what is called, as what torch.compile returns"]
        made = compiled(self.model)
        if made:
            found.append(
                f"{made[0] or 'the model'} is compiled: qkv's calls have no layer there, PyTorch's are not seen"
            )
        if self._looked:
            seen = {layer.split("#")[0] for layer in self.layers} | {name for name, _ in self._unseen}
            silent = [name for name in like_attention(self.model) if not within(seen, name) and self._may(name)]
            if silent and not made:
                found.append(
                    f"{', '.join(silent[:3])}{f' and {len(silent) - 3} more' if len(silent) > 3 else ''}: "
                    "no call was met, so it did not run, or has attention of its own"
                )
        return found

    def _may(self, name: str) -> bool:
        """Whether a module was to be watched, as far as its name tells."""
        return self._chosen is None or any(
            isinstance(one, str) and fnmatch.fnmatchcase(name, one) for one in self._chosen
        )

    def __str__(self) -> str:
        kind = type(self.model).__name__
        title = f"{kind}: {self.steps:,} steps, {self._looked:,} looked at, {len(self.layers)} layers"
        notes = [line for text in self.not_seen for line in summary.wrapped(f"not seen: {text}")]
        if self._failed:
            notes += summary.wrapped(f"looking failed {self._failed} times: {self.errors[0]}")
        return summary.summary(title, self.layers, notes)

    def __repr__(self) -> str:
        return f"<qkv.watch of {type(self.model).__name__}, {self.steps} steps>"


class _Step:
    """One forward pass that is looked at."""

    def __init__(self, of: watch, number: int) -> None:
        self.of, self.number, self._calls = of, number, Counter[str]()

    def met(self, via: str, make: Callable[[], Call], modules: list[Any]) -> None:
        of = self.of
        # It may have ended while another thread was inside of the model; and an interrupt may have ended the step.
        if not of._running or not any(module is of.model for module in modules):
            return
        mine = next((m for m in modules if id(m) in of._names), of.model)
        name, module = of._names.get(id(mine), ""), type(mine).__name__
        nth = self._calls[name]
        self._calls[name] += 1
        layer = f"{name}#{nth}" if nth else name
        with of._lock:
            number = of._numbers.setdefault(layer, len(of._numbers))
        if not of._wants(layer, number):
            return

        def looks() -> None:
            try:
                of._looks_at(make(), layer, module, number, self.number)
            except Unseen as why:
                with of._lock:
                    of._unseen[layer, str(why)] += 1

        of._guarded(looks)


# ------------------------------------------------------------------------------------------------- pieces
def _nothing() -> None:
    """Nothing to undo."""


def _only(record: dict[str, Any], heads: Sequence[int]) -> None:
    """The lists of a record for these heads alone."""
    kept = [h for h in heads if h < len(record["heads"])]
    record["heads"] = kept
    for name in _HEADS:
        if record[name] is not None:
            record[name] = [record[name][h] for h in kept]
    for name in ("uniform_heads", "sink_heads", "saturated_heads"):
        record[name] = [h for h in record[name] if h in kept]
    record["duplicate_heads"] = [pair for pair in record["duplicate_heads"] if {pair[0], pair[1]} <= set(kept)]


def _positive(name: str, value: Any) -> int:
    found = whole(value)
    if found is None or found < 1:
        raise ArgumentError.of(_CALL, f"{name} is an int >= 1", f"{name}={shown(value)}", f"Use {name}=1")
    return found


def _layers(given: Any) -> tuple[str | int, ...] | None:
    if given is None:
        return None
    found = (given,) if isinstance(given, (str, int)) else tuple(given) if isinstance(given, Sequence) else ()
    if not found or not all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in found):
        rule = "layers are names, patterns or numbers"
        raise ArgumentTypeError.of(
            _CALL, rule, given_as("layers", given), 'Pass layers=["blocks.*.attention"], or [0, 8]'
        )
    return found


def _chosen_heads(given: Any) -> tuple[int, ...] | None:
    if isinstance(given, str) and given == "all":
        return None
    found = [whole(one) for one in given] if isinstance(given, Sequence) and not isinstance(given, str) else [None]
    if not found or any(one is None or one < 0 for one in found):
        raise ArgumentTypeError.of(
            _CALL, 'heads are "all" or numbers >= 0', given_as("heads", given), "Pass heads=[0, 3]"
        )
    return tuple(one for one in found if one is not None)
