"""A cache for generate() that grows without copying what it holds at every token."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_LEAST = 64  # slots that a layer begins with, beyond its first tokens


def cache_keyword(model: torch.nn.Module) -> str:
    """The name under which a model takes a cache, by its own signature: "cache", or "past_key_values" before 5.24.

    `generate` takes it by the same name.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from qkv.integrations.transformers import GrowingCache, cache_keyword
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = GrowingCache(config=config)
    >>> out = model(torch.tensor([[1, 2, 3]]), **{cache_keyword(model): cache})
    >>> cache.get_seq_length()
    3
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class GrowingCache(DynamicCache):
    """A `DynamicCache` that doubles its room where it is full, instead of copying all keys for each new token.

    Parameters
    ----------
    config : the model's config, so that layers with a sliding window keep their window only
    others : as for `transformers.DynamicCache`

    Results are those of DynamicCache to the last bit: layers are given a view of what is filled. Beams, cropping and
    speculative decoding work as there. Layers with windows or a state of their own are transformers'. A shallow copy
    (`copy.copy`) is a cache of its own, which reads what both held until either goes on.
    Cost: a token is written once, and copied less than twice in all; memory up to twice what is held.

    >>> import torch
    >>> from qkv.integrations.transformers import GrowingCache
    >>> cache = GrowingCache()
    >>> k, v = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8)
    >>> keys, values = cache.update(k, v, layer_idx=0)
    >>> cache.update(k[:, :, :1], v[:, :, :1], layer_idx=0)[0].shape
    torch.Size([1, 2, 6, 8])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = GrowingLayer
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer

    def __copy__(self) -> GrowingCache:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        # What is no DynamicLayer may write into its state.
        layers = self.layers
        twin.layers = [copy.copy(x) if isinstance(x, DynamicLayer) else copy.deepcopy(x) for x in layers]
        return twin


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values: views of the filled part of two stores."""

    _stores: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones at their end."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found  # autograd keeps what it is given, which must not be written to
        if not self.is_initialized:
            super().update(key_states[:, :, :0], value_states[:, :, :0], *args, **kwargs)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        keys, values, stores = self.keys, self.values, self._stores
        assert keys is not None
        assert values is not None
        held = keys.shape[-2]
        new = held + key_states.shape[-2]
        if stores is None or new > stores[0].shape[-2] or not (_of(keys, stores[0]) and _of(values, stores[1])):
            room = new + max(new, _LEAST)
            self._stores = stores = _roomy(keys, room), _roomy(values, room)
        for store, given in zip(stores, (key_states, value_states), strict=True):
            store[:, :, held:new] = given
        self.keys, self.values = stores[0][:, :, :new], stores[1][:, :, :new]
        return self.keys, self.values

    def __copy__(self) -> GrowingLayer:
        self._stores = None  # what two layers read is written to by neither: each goes on in a store of its own
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def reset(self) -> None:
        self._stores = None
        if self.keys is not None and self.values is not None:  # some releases write zeros, and a copy may read these
            self.keys, self.values = self.keys.clone(), self.values.clone()
        super().reset()


def _of(view: Tensor, store: Tensor) -> bool:
    """Whether `view` is still the beginning of `store`: beams and batch changes put other tensors in its place."""
    return view.data_ptr() == store.data_ptr() and view.stride() == store.stride() and view.shape[:2] == store.shape[:2]


def _roomy(held: Tensor, room: int) -> Tensor:
    B, H, length, D = held.shape
    with torch.inference_mode(False):  # so that it may be written to inside inference mode and outside
        store = torch.empty(B, H, room, D, dtype=held.dtype, device=held.device)
    with torch.no_grad():
        store[:, :, :length] = held
    return store
