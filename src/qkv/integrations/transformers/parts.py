"""The masks of Hugging Face transformers as values: what its mask functions mean, without a tensor of Lq x Lk.

transformers describes a mask as a function of (batch, head, query, key) that is put together from a few known parts:
causal, windows, chunks, blocks of ids, packed sequences, "and", "or". `parse` takes such a function apart by the code
objects of its parts, `translate` writes it in the mask algebra. A part nobody knows is evaluated into a bool tensor,
with one warning.

transformers speaks of absolute positions: query i stands on i + q_offset, key j on j + kv_offset (a sliding cache
begins later than 0). qkv counts keys from 0, so a query stands on p = i + q_offset - kv_offset.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.masks import Mask, causal, chunked, dense, documents, padding, prefix, sliding_window, window

MaskFunction = Callable[[Any, Any, Any, Any], Any]
_UNBOUNDED = 2**62


# ------------------------------------------------------------------------------------------------------------- parts
@dataclass(frozen=True)
class Node:
    """A part of a mask function. Its kinds are the subclasses."""


@dataclass(frozen=True)
class Window(Node):
    """p - left <= j <= p + right, None = unbounded: causal, sliding windows, and all keys."""

    left: int | None = None
    right: int | None = None


@dataclass(frozen=True, eq=False)
class Chunks(Node):
    """Chunks of `size` tokens, counted from each row's first token after `first` tokens of left padding."""

    size: int
    first: Tensor  # (B,)


@dataclass(frozen=True, eq=False)
class Groups(Node):
    """Query and key have equal ids (B, L), taken at their absolute positions; with `only_real` ids >= 0 alone."""

    ids: Tensor
    only_real: bool


@dataclass(frozen=True, eq=False)
class Keys(Node):
    """Key j is real: bool (B, L), taken at absolute positions."""

    real: Tensor


@dataclass(frozen=True, eq=False)
class Restarted(Node):
    """`part` with positions that begin anew in each packed sequence: position_ids (B, L)."""

    function: MaskFunction
    part: Node
    position_ids: Tensor


@dataclass(frozen=True)
class Both(Node):
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either(Node):
    parts: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Unknown(Node):
    """A function that is not from transformers, or not as this file knows it."""

    function: MaskFunction


class Frame(NamedTuple):
    """Where queries and keys stand, and what an unknown part needs to be evaluated."""

    batch: int
    q_length: int
    kv_length: int  # keys from `kv_length` on are hidden from every query
    q_offset: int
    kv_offset: int
    use_vmap: bool
    device: torch.device

    @property
    def first(self) -> int:
        """The position of query 0 among the keys."""
        return self.q_offset - self.kv_offset


# --------------------------------------------------------------------------------------------------- taking it apart
Reader = Callable[[MaskFunction, dict[str, Any], "Parts"], Node]


class Parts:
    """The known parts of one installed transformers, by code object: closures of one factory share it.

    Each is tried on a small grid first: a release that changes what a part means makes it unknown, which costs memory
    and never a wrong mask.
    """

    def __init__(self, module: Any) -> None:
        self._dense = module.sdpa_mask
        self._readers: dict[Any, Reader] = {}
        for read, example in _known(module):
            try:
                function = example()
            except (AttributeError, TypeError):  # this release has no such part, or makes it otherwise
                continue
            self._readers[function.__code__] = read
            if not self._agrees(function):
                del self._readers[function.__code__]

    def parse(self, function: MaskFunction) -> Node:
        """The function's parts."""
        code = getattr(function, "__code__", None)
        read = self._readers.get(code)
        if read is None or code is None:
            return Unknown(function)
        cells = getattr(function, "__closure__", None) or ()
        return read(function, {n: c.cell_contents for n, c in zip(code.co_freevars, cells, strict=True)}, self)

    def evaluate(self, function: MaskFunction, frame: Frame) -> Tensor:
        """The function as a bool tensor (B, 1, Lq, Lk): transformers' own reading of it. Quadratic."""
        found: Tensor = self._dense(
            batch_size=frame.batch,
            q_length=frame.q_length,
            q_offset=frame.q_offset,
            kv_length=frame.kv_length,
            kv_offset=frame.kv_offset,
            mask_function=function,
            attention_mask=None,
            allow_is_causal_skip=False,
            use_vmap=frame.use_vmap,
            device=frame.device,
        )
        return found

    def _agrees(self, function: MaskFunction) -> bool:
        frame = Frame(2, 6, 6, 0, 0, False, torch.device("cpu"))
        try:
            node = self.parse(function)
            if isinstance(node, Restarted):
                return True  # it is evaluated unless it stands beside the ids it belongs to, and is then checked
            mask = translate(node, frame, self)
        except (KeyError, TypeError):  # its closure has other names
            return False
        every = torch.ones(2, 1, 6, 6, dtype=torch.bool, device="cpu")
        ours = every if mask is None else mask.tensor(6, 6, positions=0, B=2)
        return torch.equal(ours, self.evaluate(function, frame).expand(2, 1, 6, 6))


