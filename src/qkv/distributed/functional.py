"""What users call: attention over a sequence that the ranks of a mesh hold together."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qkv import graph
from qkv._torch import forward_mode, has_tangent, under_transform
from qkv.autograd import refuse_captured
from qkv.call.problem import Inputs, Options, Problem
from qkv.call.validate import check_metadata, check_storage, checked
from qkv.checks import shown
from qkv.distributed.agreement import Told, agree, agree_once, contents, together, words_of
from qkv.distributed.machine import known
from qkv.distributed.methods import Call, prepared
from qkv.distributed.planning import METHODS, choose, stays
from qkv.distributed.remembered import remembered
from qkv.distributed.rows import rank_of
from qkv.distributed.shards import Shards, check_shards
from qkv.distributed.transport import Group, check_device, groups_of
from qkv.errors import ArgumentError, ShapeError, UnsupportedError
from qkv.masks import Mask, Sizes
from qkv.merging import OutputWithLse
from qkv.plans import check_backend
from qkv.scores import ScoreTerm, as_bias

CALL = "qkv.distributed.attention()"
_ONCE = "torch.autograd differentiates it once; call it outside of torch.func, torch.vmap and forward mode"


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None = None, *, mesh: DeviceMesh,
    shards: Shards | None = None, key_shards: Shards | None = None, method: str | None = None, positions: Any = None,
    bias: Tensor | ScoreTerm | None = None, scale: float | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, dropout_p: float = 0.0, return_lse: Literal[False] = False, backend: str | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None = None, *, mesh: DeviceMesh,
    shards: Shards | None = None, key_shards: Shards | None = None, method: str | None = None, positions: Any = None,
    bias: Tensor | ScoreTerm | None = None, scale: float | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, dropout_p: float = 0.0, return_lse: Literal[True], backend: str | None = None,
) -> OutputWithLse: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    mesh: DeviceMesh,
    shards: Shards | None = None,
    key_shards: Shards | None = None,
    method: str | None = None,
    positions: Any = None,
    bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | OutputWithLse:
    """`qkv.attention` over sequences whose rows are shared out among the ranks of a mesh: each has some of them.

    Every rank makes the same call with its own rows of q, k and v, and gets the same rows of the result. Masks, biases
    and positions speak of the whole sequence. Ranks exchange only keys that some query of the other may see.

    Parameters
    ----------
    q : Tensor, shape (B, Hq, rows, D)
        The rank's own queries, in the order of `shards`.
    k : Tensor, shape (B, Hkv, rows, D)
        The rank's own keys, in the order of `key_shards`.
    v : Tensor, shape (B, Hkv, rows, Dv)
        Their values.
    mask : Mask or bool Tensor
        As in `qkv.attention`, of the whole sequence, the same on all ranks.
    mesh : DeviceMesh
        The ranks: of one dimension; for "hybrid" of two, (ring, heads), whose ranks hold rows in row-major order.
    shards : Shards
        Which queries each rank holds; contiguous in the order of ranks, as many as q has, unless given.
    key_shards : Shards
        Which keys; the same as the queries' unless given, or contiguous where `shards` is left out.
    method : "ring", "ulysses", "hybrid", "allgather"
        How keys come to queries; by itself it takes what `qkv.distributed.plan` says.
    positions, scale, softcap, dropout_p, return_lse, backend
        As in `qkv.attention`; positions are those of the whole call. Dropout draws other weights than in one process.
    bias : Tensor or score term
        A tensor broadcasts to (B, Hq, rows, Lk): the rank's own queries by all keys.
    sinks : Tensor, shape (Hq,)
        The same on all ranks.

    Returns
    -------
    out : Tensor, shape (B, Hq, rows, Dv)
        In q's dtype: the rank's own rows.
    lse : Tensor, shape (B, Hq, rows)
        Only with return_lse=True.

    Raises
    ------
    ShapeError, ArgumentError, ArgumentTypeError, UnsupportedError
        As `qkv.attention`; tensors that do not fit the shards; ranks that make different calls.
    RankError
        Another rank has died or did not answer within the process group's timeout.

    Notes
    -----
    First derivatives only. Every rank has to run the backward pass that one of them runs, in the same order of calls:
    a rank whose rows are in no loss adds 0 * out.sum() to it. The gradients of what all ranks have in common (sinks, a
    bias's tensors) are each rank's share: their sum over ranks is the gradient, as of every parameter of a model whose
    rows are shared out.
    Cost: the work of the rank's pairs; "ring" and "allgather" receive the keys and values that its queries may see, and
    in the backward pass the same again with their gradients going back in float32; "ulysses" moves q, k, v, out.
    Results are those of one process within the error bounds of one, with the same bits from run to run.
    Source: Liu et al. (2023), Ring Attention; Jacobs et al. (2023), DeepSpeed Ulysses.

    Examples
    --------
    A process alone is a mesh of one rank; `torchrun` makes more of the same program.

    >>> import os, tempfile, torch, qkv, torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> mesh = init_device_mesh("cpu", (1,))
    >>> q = k = v = torch.randn(1, 8, 32, 64)
    >>> out = qkv.distributed.attention(q, k, v, mask=qkv.causal(), mesh=mesh)
    >>> torch.equal(out, qkv.attention(q, k, v, mask=qkv.causal()))
    True
    >>> dist.destroy_process_group()
    """
    options = Options(positions, bias, scale, softcap, sinks, dropout_p, return_lse)
    found = graph.eager(_attend)(q, k, v, mask, mesh, (shards, key_shards), method, options, backend)
    return found if return_lse else found.out


def _attend(
    q: Any, k: Any, v: Any, mask: Any, mesh: Any, shards: tuple[Any, Any], method: Any, options: Options, backend: Any
) -> OutputWithLse:
    groups = groups_of(CALL, mesh)
    with together(groups):
        _check(q, k, v, groups, backend)
        q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
        given = _given(groups, q, k, *shards)
    if given is None:
        lengths = agree(groups, Told.of("shards=None"), (q.shape[2], k.shape[2]))
        given = tuple(_after_another([pair[n] for pair in lengths]) for n in range(2))  # type: ignore[assignment]
        assert given is not None
    with together(groups):
        problem, inputs, bias = _whole(q, k, v, mask, options, *given)
        _refuse(inputs, bias)
        chosen = _method(groups, method, problem, *given)
        call = Call(problem, inputs, bias, options, *given, chosen, backend)
        ready = prepared(call, groups)
        told = _told(call)
    agree_once(groups, told)
    for group in groups:
        group.connect(q.device)
    out, lse, _ = ready()
    return OutputWithLse(out, lse)  # type: ignore[arg-type]


def _check(q: Any, k: Any, v: Any, groups: tuple[Group, ...], backend: Any) -> None:
    """What can be said of a rank's tensors without the others."""
    check_backend(CALL, backend)
    check_metadata(CALL, q, k, v)
    check_storage(CALL, q, k, v)
    if under_transform():
        rule = "no transform of torch.func can follow it"
        raise UnsupportedError.of(CALL, rule, "a call inside of one", _ONCE)
    for group in groups:
        check_device(CALL, group, q)


def _given(
    groups: tuple[Group, ...], q: Tensor, k: Tensor, shards: Any, key_shards: Any
) -> tuple[Shards, Shards] | None:
    """Who holds which queries and keys, checked against the rank's own tensors; None where all have to be asked."""
    ranks, rank = prod(group.size for group in groups), rank_of(groups)
    for name, given in (("shards", shards), ("key_shards", key_shards)):
        if given is not None:
            check_shards(CALL, name, given, ranks)
    if shards is None:
        if key_shards is not None:
            fix = "Pass shards, too: which queries each rank holds"
            raise ArgumentError.of(CALL, "key_shards are given beside shards", "shards=None", fix)
        return None
    keys = shards if key_shards is None else key_shards
    for name, x, of in (("q", q, shards), ("k", k, keys)):
        if x.shape[2] != of.rows(rank):
            rule = f"{name} must hold the rows that its shards say"
            given = f"{name} {tuple(x.shape)} on rank {rank}, whose shards have {of.rows(rank)} rows"
            fix = (
                "Take a rank's rows with qkv.distributed.shard(x, shards, mesh); keys of another length need key_shards"
            )
            raise ShapeError.of(CALL, rule, given, fix)
    return shards, keys


def _after_another(lengths: list[int]) -> Shards:
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    return Shards([[pair] for pair in pairwise(ends)])


def _whole(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Options, rows: Shards, keys: Shards
) -> tuple[Problem, Inputs, ScoreTerm | None]:
    """The call as one process would make it: its sizes are the whole sequence's, its tensors the rank's own."""
    size = (*q.shape[:2], k.shape[1], keys.length, v.shape[3])
    problem, inputs = checked(CALL, (q, k, v), size, rows.length, mask, options._replace(bias=None))
    if options.bias is None:
        return problem, inputs, None
    bias = as_bias(options.bias, CALL)
    assert bias is not None
    bias.check(CALL, Sizes(problem.B, problem.Hq, q.shape[2], problem.Lk, q.dtype, q.device))
    if options.positions is None and problem.Lq != problem.Lk and bias.depends_on_position:
        checked(CALL, (q, k, v), size, rows.length, mask, options)  # says how
    bias = bias.lowered(q.device)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in bias.tensors())
    return replace(problem, bias=bias.specs(), needs_grad=problem.needs_grad or learns), inputs, bias


