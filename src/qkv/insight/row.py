"""One query in full, as a soft dictionary lookup: which keys fit, and how much of each value is passed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.insight.held import Held
from qkv.insight.record import Record
from qkv.insight.rectangle import rectangle
from qkv.insight.terminal import bar, fit, number, paint, table


@dataclass(frozen=True, eq=False)
class Row:
    """Every key that one query sees, the largest weight first; of equal weights the lower key first.

    Weights are exact, in float64. What a value contributes is its weight times its norm: a large weight on a small
    value passes little on.
    """

    index: int
    position: int
    head: int
    batch: int
    token: str | None
    keys: Tensor
    """int64 (n,): the visible keys."""
    dots: Tensor
    """(n,): q . k"""
    scores: Tensor
    """(n,): scaled, capped, with bias: what the softmax takes."""
    weights: Tensor
    value_norms: Tensor
    entropy: float
    """Nats."""
    sink: float
    """The weight of the learned sink."""
    tokens: tuple[str, ...] | None
    """Of `keys`."""
    hidden: int
    """Keys that the mask or a bias of -inf hides."""

    @property
    def contributions(self) -> Tensor:
        """(n,): weight times the value's norm."""
        return self.weights * self.value_norms

    def __str__(self) -> str:
        return self.text()

    def text(self, most: int = 12, *, ascii: bool = False) -> str:
        """The row for a terminal: its `most` largest weights.

        Parameters
        ----------
        most : int
        ascii : bool

        Returns
        -------
        str
        """
        name = f" '{fit(_shown(self.token), 20)}'" if self.token is not None else ""
        effective = torch.tensor(self.entropy, dtype=torch.float64, device="cpu").exp().item()
        head = f"query {self.index:,}{name} at position {self.position:,}, head {self.head}, batch row {self.batch}"
        lines = [paint(head, "bold")]
        if not len(self.keys):
            return "\n".join([*lines, "sees no key: its output is 0"])
        lines.append(
            f"sees {len(self.keys):,} keys ({self.hidden:,} hidden), as if it looked at {number(effective)} of them "
            "evenly" + (f"; the learned sink takes {self.sink:.1%}" if self.sink > 0 else "")
        )
        n = min(most, len(self.keys))
        largest = float(self.weights[0]) if self.weights[0] == self.weights[0] else 1.0
        grid = [["key", "", "q.k", "score", "weight", "", "|v|", "weight x |v|"]]
        for x in range(n):
            w = float(self.weights[x])
            drawn = "#" * round(12 * w / largest) if ascii else bar(w, 12, largest)
            token = fit(_shown(self.tokens[x]), 14) if self.tokens is not None else ""
            grid.append([
                f"{int(self.keys[x]):,}", token, number(float(self.dots[x])), number(float(self.scores[x])), f"{w:.4f}",
                drawn, number(float(self.value_norms[x])), number(float(self.contributions[x])),
            ])  # fmt: skip
        lines.append(table(grid, "><>>><>>"))
        if n < len(self.keys):
            rest = float(self.weights[n:].sum())
            lines.append(f"{len(self.keys) - n:,} more keys share {rest:.4f}")
        text = "\n".join(lines)
        return text.encode("ascii", "replace").decode() if ascii else text


def _shown(token: str) -> str:
    """A token on one line, control characters made visible."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in token[:80])


def row_of(trace: Record, held: Held, b: int, head: int, i: int) -> Row:
    """Row i, from the tensors."""
    part = held.part_of("Trace.row()", b)
    p, place = part.problem, trace.heads.index(head)
    mine = torch.tensor([place], dtype=torch.int64, device="cpu")
    found = rectangle(p, part.inputs, trace.statistics.lse, b, mine, slice(i, i + 1), slice(0, p.Lk))
    dots, scores, seen, weights = (x[0, 0].cpu() for x in found)
    shown = seen & (scores != -torch.inf)
    keys = shown.nonzero().flatten()
    order = keys[torch.sort(weights[keys], descending=True, stable=True).indices]
    norms = trace.value_norms[b, trace.group_of(head), order].double()
    positions = trace.positions[b if trace.positions.shape[0] > 1 else 0]
    lse = float(trace.statistics.lse[b, place, i])
    sink = 0.0 if trace.sinks is None else float(torch.exp(trace.sinks[place].double() - lse))
    token = trace.query_tokens[i] if trace.query_tokens is not None else None
    tokens = None if trace.tokens is None else tuple(trace.tokens[int(j)] for j in order[:4096])
    return Row(
        i, int(positions[i]), head, b, token, order, dots[order], scores[order], weights[order], norms,
        float(trace.statistics.entropy[b, place, i]), sink, tokens, p.Lk - len(keys),
    )  # fmt: skip