def _known(m: Any) -> Iterator[tuple[Reader, Callable[[], Any]]]:
    """How to read each part, and an example of it. Parts that hold others come after them."""
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2]], dtype=torch.int64, device="cpu")
    blocks = torch.tensor([[-1, 0, 0, -1, 1, 1], [-1, -1, -1, 0, 0, 0]], dtype=torch.int64, device="cpu")
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool, device="cpu")
    skipped = torch.tensor([0, 1], dtype=torch.int64, device="cpu")

    def backwards(f: MaskFunction, held: dict[str, Any], parts: Parts) -> Node:
        return Window(int(held["sliding_window"]) - 1)

    def both_ways(f: MaskFunction, held: dict[str, Any], parts: Parts) -> Node:
        return Window(int(held["sliding_window"]), int(held["sliding_window"]))

    def parsed(held: dict[str, Any], parts: Parts) -> tuple[Node, ...]:
        return tuple(parts.parse(part) for part in held["mask_functions"])

    yield lambda f, held, parts: Window(None, 0), lambda: m.causal_mask_function
    yield lambda f, held, parts: Window(), lambda: m.bidirectional_mask_function
    yield backwards, lambda: m.sliding_window_overlay(2)
    yield both_ways, lambda: m.sliding_window_bidirectional_overlay(2)
    yield (
        lambda f, held, parts: Chunks(int(held["chunk_size"]), held["left_padding"]),
        lambda: m.chunked_overlay(3, skipped),
    )
    yield lambda f, held, parts: Groups(held["block_sequence_ids"], True), lambda: m.blockwise_overlay(blocks)
    yield (
        lambda f, held, parts: Groups(held["packed_sequence_mask"], False),
        lambda: m.packed_sequence_mask_function(ids),
    )
    yield lambda f, held, parts: Keys(held["padding_mask"]), lambda: m.padding_mask_function(real)
    yield (
        lambda f, held, parts: Both(parsed(held, parts)),
        lambda: m.and_masks(m.causal_mask_function, m.sliding_window_overlay(2)),
    )
    yield (
        lambda f, held, parts: Either(parsed(held, parts)),
        lambda: m.or_masks(m.causal_mask_function, m.packed_sequence_mask_function(ids)),
    )
    yield (
        lambda f, held, parts: Restarted(f, parts.parse(held["mask_function"]), held["position_ids"]),
        lambda: m.remap_positions_for_packed_sequence(m.causal_mask_function, ids),
    )


# ------------------------------------------------------------------------------------------------------- translation
def reach(node: Node) -> int:
    """The most keys that any query sees after its own position."""
    if isinstance(node, Window):
        return _UNBOUNDED if node.right is None else node.right
    if isinstance(node, Both):
        return min((reach(part) for part in node.parts), default=_UNBOUNDED)
    if isinstance(node, Either):
        return max((reach(part) for part in node.parts), default=_UNBOUNDED)
    return _UNBOUNDED


def translate(node: Node, frame: Frame, parts: Parts) -> Mask | None:
    """The part as a mask over keys 0 .. kv_length - 1; None = every query of the frame sees every key."""
    if isinstance(node, Window):
        return _window(node, frame)
    if isinstance(node, Both):
        return _both(node, frame, parts)
    if isinstance(node, Either):
        masks = [translate(part, frame, parts) for part in node.parts]
        if not masks:
            return prefix(0)
        seen = [mask for mask in masks if mask is not None]
        return reduce(Mask.__or__, seen) if seen and len(seen) == len(masks) else None
    if isinstance(node, Chunks):
        return _chunks(node, frame)
    if isinstance(node, Groups):
        return _groups(node, frame)
    if isinstance(node, Keys):
        return real_keys(node.real[:, frame.kv_offset : frame.kv_offset + frame.kv_length], frame)
    assert isinstance(node, (Restarted, Unknown))
    return _evaluated(node.function, frame, parts)


def _window(node: Window, frame: Frame) -> Mask | None:
    """The window, without the sides that hide nothing here: one new token of a decode needs no mask.

    A side below 0 begins after the query, or ends before it: a config with a window of 0 has its mask made, and does
    not use it.
    """
    if node.left is not None and node.right is not None and node.left + node.right < 0:
        return prefix(0)  # no key
    if node.left is not None and node.left < 0:
        after = ~window(None, -node.left - 1)
        return after if node.right is None else after & window(None, node.right)
    if node.right is not None and node.right < 0:
        before = ~window(-node.right - 1, None)
        return before if node.left is None else before & window(node.left, None)
    last = frame.first + frame.q_length - 1
    left = node.left if node.left is not None and node.left < last else None
    right = node.right if node.right is not None and frame.first + node.right < frame.kv_length - 1 else None
    if right == 0:
        return causal() if left is None else sliding_window(left + 1)
    return None if left is None and right is None else window(left, right)