def _refuse(inputs: Inputs, bias: ScoreTerm | None) -> None:
    """What would lose a derivative without a word."""
    refuse_captured(bias, inputs.q.device)
    given = inputs.q, inputs.k, inputs.v, inputs.sinks, *(() if bias is None else bias.tensors())
    if forward_mode() and any(has_tangent(t) for t in given if t is not None):
        raise UnsupportedError.of(CALL, "forward mode cannot follow it", "tensors with tangents", _ONCE)


def _method(groups: tuple[Group, ...], method: Any, problem: Problem, rows: Shards, keys: Shards) -> str:
    """The method that was asked for, if it can be had, else the one that costs least."""
    if method is None:
        method = choose(problem, rows, keys, [group.size for group in groups], known(groups))
    if method not in METHODS:
        raise ArgumentError.of(CALL, f"method must be one of {METHODS}", f"method={shown(method)}", "Or leave it out")
    if (method == "hybrid") != (len(groups) == 2):
        given = f"method={method!r} and a mesh of {len(groups)} dimension(s)"
        fix = "Pass a 2-D mesh (ring, heads) for hybrid, one dimension for the others"
        raise ArgumentError.of(CALL, "hybrid takes a mesh of two dimensions, and no other method does", given, fix)
    if (why := stays(problem, method, rows)) is not None:
        given = f"method={method!r} and bias of {[term.shape for term in problem.bias]}"
        fix = "Use method='ring' or 'allgather' on a mesh of one dimension, or a bias of shape (B, Hq, 1, Lk)"
        raise UnsupportedError.of(CALL, why, given, fix)
    return str(method)


