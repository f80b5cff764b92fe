"""Watching models of transformers on "qkv", "sdpa" and "eager": no bit changes, and the numbers are the model's own.

Wrong code that dies here: one that sees a call twice or under another layer's name, reads a mask of numbers as weights
or misses softcap, sinks and position bias, or leaves `ALL_ATTENTION_FUNCTIONS` changed.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import qkv
from tests.kit import hf_models as hf

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()

KNOWN = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
NAMES = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "bert", "t5")
_TINY = {"vocab_size": hf.VOCAB, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**_TINY, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()


def model_of(name: str) -> Any:
    return gpt2() if name == "gpt2" else copy.deepcopy(hf.build(name))


def interfaces(name: str) -> list[str]:
    # PyTorch's function has no softcap and no sinks
    return ["qkv", "eager"] if name in ("gpt_oss", "gemma2") else ["qkv", "sdpa", "eager"]


CASES = [(name, one) for name in (*NAMES, "gpt2") for one in interfaces(name)]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_evaluation_and_training_keep_every_bit(name: str, implementation: str) -> None:
    model, ids, mask, before = model_of(name), hf.tokens(length=17), hf.padded("right", length=17), vars(KNOWN).copy()

    def run() -> list[Tensor]:
        model.zero_grad()
        out = hf.logits(model, ids, mask)
        out[mask.bool() if name != "t5" else ...].square().mean().backward()  # type: ignore[union-attr]
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with hf.running(model, implementation):
        want = run()
        with qkv.watch(model) as w:
            found = run()
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
    assert not w.errors
    assert not w.not_seen, w.not_seen
    layers = model.config.num_hidden_layers * (3 if name == "t5" else 1)
    assert len(w.lines) == layers  # each call once, whoever stands below whom
    assert all("#" not in layer and "att" in layer.lower() for layer in w.layers), list(w.layers)
    via = {"qkv": "qkv.attention()", "sdpa": "torch.nn.functional.scaled_dot_product_attention", "eager": "eager"}
    assert {line["via"] for line in w.lines} == {via[implementation]}
    assert vars(KNOWN) == before
    assert not any(line["nan"]["rows"] for line in w.lines)


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_numbers_are_those_of_the_weights_that_eager_returns(name: str, implementation: str) -> None:
    """Of all rows and heads: entropy, with what a sink takes, and the largest weight."""
    model, ids = model_of(name), hf.tokens(length=17)
    with torch.no_grad(), hf.running(model, "eager"):
        given = {"decoder_input_ids": ids} if name == "t5" else {}
        out = model(input_ids=ids, output_attentions=True, **given)
    if name == "t5":
        cross = [x for pair in zip(out.decoder_attentions, out.cross_attentions, strict=True) for x in pair]
        want = [*out.encoder_attentions, *cross]
    else:
        want = list(out.attentions)
    with torch.no_grad(), hf.running(model, implementation), qkv.watch(model) as w:
        model(input_ids=ids, **given)
    assert len(w.lines) == len(want)
    for line, weights in zip(w.lines, want, strict=True):
        p = weights.double()
        rest = (1 - p.sum(-1, keepdim=True)).clamp(min=0)
        if name != "gpt_oss":
            assert rest.max() < 1e-5
            rest = torch.zeros_like(rest)
        every = torch.cat([p, rest], -1)
        entropy = -(every * every.clamp(min=1e-300).log()).sum(-1).mean((0, 2))
        assert torch.allclose(torch.tensor(line["entropy"]).double(), entropy, atol=2e-4), line["layer"]
        largest = p.amax(-1).mean((0, 2))
        assert torch.allclose(torch.tensor(line["weight"]).double(), largest, atol=2e-4), line["layer"]
        if name == "gpt_oss":
            assert torch.allclose(torch.tensor(line["sink"]).double(), rest.mean((0, 2, 3)), atol=2e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_is_no_key(name: str, side: str) -> None:
    """What is padded has no weight; the three interfaces agree on everything but rows that are padding."""
    model, ids, mask = model_of(name), hf.tokens(length=17), hf.padded(side, length=17)
    found = {}
    for implementation in ("qkv", "sdpa", "eager"):
        with torch.no_grad(), hf.running(model, implementation), qkv.watch(model) as w:
            hf.logits(model, ids, mask)
        found[implementation] = w.lines[0]
    for other in ("sdpa", "eager"):
        for key in ("logit",) if side == "left" else ("logit", "entropy", "weight"):
            assert found[other][key] == pytest.approx(found["qkv"][key], abs=1e-4), (other, key)


@pytest.mark.parametrize("implementation", ["qkv", "sdpa", "eager"])
def test_generation(implementation: str) -> None:
    model, ids = model_of("llama"), hf.tokens(length=9)
    want = hf.greedy(model, implementation, 2, "none")
    with qkv.watch(model, every=4, layers="model.layers.1.*") as w:
        found = hf.greedy(model, implementation, 2, "none")
    assert torch.equal(want, found)
    assert w.steps == 24
    assert [line["step"] for line in w.lines] == list(range(0, 24, 4))
    assert [line["shape"]["Lk"] for line in w.lines] == [19 + n for n in range(0, 24, 4)]
    assert [line["shape"]["Lq"] for line in w.lines] == [19, 1, 1, 1, 1, 1]
    assert not w.errors
    assert ids.shape == (2, 9)


def test_the_interface_is_given_back_after_an_exception() -> None:
    model, before = model_of("llama"), vars(KNOWN).copy()
    with qkv.watch(model):
        assert "get_interface" in vars(KNOWN)
    assert vars(KNOWN) == before
    with pytest.raises(ZeroDivisionError), hf.running(model, "eager"), qkv.watch(model):
        raise ZeroDivisionError
    assert vars(KNOWN) == before
    assert "get_interface" not in vars(KNOWN)


def test_a_model_with_attention_of_its_own_is_not_passed_over() -> None:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)
    model = transformers.BloomForCausalLM(config).eval()
    with torch.no_grad(), qkv.watch(model) as w:
        model(input_ids=hf.tokens(length=5))
    assert not w.lines
    assert any("self_attention" in text and "no call was met" in text for text in w.not_seen), w.not_seen
