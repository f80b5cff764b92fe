"""Heads that tensor parallelism divides among ranks: which of them are here, and what every rank has a share in."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from qkv import _torch
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError

FIX = "Parallelize the layer with qkv.distributed.HeadParallel()"


class Divided(NamedTuple):
    """Ranks that hold a layer's heads in order, as many each.

    What the heads of all ranks are made of or share (a norm's weight, one key for all heads) gets only a share of its
    gradient from those that are here. `summed` and `shared` are where it gets the rest.
    """

    mesh: Any  # a DeviceMesh of one dimension
    prepared: bool  # by HeadParallel: modules that heads share hold DTensors, and nothing else is done to them

    @property
    def ranks(self) -> int:
        """How many there are."""
        return int(self.mesh.size())

    def summed(self, t: Tensor) -> Tensor:
        """t, or the part of a DTensor that is here; its gradient is the sum of all ranks' gradients."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        here = t.to_local() if isinstance(t, DTensor) else t
        whole = DTensor.from_local(here, self.mesh, [Replicate()], run_check=False)
        found: Tensor = whole.to_local(grad_placements=[Partial()])
        return found

    def shared(self, module: nn.Module, x: Tensor) -> Tensor:
        """module(x) on what belongs to the heads of this rank, for a module that all heads share."""
        known = dict(module.named_parameters())
        if not self.prepared and any(map(_torch.is_distributed, known.values())):
            return module(x)  # type: ignore[no-any-return]  # a style of the user's own, which sees to its gradients
        found: Tensor = functional_call(module, {name: self.summed(p) for name, p in known.items()}, (x,))
        return found

    def mean(self, t: Tensor) -> Tensor:
        """The mean over the ranks, without gradients."""
        from torch.distributed import all_reduce

        found = t.detach().clone()
        all_reduce(found, group=self.mesh.get_group())
        return found / self.ranks

    def own(self, t: Tensor, dim: int, total: int) -> Tensor:
        """The heads of this rank out of those in t; t itself where it has no others."""
        here = total // self.ranks
        if _torch.is_distributed(t):  # a parameter that is divided already
            t = t.to_local()  # type: ignore[attr-defined]
        if t.shape[dim] != total:
            return t
        return self.summed(t).narrow(dim, self.mesh.get_local_rank() * here, here)

    def keys(self, t: Tensor, heads: int, total: int, branches: int = 1) -> Tensor:
        """Keys or values (B, L, Hkv, D) of all heads as those that the query heads of this rank read."""
        here, group = heads // self.ranks, heads // total
        first = self.mesh.get_local_rank() * here
        t = self.summed(t)
        t = t.unflatten(2, (branches, total))
        if here % group == 0 or group % here == 0:  # whole groups, or a part of one
            t = t.narrow(3, first // group, max(here // group, 1))
        else:
            t = t[:, :, :, [head // group for head in range(first, first + here)]]
        chosen: Tensor = t.flatten(2, 3)
        return chosen


def divided(call: str, layer: Any, projection: str, here: int) -> Divided | None:
    """The ranks among which a layer's query heads are divided; None where all are here.

    `projection` names the one that made the `here` heads of queries. The ranks are those of its weight, a DTensor.
    """
    mesh, total = layer.head_mesh, layer.num_heads
    if mesh is None:
        if here == total:
            return None
        weight = getattr(getattr(layer, projection), "weight", None)
        mesh = weight.device_mesh if _torch.is_distributed(weight) else None  # type: ignore[union-attr]
        if mesh is None or mesh.ndim != 1:
            rule = f"{projection} must give the queries of all heads, or be divided among ranks by parallelize_module"
            raise ShapeError.of(call, rule, f"{here} heads where num_heads={total}", FIX)
    if total % mesh.size() or here * mesh.size() != total:
        raise indivisible(call, "num_heads", total, mesh.size())
    return Divided(mesh, layer.head_mesh is not None)


def indivisible(call: str, name: str, total: int, ranks: int) -> ArgumentError:
    """The error for heads that cannot be divided among so many ranks."""
    fits = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
    rule = f"tensor parallelism divides whole heads, as many to each rank: {name} must be a multiple of the ranks"
    return ArgumentError.of(call, rule, f"{name}={total} and {ranks} ranks", f"Use a mesh of {fits} ranks")


def by_head(call: str, name: str, out: Any, width: int, total: int) -> Tensor:
    """What a projection gave, (B, L, heads of it that are here, width); it has `total` on all ranks."""
    if _torch.is_distributed(out):
        fix = "Leave use_local_output of its style at True, or use qkv.distributed.HeadParallel()"
        raise ArgumentTypeError.of(call, "projections must give plain tensors", f"a DTensor from {name}", fix)
    found: Tensor = out
    if found.shape[-1] % width:
        rule = f"{name} must give whole heads of {width} numbers: a rank holds all of a head or nothing of it"
        given = f"{found.shape[-1]} numbers a token here, of {total} heads"
        raise ArgumentError.of(call, rule, given, f"{FIX}, on a mesh of ranks that divide the heads")
    by_heads: Tensor = found.unflatten(-1, (found.shape[-1] // width, width))
    return by_heads


def read_by(
    call: str, layer: Any, ranks: Divided | None, k: Tensor, v: Tensor, branches: int = 1
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, L, heads, width) of the heads that this rank's queries read; an error if some are not here.

    Both of all heads, or both divided as the queries are: then each rank has whole groups. Heads of several branches
    stand one branch after the other, so a rank's are not next to each other, and what was divided cannot be right.
    """
    total, found = layer.num_kv_heads, (k.shape[2], v.shape[2])
    if found == (total * branches, total * branches):
        if ranks is None or ranks.ranks == 1:
            return k, v
        return ranks.keys(k, layer.num_heads, total, branches), ranks.keys(v, layer.num_heads, total, branches)
    if ranks is not None and branches == 1 and found[0] == found[1] and found[0] * ranks.ranks == total:
        return k, v
    given = f"num_heads={layer.num_heads}, num_kv_heads={total}, and {found[0]} heads of keys, {found[1]} of values"
    given += " here" if ranks is None else f" on one of {ranks.ranks} ranks"
    rule = "k_proj and v_proj must give the heads that the queries of their rank read, or both of them all heads"
    raise ShapeError.of(call, rule, given, FIX)


def gates_of(call: str, layer: Any, ranks: Divided | None, gates: Tensor, here: int) -> Tensor:
    """The gates (B, L, heads, ...) of the heads that are here."""
    if ranks is not None:
        gates = ranks.own(gates, 2, layer.num_heads)
    if gates.shape[2] != here:
        rule, given = "gate_proj must give the gates of the heads that are here", f"{gates.shape[2]} and {here} heads"
        raise ShapeError.of(call, rule, given, FIX)
    return gates


def joined(call: str, layer: Any, ranks: Divided | None, heads: Tensor) -> Tensor:
    """o_proj of the heads' outputs (B, L, heads, Dv); an error where it is not divided as they are."""
    o_proj = layer.o_proj
    if ranks is not None and ranks.ranks > 1 and type(o_proj) is nn.Linear and not _by_rows(o_proj.weight):
        given = f"{heads.shape[2]} of {layer.num_heads} heads, and the whole of o_proj"
        rule = "where heads are divided among ranks o_proj must be, too"
        raise ShapeError.of(call, rule, given, f"Give it RowwiseParallel(). {FIX}")
    try:
        out: Tensor = o_proj(heads.flatten(2))
    except RuntimeError as error:
        if not _torch.is_distributed(getattr(o_proj, "weight", None)):
            raise
        rule, given = "o_proj must take the heads that are here", f"{heads.shape[2]} of {layer.num_heads} ({error})"
        raise ShapeError.of(call, rule, given, FIX) from error
    return out


def _by_rows(weight: Any) -> bool:
    return _torch.is_distributed(weight) and any(p.is_shard(1) for p in weight.placements)


def key_heads(layer: Any) -> int:
    """Key/value heads that a rank's cache holds for a layer: what its own query heads read.

    Parameters
    ----------
    layer : qkv.nn.Attention or qkv.nn.SparseAttention
        Parallelized or not.

    Returns
    -------
    int

    Examples
    --------
    >>> import qkv
    >>> key_heads(qkv.nn.Attention(64, 8, num_kv_heads=2))
    2
    """
    weight = getattr(layer.q_proj, "weight", None)
    mesh = getattr(weight, "device_mesh", None) if layer.head_mesh is None else layer.head_mesh
    here, group = layer.num_heads // (1 if mesh is None else mesh.size()), layer.num_heads // layer.num_kv_heads
    return int(here // group if here % group == 0 else 1 if group % here == 0 else here)