def _told(call: Call) -> Told:
    """All that has to be the same on all ranks."""
    p, bias = call.problem, call.bias
    learns = torch.is_grad_enabled()
    given = [t for t in (call.inputs.q, call.inputs.k, call.inputs.v) if t.requires_grad]
    common = [t for t in (call.inputs.sinks, *(() if bias is None else bias.tensors())) if t is not None]
    flags = learns and bool(given), learns and any(t.requires_grad for t in common)
    told = _words(p, call.rows, call.keys, call.method, call.backend, flags)
    where = call.inputs.positions
    return told if where is None else Told.of(f"{told.text} {contents(where)}")


@remembered(256)
def _words(
    p: Problem, rows: Shards, keys: Shards, method: str, backend: str | None, gradients: tuple[bool, bool]
) -> Told:
    bias = [(term.kind, len(term.shape)) for term in p.bias]
    return Told.of(
        f"method={method} q (B={p.B}, Hq={p.Hq}, Lq={p.Lq}, D={p.D}) k (Hkv={p.Hkv}, Lk={p.Lk}, Dv={p.Dv}) {p.dtype} "
        f"mask={words_of(p.mask)} positions={p.positions} scale={p.scale} softcap={p.softcap} "
        f"bias={bias} sinks={p.has_sinks} dropout_p={p.dropout_p} return_lse={p.needs_lse} "
        f"gradients of (q, k, v) and (sinks, bias)={gradients} "
        f"backend={backend} shards={rows.ranges} keys={keys.ranges}"
    )
