"""Every malformed mask raises its exact typed error: the rule, what was given, the fix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qkv
from qkv.errors import ArgumentError
from tests.kit.malformed_masks import patterns, ranges, uses

CASES = [*ranges.CASES, *patterns.CASES, *uses.CASES]


@pytest.mark.parametrize(("text", "kind", "message"), CASES, ids=[case[0] for case in CASES])
def test_malformed(text: str, kind: type[qkv.QKVError], message: str) -> None:
    with pytest.raises(kind) as caught:
        eval(text, {"qkv": qkv, "torch": torch})
    assert type(caught.value) is kind
    assert str(caught.value) == message
    assert isinstance(caught.value, (ValueError, TypeError))


def test_no_case_is_listed_twice() -> None:
    assert len({text for text, _, _ in CASES}) == len(CASES) >= 100


@pytest.mark.parametrize("integer", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)])
def test_every_kind_of_integer_is_taken(integer: object) -> None:
    assert qkv.sliding_window(integer) == qkv.sliding_window(3)  # type: ignore[arg-type]
    assert qkv.prefix(integer) == qkv.prefix(3)


@pytest.mark.parametrize(
    "lengths",
    [[3, 5], (3, 5), np.array([3, 5]), torch.tensor([3, 5], dtype=torch.int32), [np.int64(3), torch.tensor(5)]],
    ids=lambda x: type(x).__name__,
)
def test_every_kind_of_list_is_taken(lengths: object) -> None:
    assert qkv.documents(lengths) == qkv.documents([3, 5])
    assert qkv.padding(lengths) == qkv.padding([3, 5])
    assert qkv.prefix(lengths) == qkv.prefix([3, 5])
    assert qkv.documents(segment_ids=lengths) == qkv.documents(segment_ids=[[3, 5]])
    assert qkv.documents(segment_ids=np.array([[3, 5]])) == qkv.documents(segment_ids=[[3, 5]])


def test_a_numpy_mask_is_not_guessed_at() -> None:
    with pytest.raises(qkv.ArgumentTypeError, match=r"torch\.from_numpy"):
        qkv.masks.as_mask(np.ones((2, 2), dtype=bool))


def test_an_error_of_a_mask_mods_function_is_told_with_its_signature() -> None:
    def broken(b: object, h: object, p: object, j: object) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(ArgumentError, match=r"called as fn\(b, h, p, j\).*KeyError: 'mine'") as error:
        qkv.mask_mod(broken).tensor(2, 2)
    assert isinstance(error.value.__cause__, KeyError)


def test_other_torch_functions_refuse_a_mask() -> None:
    t = torch.ones(2, 2, dtype=torch.bool)
    for use in (
        lambda: torch.where(qkv.causal(), t, t),
        lambda: t + qkv.causal(),
        lambda: torch.softmax(qkv.causal(), 0),
    ):
        with pytest.raises(TypeError):
            use()
