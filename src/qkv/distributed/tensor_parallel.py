"""Tensor parallelism of qkv's layers: their heads divided among ranks, as a style for `parallelize_module`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from qkv import _torch
from qkv.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from qkv.nn.attention import Attention
from qkv.nn.divided import indivisible
from qkv.nn.latent import LatentAttention
from qkv.nn.layer import Layer
from qkv.nn.sparse import SparseAttention

_CALL = "qkv.distributed.HeadParallel()"


class HeadParallel(ParallelStyle):
    """Divide the heads of a layer of `qkv.nn` among the ranks of a mesh, for `parallelize_module`.

    ::

        rank r of n:  q = x W_Q[heads of r]      k, v of the key/value heads that those read
                      out = attention(q, k, v) W_O[rows of r], the sum over ranks

    Parameters
    ----------
    input_layouts : Placement
        How x is given, and a context: Replicate() unless given, the same on all ranks. Shard(1) for rows of the
        sequence, as they are between layers under sequence parallelism.
    output_layouts : Placement
        What becomes of the sum: Replicate() unless given; Shard(1) leaves each rank its rows of it.

    Raises
    ------
    ArgumentError
        When it is applied: heads that the ranks do not divide, a mesh of several dimensions.
    ArgumentTypeError, UnsupportedError
        When it is applied: a module that is no layer of `qkv.nn`, or one whose heads cannot be divided.

    Notes
    -----
    It divides weights as follows, and does what a plan of one style a projection leaves to its writer: norms, sinks
    and whatever else all heads share get the sum of the ranks' gradients, gates and sinks are those of the heads here,
    and fewer key/value heads than ranks are computed on each rank that reads them.

    =================  =====================================================================================
    layer              divided; all else is whole on each rank
    =================  =====================================================================================
    Attention          q_proj, gate_proj, sinks, o_proj; k_proj and v_proj where the ranks divide Hkv
    LatentAttention    q_proj or q_b_proj, kv_b_proj, o_proj: the latent is one for all heads
    SparseAttention    q_proj, gate_proj, o_proj; k_proj and v_proj with shared_kv. The ranks must divide Hkv
    =================  =====================================================================================

    A plan of PyTorch's own styles, {"q_proj": ColwiseParallel(), ..., "o_proj": RowwiseParallel()}, works on the layers
    as well; where it would not give what one process gives, the layer raises an error that says so. A rank's cache
    holds the heads that its queries read: `qkv.distributed.key_heads(layer)` of them.

    Cost: one all-reduce of (B, L, dim) forward and one backward; a norm's weight, one of its size. Each projection
    costs 1 / ranks of its FLOPs where it is divided.
    Source: Shoeybi et al. (2019), Megatron-LM, arXiv 1909.08053; layouts by rows: Korthikanti et al. (2022), arXiv
    2205.05198.

    Examples
    --------
    >>> from torch.distributed.tensor import Shard
    >>> HeadParallel(output_layouts=Shard(1))
    HeadParallel(input_layouts=Replicate(), output_layouts=Shard(dim=1))

    In a program that torchrun started, of a model with such layers::

        mesh = init_device_mesh("cpu", (4,))
        parallelize_module(model, mesh, {"blocks.*.attention": HeadParallel()})
    """

    def __init__(self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = Replicate() if input_layouts is None else input_layouts
        self.output_layouts = Replicate() if output_layouts is None else output_layouts

    def __repr__(self) -> str:
        return f"HeadParallel(input_layouts={self.input_layouts!r}, output_layouts={self.output_layouts!r})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _checked(module, device_mesh)
        styles = _styles(layer, device_mesh.size())
        for name, child in list(layer.named_children()):
            style = styles.get(name, _Whole())
            if name == "o_proj":
                style = RowwiseParallel(output_layouts=self.output_layouts)
            before = _torch.hooks_of(child)
            for part in child.children() if name == "indexer" else [child]:
                style.src_data_rank = self.src_data_rank
                style._apply(part, device_mesh)
            if name == "kv_b_proj":
                child.__dict__["head_hooks"] = [hook for hook in _torch.hooks_of(child) if hook not in before]
        if getattr(layer, "sinks", None) is not None:
            _divide(layer, "sinks", device_mesh, Shard(0), self.src_data_rank)
        layer.head_mesh = device_mesh
        enter = partial(_enter, device_mesh, self.input_layouts)
        layer.register_forward_pre_hook(enter, with_kwargs=True)  # after those that are there: PrepareModuleInput's
        return layer


class _Whole(ParallelStyle):
    """A module that every rank computes as a whole, on the same input, with the whole gradient of its output."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _replicate(module, device_mesh, self.src_data_rank)
        return distribute_module(module, device_mesh, input_fn=_give, output_fn=_take)


