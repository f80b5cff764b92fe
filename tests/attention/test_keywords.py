"""Arguments that other libraries have: a typed error that says what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qkv
from qkv.call import keywords
from qkv.errors import ArgumentTypeError
from tests.kit.layers import close, sample

pytestmark = pytest.mark.usefixtures("one_thread")

Q, K, V, X = sample(1, 4, 6, 8), sample(1, 2, 6, 8, seed=1), sample(1, 2, 6, 8, seed=2), sample(1, 6, 16)
FLOATS, BOOLS = torch.zeros(6, 6), torch.ones(6, 6, dtype=torch.bool)
LAYER = qkv.nn.Attention(16, 2, dtype=torch.float64)
LATENT = qkv.nn.LatentAttention(
    16, 2, q_lora_rank=None, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, dtype=torch.float64
)
CALLS: dict[str, Callable[..., Any]] = {
    "qkv.attention()": lambda **given: qkv.attention(Q, K, V, **given),
    "qkv.plan()": lambda **given: qkv.plan(Q, K, V, **given),
    "qkv.weights()": lambda **given: qkv.weights(Q, K, **given),
    "qkv.nn.Attention.forward()": lambda **given: LAYER(X, **given),
    "qkv.nn.LatentAttention.forward()": lambda **given: LATENT(X, **given),
}
CURED: list[tuple[str, Any, str]] = [
    ("is_causal", True, 'Pass mask=qkv.causal(), with positions="start" where Lq != Lk'),
    ("is_causal", False, "Leave it out: without a mask every query sees every key"),
    ("causal", True, 'Pass mask=qkv.causal(), with positions="end" where Lq != Lk'),
    ("attn_mask", BOOLS, "Pass mask=attn_mask, where True = may attend"),
    ("attn_mask", FLOATS, "Pass bias=attn_mask: it is added to the scores"),
    ("attn_mask", None, "Leave it out"),
    ("key_padding_mask", BOOLS[:1], "Pass mask=~key_padding_mask[:, None, None, :]"),
    ("attention_mask", BOOLS[:1].long(), "attention_mask.bool()[:, None, None, :]"),
    ("score_mod", lambda s, b, h, q, k: s, "Pass bias=qkv.score_mod(fn), with fn(s, b, h, p, j)"),
    ("mask_mod", lambda b, h, q, k: q >= k, "Pass mask=qkv.mask_mod(fn), with fn(b, h, p, j)"),
    ("block_mask", object(), "Pass mask=qkv.mask_mod(block_mask.mask_mod)"),
    ("window_size", (255, 0), "Pass mask=qkv.window(255, 0)"),
    ("window_size", (-1, 3), "Pass mask=qkv.window(None, 3)"),
    ("window_size", (-1, -1), "Leave it out"),
    ("sliding_window", 256, "Pass mask=qkv.sliding_window(256)"),
    ("dropout", 0.1, "Pass dropout_p="),
    ("softmax_scale", 0.1, "Pass scale="),
    ("enable_gqa", True, "Leave it out: heads are counted in the tensors"),
    ("alibi_slopes", FLOATS[0], "Pass bias=qkv.alibi(slopes)"),
    ("return_attn_probs", True, "Call qkv.weights(q, k, rows=...)"),
    ("need_weights", True, "Call qkv.weights(q, k, rows=...)"),
    ("cu_seqlens_q", torch.tensor([0, 3, 6]), "mask=qkv.documents(lengths), where lengths = cu_seqlens.diff()"),
    ("block_table", torch.zeros(1, 2), "qkv.cache.stored"),
    ("s_aux", torch.zeros(4), "Pass sinks="),
]


@pytest.mark.parametrize(("name", "value", "cure"), CURED, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("call", CALLS)
def test_an_argument_of_another_library_names_the_cure(call: str, name: str, value: Any, cure: str) -> None:
    with pytest.raises(ArgumentTypeError) as error:
        CALLS[call](**{name: value})
    text = str(error.value)
    assert text.startswith(f"{call}: there is no argument {name}. Got {name}=")
    assert cure in text
    assert len(text) < 500


@pytest.mark.parametrize("call", CALLS)
def test_a_misspelt_argument_names_the_one_that_was_meant(call: str) -> None:
    with pytest.raises(
        ArgumentTypeError, match=r"there is no argument masks\. Got masks=causal\(\)\. Did you mean mask="
    ):
        CALLS[call](masks=qkv.causal())
    with pytest.raises(ArgumentTypeError, match=r"The arguments are (q, k|x), .*mask, "):
        CALLS[call](zebra=1)


def test_two_tokens_of_the_cures_mean_what_they_say() -> None:
    """Those that can be checked by a number: PyTorch's is_causal, its masks, and its dropout's name."""
    torchs = torch.nn.functional.scaled_dot_product_attention
    q, k, v = Q[:, :, :4], K.repeat_interleave(2, 1), V.repeat_interleave(2, 1)
    close(qkv.attention(q, K, V, qkv.causal(), positions="start"), torchs(q, k, v, is_causal=True))
    close(
        qkv.attention(Q, K, V, bias=sample(6, 6).float()),
        torchs(Q, k, v, attn_mask=sample(6, 6).float().double()),
        1e-6,
    )
    close(qkv.attention(Q, K, V, BOOLS.tril()), torchs(Q, k, v, attn_mask=BOOLS.tril()))


def test_every_cure_is_a_sentence_of_names_that_exist() -> None:
    for name in (*keywords._FIXED, *keywords._BY_VALUE):
        text = str(keywords.unknown("f()", {name: None}, qkv.attention))
        for word in text.replace("(", " ").replace(",", " ").replace(":", " ").replace(")", " ").split():
            if word.startswith("qkv."):
                at: Any = qkv
                for part in word.strip(".;").split(".")[1:]:
                    at = getattr(at, part)
    taken = set(inspect.signature(qkv.attention).parameters)
    assert not taken & {*keywords._FIXED, *keywords._BY_VALUE}, "a cure for an argument that there is"


def test_a_compiled_call_raises_it_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: qkv.attention(q, K, V, is_causal=True), backend="eager")  # type: ignore[call-overload]
    with pytest.raises(Exception, match="there is no argument is_causal"):
        compiled(Q)
