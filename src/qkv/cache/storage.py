"""The tensors of a cache: writes that quantise, copies of pages, poison, and the way to host memory and back.

A token's keys of one head are a row of D numbers; row (page, h, slot) of a (N, Hkv, P, D) tensor is row
(page Hkv + h) P + slot of the same memory as (N Hkv P, D). One `index_copy_` of rows writes all tokens of a step.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence as Ordered

import torch
from torch import Tensor

from qkv.cache.checks import FLOAT8, INT8, LARGEST
from qkv.cache.hugepages import zeros
from qkv.cache.spec import Spec
from qkv.cache.summaries import Filled, Summaries
from qkv.errors import ArgumentError

_MAX = torch.finfo(torch.float32).max
_POISON = 127  # as an int8; these bits as float8_e4m3fn are NaN
# Rows move as the widest numbers that divide them: measured, 4 times faster than as bfloat16.
_UNITS = ((16, torch.complex128), (8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.int8))


class Places:
    """Where the rows of a step go, for all layers: `base` is the row of head 0 for each token, in int64."""

    __slots__ = ("_base", "_rows", "heads", "page_size", "shape")

    def __init__(self, base: array[int], n: int, T: int, heads: int, page_size: int, device: torch.device) -> None:
        tensor = torch.frombuffer(base, dtype=torch.int64)
        self._base = tensor if device.type == "cpu" else tensor.to(device)
        self.shape, self.heads, self.page_size = (n, T), heads, page_size
        self._rows: dict[tuple[int, int, bool], Tensor] = {}

    def rows(self, heads: int, page_size: int, by_token: bool) -> Tensor:
        """The rows of (n, heads, T) in that order, or of (n, T, heads)."""
        found = self._rows.get((heads, page_size, by_token))
        if found is None:
            base = self._base.view(self.shape)
            # Index keys have one head, and a dense cache may have grown in the middle of the step.
            if (heads, page_size) != (self.heads, self.page_size):
                page, slot = base // (self.heads * self.page_size), base % (self.heads * self.page_size)
                base = page * (heads * page_size) + slot
            head = torch.arange(0, heads * page_size, page_size, device=base.device)
            found = base[:, :, None] + head if by_token else base[:, None] + head[:, None]
            found = self._rows[heads, page_size, by_token] = found.reshape(-1)
        return found


class Plane:
    """One tensor of one layer: keys, values, or latents, with their scales where they are quantised."""

    __slots__ = ("data", "pages", "raw", "rows", "scale", "scale_rows", "unit", "unit_bytes")

    def __init__(self, size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        N, H, P, D = size
        self.data = zeros(size, dtype, device)
        self.raw = self.data.view(torch.int8) if dtype == FLOAT8 else self.data
        self.scale = torch.zeros((N, H, P), dtype=torch.float32, device=device) if dtype in LARGEST else None
        self.scale_rows = None if self.scale is None else self.scale.view(-1)
        wide = D * self.data.element_size()
        self.unit_bytes, self.unit = next(unit for unit in _UNITS if wide % unit[0] == 0)
        self.rows = self.data.view(N * H * P, D).view(self.unit)
        self.pages = self.rows.view(N, -1)

    def write(self, x: Tensor, places: Places) -> None:
        """Store x (n, H, T, D)."""
        _, H, P, D = self.data.shape
        if x.requires_grad:
            x = x.detach()
        by_token = False
        if not x.is_contiguous():
            turned = x.transpose(1, 2)
            by_token = turned.is_contiguous()
            x = turned if by_token else x.contiguous()
        index = places.rows(H, P, by_token)
        if self.scale_rows is not None:
            x, scale = quantise(x, self.data.dtype)
            self.scale_rows.index_copy_(0, index, scale.view(-1))
        if x.dtype != self.unit:
            if x.storage_offset() * x.element_size() % self.unit_bytes or x.is_neg():
                x = x.resolve_neg().clone(memory_format=torch.contiguous_format)
            x = x.view(-1, D).view(self.unit)
        else:
            x = x.view(-1, D)
        self.rows.index_copy_(0, index, x)

    def poison(self, pages: Tensor) -> None:
        self.raw.index_fill_(0, pages, torch.nan if self.raw.is_floating_point() else _POISON)
        if self.scale is not None:
            self.scale.index_fill_(0, pages, torch.nan)

    def poison_slots(self, page: int, first: int) -> None:
        self.raw[page, :, first:] = torch.nan if self.raw.is_floating_point() else _POISON
        if self.scale is not None:
            self.scale[page, :, first:] = torch.nan


def quantise(x: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of x (..., D) as int8 or float8, and their float32 scales (...): x is about stored * scale.

    scale = max|row| / 127 for int8, / 448 for float8_e4m3fn. int8 errs by at most scale / 2 a number (plus float32's
    own rounding), that is max|row| / 254; float8 by |number| / 16, or scale / 1024 where the number is tiny.
    A row of zeros has scale 0; a row with a NaN or an infinity has scale NaN and stored zeros, so it reads back as NaN.

    >>> import torch
    >>> stored, scale = quantise(torch.tensor([[0.5, -1.27]]), torch.int8)
    >>> stored, scale
    (tensor([[  50, -127]], dtype=torch.int8), tensor([0.0100]))
    """
    largest = LARGEST[storage]
    x = x.to(torch.float32)
    top = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])  # NaN and inf go through
    # Clamped so that the largest float32 of all reads back as a finite number, too.
    scale = (top / largest).clamp_(max=_MAX / largest * (1 - 2**-23))
    scale = torch.where(top < torch.inf, scale, torch.nan)
    usable = (scale > 0)[..., None]  # not where max|row| / 127 is too small for a float32: that row is 0
    x = torch.where(usable, x / torch.where(usable, scale[..., None], 1.0), 0.0).clamp_(-largest, largest)
    if storage == INT8:
        return x.round_().to(INT8), scale
    return x.to(FLOAT8).view(torch.int8), scale


