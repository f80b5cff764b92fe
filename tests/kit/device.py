"""The inputs of a configuration on another device: the same values in the same memory layouts, poison in the gaps."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from tests.kit.cases import qkv_bias, qkv_mask
from tests.kit.inputs import Inputs


class Mover:
    """Copies tensors to a device storage by storage, so that views of one tensor are views of one copy."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._copies: dict[int, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if not storage.nbytes():
            return x.detach().to(self.device)
        if storage.data_ptr() not in self._copies:
            whole = torch.empty(0, dtype=x.dtype).set_(storage, 0, (storage.nbytes() // x.element_size(),), (1,))
            self._copies[storage.data_ptr()] = whole.to(self.device, copy=True)
        return self._copies[storage.data_ptr()].as_strided(x.shape, x.stride(), x.storage_offset())


@dataclass
class OnDevice(Inputs):
    """`Inputs` whose tensors are on a device; what the oracle is asked with stays NumPy's."""

    device: str = "cpu"

    def clean(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dead = torch.from_numpy(self.oracle_seen() == 0)[..., None].to(self.device)
        gone = torch.from_numpy(self.hidden)[..., None].to(self.device)
        k, v = (x.detach().contiguous().masked_fill(gone, 0) for x in (self.k, self.v))
        return self.q.detach().contiguous().masked_fill(dead, 0), k, v


def moved(inputs: Inputs, device: str) -> OnDevice:
    """A copy of the inputs on the device."""
    mover, c = Mover(device), inputs.config
    known: dict[str, Any] = {field.name: getattr(inputs, field.name) for field in fields(Inputs)}
    leaves = {name: mover(x) for name, x in inputs.leaves.items()}
    mask = mover(inputs.mask) if isinstance(inputs.mask, torch.Tensor) else qkv_mask(c.mask, device)
    return OnDevice(
        **known
        | {name: leaves[name] for name in "qkv"}
        | {
            "leaves": leaves,
            "mask": mask,
            "bias": [qkv_bias(spec, leaves.get(f"bias{n}")) for n, spec in enumerate(c.bias)],
            "dout": mover(inputs.dout),
            "dlse": mover(inputs.dlse),
        },
        device=device,
    )
