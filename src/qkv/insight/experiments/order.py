"""Whether attention sees the order of its tokens, and what a rotary embedding changes."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.given import Given
from qkv.insight.terminal import bar, number
from qkv.masks import Mask, causal
from qkv.rotary import Rotary

TOKENS, HEAD, SHIFT = 32, 64, 1000
QUESTION = "Does attention see word order, and what do rotations change?"
SOURCES = (
    "Vaswani et al. 2017, section 3.5, arxiv.org/abs/1706.03762; Su et al. 2021, RoPE, arxiv.org/abs/2104.09864",
)


def run(seed: int) -> Answer:
    """Shuffle random tokens and see whether the outputs are merely shuffled with them."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, TOKENS, HEAD, generator=rng, dtype=torch.float64)
    return _answer(q, k, v, torch.randperm(TOKENS, generator=rng), None)


def on(given: Given) -> Answer:
    """The same on the caller's tensors: all keys are reversed, and the queries where there are as many."""
    batch, chosen = slice(given.batch, given.batch + 1), slice(given.heads.start, given.heads.stop)
    q = given.q[batch, chosen].detach().double().cpu()[:, :, :_LONGEST]
    k, v = (torch.stack([of(h) for h in given.heads])[None, :, :_LONGEST] for of in (given.keys, given.values))
    return _answer(q, k, v, torch.arange(k.shape[2] - 1, -1, -1), given)


_LONGEST = 2048  # tokens of the caller's that are shuffled


def _answer(q: Tensor, k: Tensor, v: Tensor, order: Tensor, given: Given | None) -> Answer:
    scale = None if given is None else given.scale
    square = q.shape[2] == k.shape[2]
    turned = Rotary(q.shape[3] // 2 * 2) if q.shape[3] > 1 else None
    found = {"no positions": _moved(q, k, v, order, scale, None, None)}
    if square:
        found["causal mask"] = _moved(q, k, v, order, scale, causal(), None)
    numbers: dict[str, Measured] = {}
    if turned is not None:
        found["rotary"] = _moved(q, k, v, order, scale, None, turned)
        near, far = (
            attention(turned.rotate(q, positions=p), turned.rotate(k, positions=p), v, scale=scale) for p in (0, SHIFT)
        )
        found[f"rotary, all moved on by {SHIFT:,}"] = ((far - near).norm() / near.norm()).item()
    numbers |= {f"out changes by, {name}": value for name, value in found.items()}
    wide, most = max(map(len, found)), max(found.values())
    lines = ["tokens put in another order; outputs, put back, differ (relative) by"]
    lines += [f"  {name:<{wide}}  {bar(value, 30, max(1.0, most))} {number(value)}" for name, value in found.items()]
    blind = found["no positions"] < 1e-9
    short = "No: without positions attention sees a set; rotations show it the distances."
    if not blind:
        short = f"Here it does: the outputs changed by {number(found['no positions'])} without any positions."
    return Answer("order", QUESTION, numbers, "\n".join(lines), _verdict(found, blind), SOURCES, short=short)


def _verdict(found: dict[str, float], blind: bool) -> str:
    text = f"""
        Put the tokens in another order and each output {"is the same, to" if blind else "changes, by"}
        {number(found["no positions"])}: scores are products of two tokens, and a sum over keys has no order.
        """
    if "causal mask" in found:
        text += f"""
            A causal mask alone brings some order in ({number(found["causal mask"])}): a token sees only those before
            it, so which ones they are depends on the order, though not how far away each is."""
    if "rotary" in found:
        shifted = found[f"rotary, all moved on by {SHIFT:,}"]
        text += f"""
            Turning q and k by angles that grow with the position makes a score depend on the distance
            ({number(found["rotary"])} after the shuffle) and {"on it alone" if shifted < 1e-6 else "not on it alone"}:
            all positions moved on by {SHIFT:,} change {number(shifted)}.
            V is not turned: positions decide where to look, not what is read."""
    return prose(text)


def _moved(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, scale: float | None, mask: Mask | None, turned: Rotary | None
) -> float:
    """By how much out changes, relative to out, when the tokens change places (and outputs are put back)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if turned is not None:
            q, k = turned.rotate(q), turned.rotate(k)
        return attention(q, k, v, mask=mask, scale=scale)

    out = attend(q, k, v)
    asked = q[:, :, order] if q.shape[2] == k.shape[2] else q
    moved = attend(asked, k[:, :, order], v[:, :, order])
    back = out[:, :, order] if q.shape[2] == k.shape[2] else out
    return float((moved - back).norm()) / max(float(out.norm()), 1e-300)
