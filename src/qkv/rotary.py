"""Rotary position embedding: a value that turns queries and keys by their positions, with the published scalings."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from qkv.checks import flag, given_as, number
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError

# Tables of positions 0..n-1, shared by every layer with the same frequencies, device and dtype.
_TABLES: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()
_MAX_TABLES = 8
_MAX_TABLE_BYTES = 32 << 20  # a longer table is built for its call and not kept
_lock = threading.Lock()


class Scaling:
    """How a model trained on short sequences is stretched to longer ones: base of the published variants."""

    depends_on_length: ClassVar[bool] = False  # whether the frequencies change with the length of the sequence

    @property
    def gain(self) -> float:
        """What cos and sin are multiplied by, so that the scores of two rotated parts grow by its square."""
        return 1.0

    @property
    def latent_scale(self) -> float:
        """What `qkv.nn.LatentAttention` multiplies its softmax scale by."""
        return 1.0

    def frequencies(self, dim: int, base: float, length: int) -> tuple[float, ...]:
        """The angles per position.

        Parameters
        ----------
        dim : int
            Numbers of a head that turn.
        base : float
            Of the plain frequencies, base^(-2i / dim).
        length : int
            Tokens of the sequence.

        Returns
        -------
        tuple of float
            dim / 2 of them.
        """
        raise NotImplementedError


def _plain(dim: int, base: float) -> tuple[float, ...]:
    return tuple(base ** (-2 * i / dim) for i in range(dim // 2))


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation: every position is divided by `factor` (Chen et al., 2023, arXiv 2306.15595).

    Parameters
    ----------
    factor : float
        > 0.

    Examples
    --------
    >>> Rotary(4, scaling=Linear(4.0)).frequencies()
    (0.25, 0.0025)
    """

    factor: float

    def __post_init__(self) -> None:
        _above("qkv.rotary.Linear()", 0, factor=self.factor)

    def frequencies(self, dim: int, base: float, length: int) -> tuple[float, ...]:
        return tuple(f / self.factor for f in _plain(dim, base))