def _both(node: Both, frame: Frame, parts: Parts) -> Mask | None:
    left: int | None = None
    right: int | None = None
    masks = []
    for part in _flat(_together(_flat(node))):
        if isinstance(part, Window):  # windows meet in one window
            left, right = _least(left, part.left), _least(right, part.right)
        else:
            masks.append(translate(part, frame, parts))
    masks.append(_window(Window(left, right), frame))
    seen = [mask for mask in masks if mask is not None]
    return reduce(Mask.__and__, seen) if seen else None


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _flat(node: Node) -> list[Node]:
    return [inner for part in node.parts for inner in _flat(part)] if isinstance(node, Both) else [node]


def _together(found: list[Node]) -> Both:
    """Packed sequences: beside the ids of the sequences, positions that begin anew are read as ones that run on.

    Within a sequence they differ by as much, so that windows mean the same; across sequences the ids hide all keys.
    """
    ids = [part.ids for part in found if isinstance(part, Groups)]

    def read(part: Node) -> Node:
        if isinstance(part, Restarted) and any(_runs_on(part.position_ids, known) for known in ids):
            return _anew(part.part, part.position_ids) or part
        return part

    return Both(tuple(read(part) for part in found))


def _runs_on(position_ids: Tensor, ids: Tensor) -> bool:
    """Whether positions grow by one from token to token of each sequence, and each sequence is in one piece."""
    if position_ids.shape != ids.shape:
        return False
    step, change = position_ids.diff(dim=1), ids.diff(dim=1)
    return bool(((change > 0) | ((change == 0) & (step == 1))).all())


def _anew(node: Node, position_ids: Tensor) -> Node | None:
    """The part within one sequence; None where its meaning is not known to be that of distances."""
    if isinstance(node, Window):
        return node
    if isinstance(node, (Both, Either)):
        inner = [_anew(part, position_ids) for part in node.parts]
        known = tuple(part for part in inner if part is not None)
        return type(node)(known) if len(known) == len(inner) else None
    if isinstance(node, Chunks):
        return Groups((position_ids - node.first[:, None]).div(node.size, rounding_mode="floor"), False)
    return None


def _chunks(node: Chunks, frame: Frame) -> Mask:
    skipped = node.first[:, None].to("cpu")
    if not bool(((frame.kv_offset - skipped) % node.size).any()):
        return chunked(node.size)
    at = torch.arange(max(frame.kv_offset + frame.kv_length, frame.q_offset + frame.q_length), device="cpu")
    return _groups(Groups((at - skipped).div(node.size, rounding_mode="floor"), False), frame)


def _groups(node: Groups, frame: Frame) -> Mask:
    ids = node.ids.to("cpu", torch.int64)
    if not node.only_real and ids.numel():
        ids = ids - ids.min()  # a negative id would be seen by nothing
    keys = ids[:, frame.kv_offset : frame.kv_offset + frame.kv_length]
    if frame.first >= 0 and frame.first + frame.q_length <= frame.kv_length:
        return documents(segment_ids=keys)
    return documents(segment_ids=ids[:, frame.q_offset : frame.q_offset + frame.q_length], k_segment_ids=keys)


def real_keys(real: Tensor, frame: Frame) -> Mask | None:
    """Which keys are no padding, bool (B, kv_length), as a mask."""
    if bool(real.all()):
        return None
    counts = real.sum(1)
    starts = real.to(torch.uint8).argmax(1)
    ends = starts + counts
    j = torch.arange(frame.kv_length, device=real.device)
    if not torch.equal(real, (j >= starts[:, None]) & (j < ends[:, None])):  # holes
        return documents(
            segment_ids=torch.zeros(1, frame.q_length, dtype=torch.int64, device="cpu"),
            k_segment_ids=real.to("cpu", torch.int64) - 1,
        )
    none = counts == 0
    if bool(((starts == 0) | none).all()):
        return padding(counts)
    if bool(((ends == frame.kv_length) | none).all()):
        return padding(counts, side="left")
    return prefix(ends) & ~prefix(starts)


_warned = False


def _evaluated(function: MaskFunction, frame: Frame, parts: Parts) -> Mask:
    if frame.q_length > 1:
        name = getattr(function, "__qualname__", type(function).__name__)
        quadratic(f"it does not know the mask function {name}")
    return dense(parts.evaluate(function, frame))


def quadratic(why: str) -> None:
    """Warn, once in a process, of a tensor of Lq x Lk."""
    global _warned
    if not _warned:
        _warned = True
        text = f"qkv: {why}, so this mask is a bool tensor of Lq x Lk: right, but its memory is quadratic."
        warnings.warn(text, UserWarning, stacklevel=2)
