"""The tensors of a `Config`: values with needles, magnets and poison in place, in the memory layout it asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qkv.scores import as_bias
from tests.kit import wide as wide_scores
from tests.kit.cases import DTYPES, Config, positions_argument, qkv_bias, qkv_mask, query_positions
from tests.kit.generator import EDGES, FAR_EDGES, Rng, chance, pick
from tests.kit.oracle import Call, Spec, visible

Array = NDArray[Any]


@dataclass
class Inputs:
    """One call, ready for `qkv.attention(**call())` and for the oracle."""

    config: Config
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Any
    bias: list[Any]  # library terms, one for each of config.bias
    leaves: dict[str, torch.Tensor]  # what takes a gradient: q k v sinks bias0 ...
    dout: torch.Tensor
    dlse: torch.Tensor
    oracle: Call
    hidden: Array  # (B, Hkv, Lk): slots that no row sees
    extra: dict[str, Any] = field(default_factory=dict)

    def call(self) -> dict[str, Any]:
        """The keyword arguments of qkv.attention()."""
        c = self.config
        kwargs: dict[str, Any] = {"q": self.q, "k": self.k, "v": self.v}
        given = {
            "mask": self.mask,
            "positions": positions_argument(c),
            "scale": c.scale,
            "softcap": c.softcap,
            "sinks": self.leaves.get("sinks"),
            "dropout_p": c.dropout_p or None,
        }
        for term in self.bias:
            # not tensor + tensor, which torch would round to their dtype before the library sees it
            given["bias"] = as_bias(term) if "bias" not in given else given["bias"] + term
        kwargs.update((key, value) for key, value in given.items() if value is not None)
        return kwargs | self.extra

    def clean(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Contiguous q, k, v with zeros wherever nothing may be read."""
        dead = torch.from_numpy(self.oracle_seen() == 0)[..., None]
        gone = torch.from_numpy(self.hidden)[..., None]
        k, v = (x.detach().contiguous().masked_fill(gone, 0) for x in (self.k, self.v))
        return self.q.detach().contiguous().masked_fill(dead, 0), k, v

    def oracle_seen(self) -> Array:
        geo = self.oracle.geo
        seen = np.zeros(geo[:3], np.int64)
        for at in np.ndindex(*geo[:3]):
            seen[at] = len(self.oracle.keys(*at))
        return seen

    def visible(self) -> torch.Tensor:
        """(B, Hq, Lq, Lk) bool, from the oracle's predicates."""
        seen = np.zeros(self.oracle.geo, bool)
        for at in np.ndindex(*self.oracle.geo[:3]):
            seen[at][self.oracle.keys(*at)] = True
        return torch.from_numpy(seen)


