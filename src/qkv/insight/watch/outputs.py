"""Where lines go: a file of JSON lines, and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qkv.checks import given_as
from qkv.errors import ArgumentTypeError, UnsupportedError


def strict(value: Any) -> Any:
    """The value as strict JSON can write it: what is not finite is null.

    >>> strict({"logit": [1.5, float("nan"), float("-inf")]})
    {'logit': [1.5, None, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    return value


class Lines:
    """JSON lines in a file of that name, to whose end they are added, or in one that is open for writing text."""

    def __init__(self, call: str, to: Any) -> None:
        if to is not None and not isinstance(to, (str, Path)) and not callable(getattr(to, "write", None)):
            rule, fix = "to must be a path or a file for text", 'Pass to="watch.jsonl"'
            raise ArgumentTypeError.of(call, rule, given_as("to", to), fix)
        self._to, self._own = to, False
        self._file: Any = None

    def open(self) -> None:
        if isinstance(self._to, (str, Path)):
            self._file, self._own = Path(self._to).open("a", encoding="utf-8"), True  # noqa: SIM115  closed by `close`
        else:
            self._file = self._to

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(strict(record), allow_nan=False) + "\n")

    def flush(self) -> None:
        if self._file is not None and callable(getattr(self._file, "flush", None)):
            self._file.flush()

    def close(self) -> None:
        if self._own and self._file is not None:
            self._file.close()
        self._file, self._own = None, False


_SCALARS = ("entropy", "tokens", "logit", "weight", "first", "sink")


class Board:
    """TensorBoard scalars of each layer, means over heads, of logits the largest: in a folder, or by a writer."""

    def __init__(self, call: str, to: Any) -> None:
        self._writer, self._own = to, isinstance(to, (str, Path))
        if to is not None and not self._own and not callable(getattr(to, "add_scalar", None)):
            rule, fix = "tensorboard must be a folder or a SummaryWriter", 'Pass tensorboard="runs"'
            raise ArgumentTypeError.of(call, rule, given_as("tensorboard", to), fix)
        if self._own:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                rule, fix = (
                    "TensorBoard must be installed to write its files",
                    "pip install tensorboard, or leave tensorboard out",
                )
                raise UnsupportedError.of(call, rule, str(error), fix) from None
            self._writer = SummaryWriter(str(to))

    def write(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for name in _SCALARS:
            values = [x for x in record[name] or () if x is not None and math.isfinite(x)]
            if values:
                value = max(values) if name == "logit" else sum(values) / len(values)
                self._writer.add_scalar(f"attention/{record['layer'] or 'model'}/{name}", value, record["step"])
        self._writer.add_scalar(
            f"attention/{record['layer'] or 'model'}/nan_rows", record["nan"]["rows"], record["step"]
        )

    def flush(self) -> None:
        if self._writer is not None and callable(getattr(self._writer, "flush", None)):
            self._writer.flush()

    def close(self) -> None:
        if self._own:
            self._writer.close()
