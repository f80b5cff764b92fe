"""What qkv.see finds in models of transformers is what their own eager attention returns: a judge that is not ours."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.lm.sources import captured
from tests.kit import hf_models as hf

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()
# Scores are float32 in both, rounded in another order: some 2e-6 of scores of up to 20; weights by p (1 - p) of it.
_BOUND = 1e-5


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("name", [*hf.DECODERS, "bert"])
def test_a_trace_is_what_eager_returns(name: str, side: str) -> None:
    """Groups, windows, softcaps, sinks, latents, padding: the weights of the caught call, and what they come to."""
    model, ids, mask = hf.build(name), hf.tokens(), hf.padded(side)
    with torch.no_grad(), hf.running(model, "eager"):  # the model is shared: others' tests may have set it
        truth = [p.double() for p in model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions]
    real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool()
    with hf.running(model, "qkv"):
        for layer, p in enumerate(truth):
            call = captured(lambda: model(input_ids=ids, attention_mask=mask), layer)
            o = call.options
            t = qkv.see(
                call.q, call.k, call.v, call.mask, positions=o.positions, bias=o.bias, scale=o.scale,
                softcap=o.softcap, sinks=o.sinks,
            )  # fmt: skip
            for b in range(ids.shape[0]):
                rows = real[b]
                for h in range(p.shape[1]):
                    assert (t.weights(batch=b, head=h) - p[b, h])[rows].abs().max() <= _BOUND
                assert (t.statistics.weight[b] - p[b].amax(-1))[:, rows].abs().max() <= _BOUND
                if o.sinks is None:  # eager leaves the sinks' own weights out
                    entropy = torch.special.entr(p[b]).sum(-1)
                    assert (t.statistics.entropy[b] - entropy)[:, rows].abs().max() <= 10 * _BOUND
            if mask is None:
                assert t.statistics.mass is not None
                assert (t.statistics.mass - p.sum(2)).abs().max() <= 10 * _BOUND