@dataclass(frozen=True)
class DynamicNTK(Scaling):
    """The base grows with the sequence once it is longer than `original_length` (emozilla, 2023; YaRN, §3.3).

    base' = base * (factor * length / original_length - (factor - 1)) ^ (dim / (dim - 2)). The length is the largest
    position + 1 of the call, so keys rotated in an earlier, shorter call have other frequencies.

    Parameters
    ----------
    factor : float
        > 0.
    original_length : int
        Tokens of the longest sequence that the model was trained on.
    """

    depends_on_length = True

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _above("qkv.rotary.DynamicNTK()", 0, factor=self.factor, original_length=self.original_length)

    def frequencies(self, dim: int, base: float, length: int) -> tuple[float, ...]:
        if length <= self.original_length or dim == 2:  # the one pair of dim 2 has frequency 1 under any base
            return _plain(dim, base)
        growth = self.factor * length / self.original_length - (self.factor - 1)
        return _plain(dim, base * growth ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YaRN(Scaling):
    """Slow pairs are interpolated, fast ones kept, with a ramp between (Peng et al., 2023, arXiv 2309.00071).

    A pair that turns more than `beta_fast` times over `original_length` keeps its frequency, one that turns less than
    `beta_slow` times has it divided by `factor`.

    Parameters
    ----------
    factor : float
        > 0.
    original_length : int
        Tokens of the longest sequence that the model was trained on.
    beta_fast, beta_slow : float
        Turns over the original length.
    mscale, mscale_all_dim : float
        DeepSeek's: the attention factor is the quotient of 0.1 m ln(factor) + 1 for the two m, and the softmax scale of
        `qkv.nn.LatentAttention` is multiplied by the square of that of mscale_all_dim.
    attention_factor : float
        What cos and sin are multiplied by; 0.1 ln(factor) + 1 unless given.
    truncate : bool
        Round the ramp's ends outwards to whole pairs, as the paper's code does; GPT-OSS does not.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        call = "qkv.rotary.YaRN()"
        _above(call, 0, factor=self.factor)
        _above(call, 1, original_length=self.original_length)
        _above(call, 0, beta_fast=self.beta_fast, beta_slow=self.beta_slow)

    @property
    def gain(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    @property
    def latent_scale(self) -> float:
        return self.magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def magnitude(self, m: float) -> float:
        """The attention factor of one m.

        Parameters
        ----------
        m : float

        Returns
        -------
        float
            0.1 m ln(factor) + 1, or 1 where nothing is stretched.
        """
        return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, dim: int, base: float, length: int) -> tuple[float, ...]:
        def pair(turns: float) -> float:
            """The (fractional) pair that turns so many times over the original length."""
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        found = []
        for i, f in enumerate(_plain(dim, base)):
            slow = min(max((i - low) / (high - low), 0.0), 1.0)
            found.append(f * (1 - slow) + f / self.factor * slow)
        return tuple(found)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's: wavelengths beyond original_length / low_freq_factor are stretched by `factor`, short ones kept.

    Between original_length / high_freq_factor and original_length / low_freq_factor the two are blended by
    (original_length / wavelength - low) / (high - low).

    Parameters
    ----------
    factor : float
        > 0.
    original_length : int
        Tokens of the longest sequence that the model was trained on.
    low_freq_factor, high_freq_factor : float
        The latter is larger.

    Notes
    -----
    Source: the reference code of Llama 3.1 (Meta, 2024).
    """

    factor: float = 8.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        call = "qkv.rotary.Llama3()"
        _above(call, 0, factor=self.factor, original_length=self.original_length, low_freq_factor=self.low_freq_factor)
        if not self.high_freq_factor > self.low_freq_factor:
            given = f"low_freq_factor={self.low_freq_factor} and high_freq_factor={self.high_freq_factor}"
            raise ArgumentError.of(call, "high_freq_factor must be > low_freq_factor", given, "Use 1 and 4")

    def frequencies(self, dim: int, base: float, length: int) -> tuple[float, ...]:
        found = []
        for f in _plain(dim, base):
            turns = self.original_length * f / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = min(max(kept, 0.0), 1.0)
            found.append(f * kept + f / self.factor * (1 - kept))
        return tuple(found)


@dataclass(frozen=True)
class LongRoPE(Scaling):
    """One divisor a pair, found by search: `short_factor` up to original_length tokens, `long_factor` beyond.

    The attention factor is sqrt(1 + ln(factor) / ln(original_length)) unless given, with `factor` the extended length
    over the original one. The length is the largest position + 1 of the call, so keys rotated in an earlier, shorter
    call have other frequencies.

    Parameters
    ----------
    short_factor, long_factor : tuple of float
        dim / 2 divisors.
    factor : float
        > 0.
    original_length : int
        Tokens.
    attention_factor : float
        What cos and sin are multiplied by.

    Notes
    -----
    Source: Ding et al. (2024), arXiv 2402.13753, as Phi-3 uses it.
    """

    depends_on_length = True

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    original_length: int
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        call = "qkv.rotary.LongRoPE()"
        _above(call, 0, factor=self.factor)
        _above(call, 1, original_length=self.original_length)
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))  # lists become hashable
        if len(self.short_factor) != len(self.long_factor):
            given = f"{len(self.short_factor)} short and {len(self.long_factor)} long factors"
            raise ArgumentError.of(call, "both factors must have one entry a pair", given, "Use dim / 2 each")
        _above(call, 0, short_factor=min(self.short_factor, default=0), long_factor=min(self.long_factor, default=0))

    @property
    def gain(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def frequencies(self, dim: int, base: float, length: int) -> tuple[float, ...]:
        divisors = self.long_factor if length > self.original_length else self.short_factor
        if len(divisors) != dim // 2:
            rule, fix = "LongRoPE needs one factor a pair", f"Pass {dim // 2} factors"
            raise ArgumentError.of("qkv.rotary.Rotary()", rule, f"{len(divisors)} factors and dim={dim}", fix)
        return tuple(f / d for f, d in zip(_plain(dim, base), divisors, strict=True))


@dataclass(frozen=True)
class Rotary:
    """Turn pairs of a query's and a key's numbers by angles in proportion to their positions.

    ::

        theta_i = base^(-2i / dim)                        i = 0 .. dim/2 - 1, changed by `scaling`
        (a, b) -> (a cos(p theta_i) - b sin(p theta_i),   p the token's position
                   b cos(p theta_i) + a sin(p theta_i))

    so that the score of a rotated query and key depends on their distance only.

    Parameters
    ----------
    dim : int
        How many leading numbers of a head turn: even, at most the head size. The others pass (partial rotary).
    base : float
        The wavelengths run from 2 pi to 2 pi base tokens.
    interleaved : bool
        Pair i is (2i, 2i + 1), as in the paper, GPT-J and DeepSeek; else (i, i + dim/2), as in GPT-NeoX and Llama.
    scaling : Scaling
        `Linear`, `DynamicNTK`, `YaRN`, `Llama3` or `LongRoPE`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An odd or empty dim, a base that is not > 0, a scaling of another type.

    Notes
    -----
    A value: immutable, hashable, without tensors, so modules that hold one copy, pickle and move freely. Tables of cos
    and sin are made on the device of the tensor they turn, in float32 (float64 for float64), and a few are kept.
    Cost: 3 FLOPs a number; reads and writes x once.
    Source: Su et al. (2021), arXiv 2104.09864.

    Examples
    --------
    >>> import torch, math
    >>> turn = Rotary(2).rotate(torch.tensor([[[[1.0, 0.0]] * 3]]))
    >>> turn[0, 0, :, 0].tolist() == [1.0, torch.tensor(1.0).cos().item(), torch.tensor(2.0).cos().item()]
    True
    """

    dim: int
    base: float = 10000.0
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        call = "qkv.rotary.Rotary()"
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise ArgumentTypeError.of(call, "dim must be an integer", given_as("dim", self.dim), "Pass the head size")
        if self.dim < 2 or self.dim % 2:
            fix = "Pass the head size, or the even part of it that turns"
            raise ArgumentError.of(call, "dim must be even and at least 2", f"dim={self.dim}", fix)
        _above(call, 1, base=self.base)
        flag(call, "interleaved", self.interleaved)
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            given = given_as("scaling", self.scaling)
            fix = "Use qkv.rotary.Linear, DynamicNTK, YaRN, Llama3 or LongRoPE"
            raise ArgumentTypeError.of(call, "scaling must be a Scaling", given, fix)
        self.frequencies()  # a scaling that does not fit dim says so now

    @property
    def gain(self) -> float:
        """What cos and sin are multiplied by: 1 but for YaRN and LongRoPE, where it is their attention factor."""
        return 1.0 if self.scaling is None else self.scaling.gain

    def frequencies(self, length: int = 0) -> tuple[float, ...]:
        """theta, the angles per position.

        Parameters
        ----------
        length : int
            Tokens of the sequence, which matter to DynamicNTK and LongRoPE only.

        Returns
        -------
        tuple of float
            dim / 2 of them.

        Examples
        --------
        >>> Rotary(4).frequencies()
        (1.0, 0.01)
        """
        length = length if self.scaling is not None and self.scaling.depends_on_length else 0
        return _frequencies(self, length) if torch.compiler.is_compiling() else _remembered(self, length)

    def length(self, positions: int | Tensor, count: int) -> int:
        """The length of a sequence that ends with these tokens.

        Parameters
        ----------
        positions : int or int Tensor
            The first token's position, or each token's own.
        count : int
            Tokens.

        Returns
        -------
        int
            0 where the scaling does not look at it; for a tensor its largest + 1.

        Notes
        -----
        Cost: reading a tensor of positions waits for an accelerator.
        """
        if self.scaling is None or not self.scaling.depends_on_length:
            return 0
        if isinstance(positions, Tensor):
            return int(positions.max()) + 1 if positions.numel() else 0
        return positions + count

    def tables(
        self,
        positions: int | Tensor,
        count: int,
        *,
        length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles of `count` tokens, times the attention factor.

        Parameters
        ----------
        positions : int, or int Tensor (count,) or (B or 1, count)
            The position of the first of consecutive tokens, or each token's own.
        count : int
        length : int
            The sequence's, for DynamicNTK and LongRoPE; `self.length(positions, count)` unless given.
        device, dtype : of the result; float32 or float64

        Returns
        -------
        cos, sin : Tensor, shape (count, dim / 2) or (B or 1, count, dim / 2)
            Read only: they may be shared.

        Examples
        --------
        >>> cos, sin = Rotary(8).tables(10, 5)
        >>> cos.shape
        torch.Size([5, 4])
        """
        frequencies = self.frequencies(self.length(positions, count) if length is None else length)
        if isinstance(positions, Tensor):
            return self._build(positions.to(device), frequencies, dtype)
        device, stop = torch.device(device), positions + count
        varies = self.scaling is not None and self.scaling.depends_on_length
        # A tracer's tensors must not outlive it, and a meta table costs nothing.
        kept = not (torch.compiler.is_compiling() or varies or device.type == "meta") and count > 0 <= positions
        rows = max(64, 1 << (stop - 1).bit_length()) if kept else 0
        if not kept or rows * self.dim * dtype.itemsize > _MAX_TABLE_BYTES:  # cos and sin of dim / 2 each
            return self._build(torch.arange(positions, stop, device=device), frequencies, dtype)
        cos, sin = self._kept(rows, frequencies, device, dtype)
        return cos[positions:stop], sin[positions:stop]

    def rotate(self, x: Tensor, positions: int | Tensor = 0) -> Tensor:
        """x with its leading `dim` numbers turned.

        Parameters
        ----------
        x : Tensor, shape (B, H, L, D)
        positions : int, or int Tensor (L,) or (B or 1, L)
            The first token's position, or each token's own.

        Returns
        -------
        Tensor, shape (B, H, L, D)
            In x's dtype, computed in float32 (float64 for float64).

        Raises
        ------
        ShapeError, ArgumentTypeError
            x or positions of another shape or type.

        Examples
        --------
        >>> import torch
        >>> q, k = torch.randn(2, 1, 4, 1, 8).unbind()
        >>> r = Rotary(8)
        >>> near = (r.rotate(q, 3) * r.rotate(k, 1)).sum(-1)
        >>> far = (r.rotate(q, 1003) * r.rotate(k, 1001)).sum(-1)
        >>> torch.allclose(near, far, atol=1e-3)
        True
        """
        call = "Rotary.rotate()"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = f"x {x.dtype}" if isinstance(x, Tensor) else f"x={x!r}"
            raise ArgumentTypeError.of(call, "x must be a floating tensor", given, "Pass (B, H, L, D)")
        if x.dim() != 4 or x.shape[-1] < self.dim:
            rule = f"x must be (B, H, L, D) with D >= dim={self.dim}"
            raise ShapeError.of(call, rule, f"x {tuple(x.shape)}", "Use a smaller dim, or split the heads")
        B, _, L, _ = x.shape
        positions = as_positions(call, positions, B, L)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.apply(x, *self.tables(positions, L, device=x.device, dtype=dtype))

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotate` with the tables at hand.

        Parameters
        ----------
        x : Tensor, shape (B, H, L, D)
        cos, sin : Tensor, shape (L, dim / 2) or (B or 1, L, dim / 2)
            As `tables` gives them.

        Returns
        -------
        Tensor, shape (B, H, L, D)
            In x's dtype.
        """
        # Heads inside tokens, as projections leave them in memory: no copy before or after.
        by_token = x.transpose(1, 2)
        wide = by_token[..., : self.dim].to(cos.dtype)
        turn = _turn_pairs if self.interleaved else _turn_halves
        turned = turn(wide, cos.unsqueeze(-2), sin.unsqueeze(-2)).to(x.dtype)
        if self.dim < x.shape[-1]:
            turned = torch.cat((turned, by_token[..., self.dim :]), dim=-1)
        return turned.transpose(1, 2)

    def _build(self, steps: Tensor, frequencies: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        theta = torch.tensor(frequencies, dtype=dtype, device=steps.device)
        angles = steps.to(dtype).unsqueeze(-1) * theta
        gain = self.gain
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if gain == 1 else (cos * gain, sin * gain)

    def _kept(
        self, rows: int, frequencies: tuple[float, ...], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """A shared table of at least so many rows."""
        key = (frequencies, self.gain, device, dtype)
        with _lock:
            table = _TABLES.get(key)
            if table is not None and len(table[0]) >= rows:
                _TABLES.move_to_end(key)
                return table
        # A table made in inference mode could never be saved for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            table = self._build(torch.arange(rows, device=device), frequencies, dtype)
        if type(table[0]) is Tensor:  # not the stand-in of a fake mode
            with _lock:
                _TABLES[key] = table
                _TABLES.move_to_end(key)
                while len(_TABLES) > _MAX_TABLES:
                    _TABLES.popitem(last=False)
        return table


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + n/2) of the last dimension. Whole rows at a time: halves cost several times as much."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * torch.cat((cos, cos), dim=-1), swapped, torch.cat((-sin, sin), dim=-1))


def _turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of the last dimension, as complex numbers: ten times as fast as two strided halves."""
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers fuse the real form and know no complex one
        a, b = pairs.unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    if any(step % 2 for step in (*pairs.stride()[:-1], pairs.storage_offset())) or pairs.stride(-1) != 1:
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)


def _frequencies(rotary: Rotary, length: int) -> tuple[float, ...]:
    if rotary.scaling is None:
        return _plain(rotary.dim, rotary.base)
    return rotary.scaling.frequencies(rotary.dim, rotary.base, length)


_remembered = lru_cache(maxsize=64)(_frequencies)  # which a tracer sees through, with a warning


def as_positions(call: str, positions: Any, B: int, L: int) -> int | Tensor:
    """Positions of tokens, checked.

    Parameters
    ----------
    call : str
        The public function, for messages.
    positions : int or int Tensor
    B, L : int
        Batch rows and tokens of each.

    Returns
    -------
    int, or Tensor of shape (L,) or (B or 1, L)
    """
    if isinstance(positions, int) and not isinstance(positions, bool):
        return positions
    fix = f"Pass the first token's position, or an integer tensor of shape ({L},) or ({B}, {L})"
    if not isinstance(positions, Tensor):
        rule = "positions must be an int or an integer tensor"
        raise ArgumentTypeError.of(call, rule, given_as("positions", positions), fix)
    if positions.dtype == torch.bool or positions.is_floating_point() or positions.is_complex():
        raise ArgumentTypeError.of(call, "positions must hold integers", f"positions {positions.dtype}", fix)
    if positions.shape not in ((L,), (B, L), (1, L)):
        given = f"positions {tuple(positions.shape)}, B={B} and L={L}"
        raise ShapeError.of(call, "positions must be (L,) or (B or 1, L)", given, fix)
    return positions


def _above(call: str, low: float, **numbers: float) -> None:
    for name, x in numbers.items():
        number(call, name, x, f"Pass a number > {low}")
        if not low < x < math.inf:
            raise ArgumentError.of(call, f"{name} must be finite and > {low}", f"{name}={x}", f"Pass a number > {low}")