# -------------------------------------------------------------------------------------------------------- layouts
def poison_values(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """What lies where nothing may read."""
    if not dtype.is_floating_point:
        return torch.tensor([True, False]) if dtype == torch.bool else torch.tensor([-1, 2**40])
    top = torch.finfo(dtype).max
    values = {"nan": [float("nan")], "inf": [float("inf"), -float("inf")], "huge": [top, -top / 2]}.get(
        kind, [1e4, -3e4]
    )
    return torch.tensor(values, dtype=dtype)


def filled(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of poison."""
    values, count = poison_values(kind, dtype), int(np.prod(shape))
    return values.repeat(-(-count // len(values)))[:count].reshape(shape).clone()


def lay(x: torch.Tensor, layout: str, poison: str = "nan") -> torch.Tensor:
    """The same values in another memory layout; gaps and surroundings hold poison."""
    x = x.detach().contiguous()
    if layout == "transposed" and x.ndim == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "column" and x.ndim >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expand_batch" and x.ndim == 4:
        return x[:1].clone().expand(x.shape)
    if layout == "expand_heads" and x.ndim == 4:
        return x[:, :1].clone().expand(x.shape)
    if layout == "offset":
        flat = filled((x.numel() + 6,), poison, x.dtype)
        view = flat[1 : 1 + x.numel()].view(x.shape)
    elif layout == "padded" and x.ndim >= 2:
        *lead, rows, columns = x.shape
        view = filled((*lead, rows + 3, columns + 5), poison, x.dtype)[..., 2 : 2 + rows, 1 : 1 + columns]
    elif layout == "step_rows" and x.ndim >= 2:
        *lead, rows, columns = x.shape
        view = filled((*lead, 2 * rows + 1, columns), poison, x.dtype)[..., 1 : 2 * rows + 1 : 2, :]
    elif layout == "step_dim":
        view = filled((*x.shape[:-1], 2 * x.shape[-1]), poison, x.dtype)[..., ::2]
    else:
        return x.clone()
    view.copy_(x)
    return view


def _share(x: Array, layout: str) -> Array:
    """Equal values along the dimension that the layout expands."""
    if layout == "expand_batch" and len(x):
        x[:] = x[:1]
    if layout == "expand_heads" and x.shape[1]:
        x[:] = x[:, :1]
    return x


# --------------------------------------------------------------------------------------------------------- values
def _draw(config: Config, rng: Rng) -> tuple[Array, Array, Array]:
    """q, k, v: logits of the wanted spread, before anything is planted."""
    c = config
    if c.wide is not None:
        shapes = ((c.B, c.Hq, c.Lq, c.D), (c.B, c.Hkv, c.Lk, c.D), (c.B, c.Hkv, c.Lk, c.Dv))
        makers = (wide_scores.queries, wide_scores.keys, wide_scores.values)
        q, k, v = (make(c, rng, shape) for make, shape in zip(makers, shapes, strict=True))
        return q, k, v
    scale = abs(c.real_scale) or 1.0
    spread = {"flat": 0.2, "large": 60.0, "small": 1e-4}.get(c.flavour, pick(rng, 4.0, 5.0, 8.0))
    k_sigma = 1e-3 if c.flavour == "small" else spread**0.5
    q_sigma = spread / (scale * c.D**0.5 * k_sigma)
    q = rng.normal(size=(c.B, c.Hq, c.Lq, c.D)) * q_sigma
    k = rng.normal(size=(c.B, c.Hkv, c.Lk, c.D)) * k_sigma
    size = {"large": pick(rng, 8.0, 2.0**20), "small": 2.0**-10}.get(c.flavour, 1.0)
    if c.dtype == "f16":
        size = min(max(size, 2.0**-3), 8.0)
    # A mean is added only where scores are spread: rounding over many equal weights of one sign grows with the length
    mean = pick(rng, 0, 0, 1.5) * (c.flavour == "needles" and c.scale != 0)
    v = (rng.normal(size=(c.B, c.Hkv, c.Lk, c.Dv)) + mean) * size
    if c.flavour == "shifted" and c.D > 1 and c.scale != 0:
        # Every logit is about -1e5 or 1e5: the exponent overflows, and finite sentinels win over real keys. It comes
        # from the last coordinate: added first, it would round every later product to its own grain.
        shift = (1e9 if c.dtype == "f64" else 1e5) / scale
        q[..., -1] = pick(rng, -1.0, -1.0, 1.0) * shift**0.5
        k[..., -1] = shift**0.5
    return q, k, v


def _plant(config: Config, rng: Rng, call: Call, q: Array, k: Array, used: Array) -> None:
    """Point half of the query rows at one key: one they see, or one that is hidden from them."""
    scale = config.real_scale
    if scale == 0 or config.flavour in ("flat", "small", "shifted", "wide"):
        return
    edges = np.array([0, config.Lk - 1, *(e - 1 for e in EDGES + FAR_EDGES), *EDGES, *FAR_EDGES])
    for b, h, i in np.ndindex(q.shape[:3]):
        if chance(rng, 0.5):
            continue
        g, seen = h // config.group, call.keys(b, h, i)
        if chance(rng, 0.35):  # a magnet, if there is a key that others see and this row does not
            keys = np.setdiff1d(np.flatnonzero(used[b, g]), seen, assume_unique=True)
            beside = np.intersect1d(keys, np.concatenate([seen - 1, seen + 1]))
            keys = beside if len(beside) and chance(rng, 0.6) else keys
        else:
            common = np.intersect1d(seen, edges)
            own = seen[[0, -1]] if len(seen) else seen
            keys = own if len(own) and chance(rng, 0.4) else common if len(common) else seen
        if len(keys):
            key = k[b, g, pick(rng, *keys)]
            # half of the row stays as drawn: in no real row do all products have one sign, which rounds worst of all
            q[b, h, i] = q[b, h, i] / 2 + key * (pick(rng, 12.0, 20.0, 32.0) / (scale * max(key @ key, 1e-6)))


def _bias_values(config: Config, rng: Rng, spec: Spec) -> torch.Tensor | None:
    kind = spec[0]
    if config.wide is not None:
        return wide_scores.bias(config, rng, spec)
    wide = torch.float64 if config.dtype == "f64" else torch.float32
    if kind == "tensor":
        values = rng.normal(size=spec[1]) * 3
        values[rng.random(spec[1]) < spec[3]] = -np.inf
        return torch.from_numpy(values).to(DTYPES[spec[2]])
    if kind == "alibi":
        return torch.tensor([2.0 ** -(8 * (h + 1) / max(1, config.Hq)) for h in range(config.Hq)], dtype=wide)
    if kind == "relative":
        return torch.from_numpy(rng.normal(size=(config.Hq, 2 * spec[1] + 1)) * 3).to(wide)
    if kind == "t5":
        return torch.from_numpy(rng.normal(size=(config.Hq, spec[1])) * 3).to(wide)
    return None


def _oracle_bias(spec: Spec, values: Array | None) -> Spec:
    return spec if values is None else (spec[0], values, *spec[2:])


def _wide(x: torch.Tensor, kind: Any) -> Array:
    return x.detach().to(torch.float64).numpy().astype(kind)


def _poison_hidden(config: Config, used: Array, q: Array, arrays: tuple[Array, ...]) -> None:
    """Fill the slots of K and V that no row sees."""
    # its own generator: the other values must be the same whatever the poison
    kind, rng = config.poison, np.random.default_rng((config.seed, 8))
    gone = np.argwhere(~used)
    for n, (b, g, j) in enumerate(gone):
        for x in arrays:
            values = poison_values(kind, DTYPES[config.dtype]).to(torch.float64).numpy()
            x[b, g, j] = values[n % len(values)]
        if kind == "magnet" and q.shape[2]:  # finite, and far more attractive than any real key
            row = q[b, g * config.group, rng.integers(q.shape[2])]
            arrays[0][b, g, j] = row * (60 / (config.real_scale or 1) / max(row @ row, 1e-6))


def _seed(config: Config) -> int:
    """What a call with dropout draws right after torch.manual_seed(config.seed)."""
    if not config.dropout_p:
        return 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return int(torch.randint(2**63 - 1, ()))


def _used(config: Config, call: Call, layout: dict[str, str]) -> Array:
    """The slots (B, Hkv, Lk) of keys and values that some row sees, or that lie where such a slot lies."""
    used = np.zeros((config.B, config.Hkv, config.Lk), bool)
    for b, h, i in np.ndindex(*call.geo[:3]):
        used[b, h // config.group, call.keys(b, h, i)] = True
    if "expand_batch" in (layout["k"], layout["v"]):
        used[:] = used.any(0, keepdims=True)
    if "expand_heads" in (layout["k"], layout["v"]):
        used[:] = used.any(1, keepdims=True)
    return used


def _plant_and_poison(
    config: Config, rng: Rng, call: Call, layout: dict[str, str], used: Array, values: list[torch.Tensor | None]
) -> None:
    """Needles and magnets among the queries, and poison in everything that must not be read."""
    c, q, k = config, call.q, call.k
    if not layout["q"].startswith("expand"):
        _plant(c, rng, call, q, k, used)
        for at in np.ndindex(*call.geo[:3]):
            if not len(call.keys(*at)) and chance(rng, 0.5):
                q[at] = 0 if c.poison == "zero" else np.nan  # it is 0 whatever its query holds
    _poison_hidden(c, used, q, (k,) if c.v_in_k else (k, call.v))
    if c.visible_nan and used.any() and not layout["k"].startswith("expand") and not c.v_in_k:
        b, g, j = pick(rng, *np.argwhere(used))
        k[b, g, j, rng.integers(c.D)] = np.nan
    for spec, x in zip(c.bias, values, strict=True):
        if spec[0] == "tensor" and x is not None:
            _poison_bias(x, call, 0.0 if c.poison == "zero" else torch.nan)


def sinks_of(config: Any, rng: Rng) -> torch.Tensor:
    """A sink for each query head, some of them -inf."""
    drawn = rng.normal(size=config.Hq) * 3
    drawn[rng.random(config.Hq) < 0.15] = -np.inf
    drawn = drawn if config.wide is None else wide_scores.sinks(config, rng)
    return torch.from_numpy(drawn).to(DTYPES[config.sinks])


def materialise(config: Config) -> Inputs:
    """Draw the tensors of a configuration; the same ones every time."""
    c, rng = config, np.random.default_rng((config.seed, 7))
    dtype, kind = DTYPES[c.dtype], np.longdouble if c.dtype == "f64" else np.float64
    q, k, v = _draw(c, rng)
    layout = {name: c.layouts.get(name, "dense") for name in ("q", "k", "v", "dout", "mask")}
    q, k, v = (_share(x, layout[name]) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    if c.v_in_k:
        layout["v"] = layout["k"]
    values = [_bias_values(c, rng, spec) for spec in c.bias]
    specs = [_oracle_bias(s, None if x is None else _wide(x, kind)) for s, x in zip(c.bias, values, strict=True)]
    call = Call(q, k, v, query_positions(c), c.real_scale, c.mask, tuple(specs), c.softcap)

    used = _used(c, call, layout)
    _plant_and_poison(c, rng, call, layout, used, values)
    tq = lay(torch.from_numpy(q).to(dtype), layout["q"], c.poison)
    tk = lay(torch.from_numpy(k).to(dtype), layout["k"], c.poison)
    tv = tk[..., : c.Dv] if c.v_in_k else lay(torch.from_numpy(v).to(dtype), layout["v"], c.poison)
    values = [x if x is None else lay(x, layout["mask"], c.poison) for x in values]
    leaves = {"q": tq, "k": tk, "v": tv}
    leaves |= {f"bias{n}": x for n, x in enumerate(values) if x is not None}
    if c.sinks is not None:
        leaves["sinks"] = sinks_of(c, rng)
    mask = qkv_mask(c.mask)
    if isinstance(mask, torch.Tensor):
        mask = lay(mask, layout["mask"])
    dout = _share(rng.normal(size=(c.B, c.Hq, c.Lq, c.Dv)), layout["dout"])
    dlse = torch.from_numpy(rng.normal(size=(c.B, c.Hq, c.Lq))).to(torch.float64 if c.dtype == "f64" else torch.float32)
    wide = [None if x is None else _wide(x, kind) for x in values]
    judge = Call(
        *(_wide(x, kind) for x in (tq, tk, tv)),
        positions=call.positions,
        scale=kind(c.real_scale),
        mask=c.mask,
        bias=tuple(_oracle_bias(s, x) for s, x in zip(c.bias, wide, strict=True)),
        softcap=c.softcap,
        sinks=_wide(leaves["sinks"], kind) if "sinks" in leaves else None,
        exact=c.wide is not None,
        dropout_p=c.dropout_p,
        seed=_seed(c),
        _keys=call._keys,
    )
    return Inputs(
        config=c,
        q=tq,
        k=tk,
        v=tv,
        mask=mask,
        bias=[qkv_bias(s, x) for s, x in zip(c.bias, values, strict=True)],
        leaves=leaves,
        dout=lay(torch.from_numpy(dout).to(dtype), layout["dout"], c.poison),
        dlse=dlse,
        oracle=judge,
        hidden=~used,
    )


def _poison_bias(x: torch.Tensor, call: Call, poison: float) -> None:
    """Poison in every bias entry that belongs only to pairs the mask hides; entries of -inf stay."""
    seen = np.zeros(call.geo, bool)
    for b, h, i in np.ndindex(*call.geo[:3]):
        seen[b, h, i] = visible(call.mask, b, h, i, int(call.positions[b, i]), np.arange(call.geo.Lk), call.geo)
    shape = (1,) * (4 - x.ndim) + tuple(x.shape)
    needed = torch.from_numpy(seen)
    for axis, size in enumerate(shape):
        if size == 1:
            needed = needed.any(axis, keepdim=True)
    x[~needed.reshape(x.shape) & (x != -torch.inf)] = poison