class _Shared(ParallelStyle):
    """A module that each rank applies to its heads: the layer calls it with `Divided.shared`."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _replicate(module, device_mesh, self.src_data_rank)
        return module


def _styles(layer: Layer, ranks: int) -> dict[str, ParallelStyle]:
    """How the modules of a layer are divided; `_Whole` where nothing is said."""
    divided = ["q_b_proj" if getattr(layer, "q_lora_rank", None) is not None else "q_proj"]
    shared: list[str] = []
    if isinstance(layer, LatentAttention):
        divided.append("kv_b_proj")
    elif isinstance(layer, Attention):
        divided += ["gate_proj", *(["k_proj", "v_proj"] if layer.num_kv_heads % ranks == 0 else [])]
        shared = ["q_norm", "k_norm"]
    elif isinstance(layer, SparseAttention):
        divided += ["gate_proj", *(["k_proj", "v_proj"] if layer.shared_kv else [])]
        shared = ["k_compress", "v_compress"]
    return {**{name: ColwiseParallel() for name in divided}, **{name: _Shared() for name in shared}}


def _checked(module: Any, mesh: DeviceMesh) -> Layer:
    """The layer; an error where its heads cannot be divided."""
    if not isinstance(module, (Attention, LatentAttention, SparseAttention)):
        if isinstance(module, nn.MultiheadAttention):
            rule = "one parameter holds the queries, keys and values of a MultiheadAttention, so it cannot be divided"
            fix = (
                "Use qkv.nn.Attention(dim, num_heads, bias=True), with the thirds of in_proj_weight in its projections"
            )
            raise UnsupportedError.of(_CALL, rule, type(module).__name__, fix)
        fix = "Name layers of qkv.nn in the plan, such as {'blocks.*.attention': HeadParallel()}"
        raise ArgumentTypeError.of(_CALL, "it is a style for layers of qkv.nn", type(module).__name__, fix)
    if mesh.ndim != 1:
        given = f"a mesh of {tuple(mesh.shape)}"
        raise ArgumentError.of(_CALL, "heads are divided along one dimension of a mesh", given, 'Pass mesh["tensor"]')
    if module.head_mesh is not None:
        raise ArgumentError.of(_CALL, "a layer is divided once", "one that is already", "Apply one style to a layer")
    ranks = mesh.size()
    if module.num_heads % ranks:
        raise indivisible(_CALL, "num_heads", module.num_heads, ranks)
    if isinstance(module, SparseAttention) and module.num_kv_heads % ranks:  # a group chooses its blocks together
        raise indivisible(_CALL, "num_kv_heads", module.num_kv_heads, ranks)
    return module


def _enter(mesh: DeviceMesh, layout: Placement, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """x and a context as DTensors that every rank holds, so that their gradients are summed once."""

    def whole(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x  # the layer says what is wrong with it
        given = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [layout], run_check=False)
        return given.redistribute(placements=[Replicate()])

    named = {name: whole(kwargs[name]) for name in ("x", "context") if name in kwargs}
    return tuple(map(whole, args)), {**kwargs, **named}


def _give(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return tuple(
        x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs
    )


def _take(module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
    return outputs.to_local()


def _replicate(module: nn.Module, mesh: DeviceMesh, src: int | None) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                _divide(part, name, mesh, Replicate(), src)


def _divide(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement, src: int | None) -> None:
    held = getattr(module, name)
    made = distribute_tensor(held, mesh, [placement], src_data_rank=src)
    module.register_parameter(name, nn.Parameter(made, requires_grad=held.requires_grad))
