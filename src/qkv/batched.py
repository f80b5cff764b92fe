"""PyTorch's older vmap, which runs a backward pass for several gradients at once, by the newer torch.vmap.

`torch.autograd.grad(..., is_grads_batched=True)`, `torch.autograd.functional.jacobian` and `hessian` with
`vectorize=True` and `gradcheck(check_batched_grad=True)` wrap tensors in a way that functions with a rule for
torch.vmap do not see: they find a tensor without storage and one dimension too few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def level() -> int:
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