class Storage:
    """All layers' tensors: a plane for keys and one for values, or one for latents whose first `rank` columns are v."""

    def __init__(self, spec: Spec, pages: int, page_size: int) -> None:
        self.spec, self.pages, self.page_size = spec, pages, page_size
        self.planes, self.summaries = self._allocate()
        if spec.debug:
            self.poison(range(pages))
        # What the views of a layer begin with: k, v, k_scale, v_scale, dtype.
        self.parts = [self._parts(planes) for planes in self.planes]
        self.index_parts = [self._index_parts(planes[-1]) for planes in self.planes] if spec.index else None

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one token takes, in all layers, with its scales."""
        scale, each = 4 if self.spec.storage in LARGEST else 0, self.spec.storage.itemsize
        return self.spec.layers * sum(heads * (width * each + scale) for heads, width in self.spec.planes)

    @property
    def bytes(self) -> int:
        return self.pages * self.page_size * self.bytes_per_slot + self.bytes_of_summaries

    @property
    def bytes_of_summaries(self) -> int:
        """Three float32 rows a block and head, in all layers."""
        spec = self.spec
        blocks = self.pages * (self.page_size // spec.summaries) if spec.summaries else 0
        return 12 * blocks * spec.layers * spec.heads * spec.widths[0]

    def _allocate(self) -> tuple[list[tuple[Plane, ...]], list[Summaries]]:
        try:
            with torch.inference_mode(False), torch.no_grad():  # so that code of both kinds may write to it
                sizes = [(self.pages, heads, self.page_size, width) for heads, width in self.spec.planes]
                layers, pages = self.spec.layers, (self.spec.storage, self.spec.device)
                kept = [Summaries(self.spec, self.pages, self.page_size) for _ in range(layers * self.summarises)]
                return [tuple(Plane(s, *pages) for s in sizes) for _ in range(layers)], kept
        except (RuntimeError, AssertionError) as error:  # torch's words for no memory, or no such device
            given = f"{self.bytes:,} bytes on {self.spec.device}: {str(error).splitlines()[0][:120]}"
            fix = "Use fewer pages (or sequences), a smaller capacity, or storage=torch.int8"
            raise ArgumentError.of("qkv.cache", "the tensors of a cache must fit in memory", given, fix) from error

    @property
    def summarises(self) -> bool:
        return self.spec.summaries > 0

    def _parts(self, planes: tuple[Plane, ...]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, torch.dtype]:
        k, v = planes[0], planes[len(self.spec.widths) - 1]
        with torch.inference_mode(False):
            values = v.data if self.spec.rank is None else k.data[..., : self.spec.rank]
        return k.data, values, k.scale, v.scale, self.spec.dtype

    def _index_parts(self, plane: Plane) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, torch.dtype]:
        """The same of an indexer's keys, which have no values."""
        with torch.inference_mode(False):
            return plane.data, plane.data[..., :0], plane.scale, plane.scale, self.spec.dtype

    def write(self, layer: int, rows: tuple[Tensor, ...], places: Places, filled: Filled | None) -> None:
        """Store the rows of a step, (n, Hkv, T, width) for each plane, and summarise the blocks that they fill."""
        for plane, x in zip(self.planes[layer], rows, strict=True):
            plane.write(x, places)
        if filled is not None:
            plane = self.planes[layer][0]
            self.summaries[layer].fill(plane.data, plane.scale, filled)

    def _tensors(self) -> Iterator[Tensor]:
        """All that is on pages, page by page: rows in wide units, and scales."""
        for plane in self._planes():
            yield plane.pages
            if plane.scale is not None:
                yield plane.scale
        for kept in self.summaries:
            yield from kept.by_page()

    def _planes(self) -> Iterator[Plane]:
        return itertools.chain.from_iterable(self.planes)

    def copy_pages(self, sources: Ordered[int], targets: Ordered[int]) -> None:
        """Copy whole pages of all layers, bit for bit."""
        source, target = self._ids(sources), self._ids(targets)
        for tensor in self._tensors():
            tensor.index_copy_(0, target, tensor.index_select(0, source))

    def read(self, pages: Ordered[int]) -> list[Tensor]:
        """Copies of the pages in host memory, with their scales."""
        ids = self._ids(pages)
        return [tensor.index_select(0, ids).cpu() for tensor in self._tensors()]

    def restore(self, host: Ordered[Tensor], rows: Ordered[int], pages: Ordered[int]) -> None:
        """Put the given rows of what `read` returned into pages."""
        ids, chosen = self._ids(pages), torch.tensor(rows, dtype=torch.int64, device="cpu")
        for tensor, copy in zip(self._tensors(), host, strict=True):
            tensor.index_copy_(0, ids, copy.index_select(0, chosen).to(self.spec.device))

    def poison(self, pages: Ordered[int]) -> None:
        """Fill pages with NaN, so that whatever reads them shows."""
        if len(pages):
            ids = self._ids(pages)
            for plane in self._planes():
                plane.poison(ids)
            for kept in self.summaries:
                kept.poison(ids)

    def poison_slots(self, page: int, first: int) -> None:
        """Fill a page's slots from `first` with NaN."""
        for plane in self._planes():
            plane.poison_slots(page, first)
        for kept in self.summaries:
            kept.poison_slots(page, first)

    def grown(self, page_size: int) -> Storage:
        """A storage with longer pages and the same contents; this one stays as it is."""
        new = Storage(self.spec, self.pages, page_size)
        with torch.inference_mode(False), torch.no_grad():
            for old, fresh in zip(self._planes(), new._planes(), strict=True):
                fresh.raw[:, :, : self.page_size] = old.raw
                if old.scale is not None and fresh.scale is not None:
                    fresh.scale[:, :, : self.page_size] = old.scale
            for to, kept in zip(new.summaries, self.summaries, strict=True):
                to.grow_from(kept)
        return new

    def _ids(self, pages: Ordered[int]) -> Tensor:
        return torch.tensor(list(pages), dtype=torch.int64, device=self.spec.device)
