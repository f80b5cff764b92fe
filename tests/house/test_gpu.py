"""The command of the GPU, on a CPU and in small, so that it runs where no GPU is. `make gpu-test` is the whole of it.

Wrong code that dies here: a command that passes whatever a backend returns, one that ends with a part,
inputs that lose their strides, their poison or their shared storage on the way to a device.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qkv.backends.tiled import forward
from tests.gates import gpu, gpu_parts
from tests.kit.cases import case
from tests.kit.device import moved
from tests.kit.generator import random_config
from tests.kit.inputs import materialise

SMALL = ["--device", "cpu", "--processes", "0", "--seconds", "600", "--seed", "11"]


def told(*arguments: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    return gpu.main([*SMALL, *arguments], lines.append), lines


def test_a_small_part_passes() -> None:
    parts = [name for name in gpu_parts.PARTS if name not in ("compile", "models", "observe", "watch")]
    code, lines = told("--cases", "6", "--calls", "6", "--only", *parts, "cases", "calls")
    assert code == 0, "\n".join(lines)
    assert not [line for line in lines if "FAULT" in line]
    assert {line.split("  ")[0] for line in lines} >= {*parts, "named cases", "generated calls"}


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forward.steady_matmul
    monkeypatch.setattr(forward, "steady_matmul", lambda *a, **b: right(*a, **b) * 1.001)
    code, lines = told("--cases", "3", "--only", "cases")
    assert code == 1
    faults = [line for line in lines if "FAULT" in line]
    assert any("tiled: out" in line and '--case "self"' in line for line in faults)
    assert not any("reference" in line for line in faults)


def test_an_error_is_a_finding_of_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str) -> Iterator[tuple[str, str]]:
        yield "first", ""
        raise ValueError("gone")

    monkeypatch.setitem(gpu_parts.PARTS, "merge", broken)
    code, lines = told("--only", "merge", "plan")
    assert code == 1
    assert any("FAULT after 1: ValueError: gone" in line for line in lines)
    assert any(line.startswith("plan ") for line in lines)


def test_inputs_keep_their_layout_on_the_way() -> None:
    configs = [random_config(seed) for seed in range(60)]
    configs += [case("absorbed latent")]  # v is a view of k
    for config in configs:
        here = materialise(config)
        there = moved(here, "cpu")
        for name, leaf in here.leaves.items():
            mine = there.leaves[name]
            assert (mine.stride(), mine.storage_offset(), mine.dtype) == (
                leaf.stride(),
                leaf.storage_offset(),
                leaf.dtype,
            )
            assert torch.equal(whole(mine), whole(leaf))
            assert not leaf.numel() or mine.data_ptr() != leaf.data_ptr()
        assert (there.k.data_ptr() == there.v.data_ptr()) == (here.k.data_ptr() == here.v.data_ptr())
        assert [type(term) for term in there.bias] == [type(term) for term in here.bias]


def whole(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's storage, what lies in its gaps included."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def test_the_command_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines: list[str] = []
    assert gpu.main(["--seed", "1"], lines.append) == 1
    assert "sees no GPU" in lines[0]
