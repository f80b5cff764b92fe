"""The patch that makes PyTorch's own function mean `qkv.compat.sdpa` for a while."""

from __future__ import annotations

import contextlib
from types import TracebackType

from qkv.compat import attribute, counting
from qkv.compat.scaled_dot_product import sdpa


class patch_sdpa(contextlib.ContextDecorator):
    """Make `torch.nn.functional.scaled_dot_product_attention` mean `qkv.compat.sdpa` inside a block or a function.

    `torch.nn.MultiheadAttention`, `torch.nn.Transformer*` and every model that calls the function through the module
    then run on qkv, in training and in evaluation. What was there before comes back when the block ends, also by an
    exception. Blocks nest, and one object may be entered again. Printed, the object says how many calls went where
    and why, over all its blocks; `calls` holds the numbers.

    Notes
    -----
    * In evaluation without gradients, `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoderLayer` run fused
      code of PyTorch that never calls the function: inside the block `torch.backends.mha.set_fastpath_enabled(False)`
      holds, and afterwards what held before. Asked for weights (need_weights=True, the default of
      `torch.nn.MultiheadAttention`), PyTorch's layer multiplies matrices by itself: pass need_weights=False, or use
      `qkv.nn.MultiheadAttention`.
    * Names bound before the patch (`from torch.nn.functional import scaled_dot_product_attention`) are not changed,
      nor is `torch._C._nn.scaled_dot_product_attention`.
    * Both settings belong to the whole process: while any thread is inside a block, all threads use qkv and are
      counted, and the last one to leave restores. A function that someone else assigns meanwhile, or the fast path
      switched on, stays as it is.
    * As a decorator it covers the call of a function; what a generator or coroutine runs later is outside.
    * torch.jit.script reads the function's source and cannot compile `sdpa`: script outside of the block.

    Cost: microseconds to enter and leave, and one or two a call for the count.

    Examples
    --------
    >>> import torch, qkv.compat
    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    >>> x = torch.randn(2, 10, 32)
    >>> with torch.no_grad(), qkv.compat.patch_sdpa() as patched:
    ...     y = layer(x)
    >>> sum(patched.calls.values())
    1

    >>> @qkv.compat.patch_sdpa()
    ... def step(model, x):
    ...     return model(x)
    """

    def __init__(self) -> None:
        self._calls = counting.Calls()

    @property
    def calls(self) -> dict[str, int]:
        """Calls by where they went: the name of a backend of qkv, "PyTorch", or "graph" for a tracer's record."""
        found: dict[str, int] = {}
        for (where, _), n in self._calls.found.items():
            found[where] = found.get(where, 0) + n
        return found

    def __str__(self) -> str:
        return str(self._calls)

    def __enter__(self) -> patch_sdpa:
        attribute.put(sdpa)
        counting.begin(self._calls)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        counting.end(self._calls)
        attribute.take_back(sdpa)
