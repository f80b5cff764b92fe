"""Everything private of torch that qkv uses, by names that say what it is for; and which torch that needs.

No other file of qkv touches a private name of torch (a test looks). All of it was tried on 2.9.1, 2.13.0 and 2.14.1.

The floor is the oldest release on which the tests are known to pass. On 2.5.1 and 2.7.1 those of attention and of its
gradients do, but torch.compile cannot trace masks that are made inside a graph; 2.8 was not tried.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from qkv.errors import VersionError

FLOOR = (2, 9)

with warnings.catch_warnings():
    # torch tells at its own import that NumPy is not there. Nothing here needs NumPy, so it is not ours to pass on.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch
    from torch import Tensor


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version.

    >>> release("2.13.0+cpu"), release("2.15.0a0+git1234")
    ((2, 13), (2, 15))
    """
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def check(version: str) -> None:
    """Raise VersionError for a torch older than the floor."""
    if release(version) < FLOOR:
        needed = ".".join(map(str, FLOOR))
        fix = f"Use pip install 'torch>={needed}'"
        raise VersionError.of("import qkv", f"torch {needed} or newer is needed", f"torch {version}", fix)


check(torch.__version__)

# What follows is bound once, with a torch that has passed the check: the first few are asked in every call.
import torch._functorch.utils  # noqa: E402
import torch.jit._trace  # noqa: E402
import torch.utils._python_dispatch  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many TorchDispatchModes are active."""
under_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether the call is inside of torch.vmap or a transform of torch.func."""
recording: Callable[[], bool] = torch._C._is_tracing
"""Whether torch.jit.trace records, which would keep the numbers of this one call."""
transformed: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a transform of torch.func follows the tensor."""
follows_gradient: Callable[[Tensor], bool] = torch._C._functorch.is_gradtrackingtensor
unwrapped: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped
forward_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level")
"""The level of forward-mode differentiation; below 0 where none is open. Calls no Python."""
compiler_loaded: Callable[[], bool] = partial(sys.modules.__contains__, "torch._dynamo")
"""Whether anything may be compiled: torch.compile loads its tracer when it is first used."""
onnx_loaded: Callable[[], bool] = partial(sys.modules.__contains__, "torch.onnx._internal.exporter._flags")
"""Whether torch.onnx may be making a graph by way of torch.export; `exporting_onnx` says whether it is."""
without_transforms = torch._C._DisableFuncTorch
without_torch_function = torch._C.DisableTorchFunctionSubclass
below_autograd = torch._C._AutoDispatchBelowAutograd
"""A block in which the dispatcher starts behind autograd."""
keys_below_autograd = torch._C._after_autograd_keyset
builtin_sdpa: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention
"""PyTorch's function itself: the attribute of torch.nn.functional may be patched."""
FUSED = {"layer": "_transformer_encoder_layer_fwd", "attention": "_native_multi_head_attention"}
"""Attributes of torch that hold the fused functions of its Transformer layers in evaluation."""
without_modes = torch.utils._python_dispatch._disable_current_modes
jit_tracing = torch.jit._trace.is_tracing
"""torch.jit.is_tracing, under a name that type checkers know."""
_PLAIN = Tensor.__torch_dispatch__


def forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_level() >= 0


def has_tangent(t: Tensor) -> bool:
    """Whether forward mode follows the tensor; only inside of a level."""
    return forward_ad.unpack_dual(t).tangent is not None


def stands_in(t: Any) -> bool:
    """Whether it is a tensor in name only, such as a tracer's: its operators are not PyTorch's own."""
    return getattr(type(t), "__torch_dispatch__", _PLAIN) is not _PLAIN


def is_distributed(t: Any) -> bool:
    """Whether it is a DTensor; asked by name, since most programs never import those."""
    kind = type(t)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed.")


def for_graph(t: Any) -> bool:
    """Whether the class of t only stands for plain tensors while a graph is made."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return type(t) in (FakeTensor, FunctionalTensor)


def outside_transforms() -> AbstractContextManager[Any]:
    """A block that computes as if no transform of torch.func were active: for what none of them follows."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def exporting_onnx() -> bool:
    """Whether torch.onnx makes a graph by way of torch.export."""
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return bool(getattr(flags, "_is_onnx_exporting", False))


def register_tuple(kind: type, name: str) -> None:
    """Let graphs return a NamedTuple; torch.export.save writes it by this name, and who has imported qkv reads it."""
    torch.utils._pytree._register_namedtuple(kind, serialized_type_name=name)


@contextmanager
def with_autograd() -> Iterator[None]:
    """Autograd at work, also in an operator's own code: the dispatcher has passed it there and excludes it."""
    keys, excluded = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with torch.enable_grad(), excluded(keys.AutogradFunctionality, False), excluded(keys.ADInplaceOrView, False):
        yield


def hooks_of(module: torch.nn.Module) -> list[Any]:
    """The hooks that are called with a module."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for kind in kinds for hook in kind.values()]


def hooks_of_all() -> list[Any]:
    """The hooks that are called with every module."""
    known = torch.nn.modules.module
    names = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return [hook for name in names for hook in getattr(known, f"_global_{name}").values()]


class SingleLevel(torch.autograd.function._SingleLevelFunction):
    """An autograd function for an operator: the dispatcher has been through torch.func's transforms when it comes here.

    torch.autograd.Function is made for calls from above the dispatcher and would go through them once more.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        with torch._functorch.utils.enable_single_level_autograd_function():
            return super().apply(*args)  # type: ignore[misc]


# PyTorch's older vmap runs a backward pass for several gradients at once: `torch.autograd.grad(...,
# is_grads_batched=True)`, `torch.autograd.functional.jacobian` and `hessian` with `vectorize=True` and
# `gradcheck(check_batched_grad=True)`. It wraps tensors in a way that functions with a rule for torch.vmap do not see:
# they find a tensor without storage and one dimension too few. The newer torch.vmap maps them instead.
def older_vmaps() -> int:
    """How deep the call is in older vmaps; 0 outside of them."""
    found: int = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    return found - 1


def over_samples(function: Callable[..., tuple[Any, ...]], tensors: Sequence[Any], at: int) -> tuple[Any, ...] | None:
    """function(*tensors) over the dimension that the older vmap at this level has hidden in some of the tensors.

    None where it is in none of them: then there is nothing to map.
    """
    hidden = [isinstance(t, Tensor) and torch._C._dispatch_keys(t).has("Batched") for t in tensors]
    if not any(hidden):
        return None
    shown = [torch._remove_batch_dim(t, at, 0, 0) if h else t for t, h in zip(tensors, hidden, strict=True)]
    dims = tuple(0 if h else None for h in hidden)
    found = torch.vmap(lambda *each: function(*each), in_dims=dims)(*shown)
    return tuple(torch._add_batch_dim(t, 0, at) for t in found)
