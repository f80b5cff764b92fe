"""Training models of transformers on qkv: the gradient of every parameter is eager's, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv.integrations.transformers as adapter
from tests.kit import hf_models as hf

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()
# Gradients are sums over about 80 tokens of products of float32 numbers, which the two implementations add up in
# another order: errors of a few eps (1.2e-7) of the largest number a parameter's gradient is made of. That number is
# at least the largest entry of the gradient; 1e-5 of it leaves room for what two layers do to the error, and the
# mutants below are 100 times outside.
_BOUND = 1e-5


def gradients(
    model: Any, implementation: str, side: str, checkpointing: bool = False, **more: Any
) -> dict[str, Tensor]:
    """The gradients of a random linear function of the logits of real tokens."""
    ids, mask = hf.tokens(), hf.padded(side)
    model.zero_grad()
    with hf.running(model, implementation):
        if checkpointing:
            model.train()
            # transformers 5.23 has this name besides the old one, of which it warns
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        try:
            found = hf.real_rows(model, mask, hf.logits(model, ids, mask, use_cache=False, **more))
            weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(7))
            (found * weights).sum().backward()
        finally:
            if checkpointing:
                getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
                model.eval()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return got


def furthest(found: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest elementwise difference, in units of the parameter's largest gradient, and where it is."""
    assert found.keys() == want.keys()
    sizes = {name: float(g.abs().max()) for name, g in want.items()}
    for name in sizes:
        if name.endswith("key.bias"):  # it moves all scores of a row alike: its gradient is 0 but for rounding
            sizes[name] = max(sizes.values())
    assert min(sizes.values()) > 0
    apart = {name: float((found[name] - g).abs().max()) / sizes[name] for name, g in want.items()}
    worst = max(apart, key=lambda name: apart[name])
    return apart[worst], worst


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", hf.MODELS)
def test_gradients_of_all_parameters_are_those_of_eager(name: str, side: str) -> None:
    model = hf.build(name)
    want = gradients(model, "eager", side)
    apart, where = furthest(gradients(model, "qkv", side), want)
    assert len(want) == len(list(model.parameters()))
    assert apart <= _BOUND, where


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_gradient_checkpointing(name: str) -> None:
    model = hf.build(name)
    want = gradients(model, "eager", "left")
    apart, where = furthest(gradients(model, "qkv", "left", checkpointing=True), want)
    assert apart <= _BOUND, where


def test_gradients_of_packed_sequences() -> None:
    model = hf.build("llama")
    position_ids = torch.cat([torch.arange(n) for n in (11, 3, 26)])[None]
    want = gradients(model, "eager", "none", position_ids=position_ids)
    apart, where = furthest(gradients(model, "qkv", "none", position_ids=position_ids), want)
    assert apart <= _BOUND, where
    together, _ = furthest(gradients(model, "qkv", "none"), want)
    assert together > 100 * _BOUND


def test_dropout_reaches_the_layers_in_training() -> None:
    model = hf.build("llama", attention_dropout=0.5)
    ids = hf.tokens()
    with hf.running(model, "qkv"), torch.no_grad():
        still = [hf.logits(model, ids, None) for _ in range(2)]
        model.train()
        moving = [hf.logits(model, ids, None) for _ in range(2)]
        model.eval()
    assert torch.equal(*still)
    assert (moving[0] - moving[1]).abs().max() > 1e-2


def _cuts_the_graph(part: str) -> Any:
    def wrong(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
        parts = {"q": q, "k": k, "v": v}
        parts[part] = parts[part].detach()
        return adapter.attention_forward(module, parts["q"], parts["k"], parts["v"], mask, **given)

    return wrong


def _no_gradient_of_sinks(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
    return adapter.attention_forward(module, q, k, v, mask, **{**given, "s_aux": given["s_aux"].detach()})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("llama", _cuts_the_graph("q")), ("llama", _cuts_the_graph("k")), ("bert", _cuts_the_graph("v")),
     ("gpt_oss", _no_gradient_of_sinks)],
)  # fmt: skip
def test_wrong_gradients_are_noticed(name: str, wrong: Any) -> None:
    """Each leaves the logits right to the last bit."""
    model = hf.build(name)
    want = gradients(model, "eager", "none")
    with hf.adapted(wrong) as registered:
        found = gradients(model, registered, "none")
    if found.keys() == want.keys():
        apart, _ = furthest(found, want)
        assert apart > 100 * _BOUND
