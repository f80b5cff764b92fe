"""Traces whose pages the tests open, and a reader of HTML that shares no code with what writes it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import torch

import qkv
from qkv.insight import Trace

_SENTENCE = """<s> The cat sat on the mat because it was warm and the dog who had chased it all day long slept by the
    fire while rain fell on the old roof and nobody in the quiet house thought of the morning"""
TOKENS = re.sub(r"\s+", "  ", _SENTENCE).replace("  ", "\0 ").split("\0")

HOSTILE = [
    "</script><script>alert(1)</script>", "<!--", "-->", "]]>", '"><img src=x onerror=alert(1)>',
    "' onclick='alert(1)", "javascript:alert(1)", "</title><h1>no</h1>", "&lt;b&gt;&amp;", "{{7*7}}${7*7}`",
    "\u202eevil\u2066", "\u200b\u200d", "\x00\x01\x1b[31m", "\ud800", "\udfff lone", "\u2028\u2029", "</style>",
    "<svg/onload=alert(1)>", "a\u0301" * 40, "", " ", "\n\t\r", "\ufeff", "\u0e44\u0e17\u0e22",
    "\u05e2\u05d1\u05e8\u05d9\u05ea", "\U0001f469\u200d\U0001f467", "\\u003c/script\\u003e", "]]]}}}\"'", "\x7f",
    "\ufffe", "x" * 1_000_000,
]  # fmt: skip


def tensors(Hq: int = 4, Hkv: int = 2, L: int = 40, D: int = 16, seed: int = 0, B: int = 1) -> tuple[torch.Tensor, ...]:
    """Heads of four kinds, as models have them: a sink, the previous token, flat, and itself."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, L, D, generator=rng) for h in (Hq, Hkv, Hkv))
    sink = torch.nn.functional.normalize(torch.randn(D, generator=rng), dim=0)
    for h in range(Hq):
        mine = k[:, h // (Hq // Hkv)] * (16 / D) ** 0.5
        if h % 4 == 0:
            q[:, h] += 9 * sink
        elif h % 4 == 1:
            q[:, h, 1:] = 1.6 * mine[:, :-1]
        elif h % 4 == 2:
            q[:, h] *= 0.2
        else:
            q[:, h] = 1.5 * mine
    k[:, :, 0] += 2.5 * sink * (D / 16) ** 0.5
    v[:, :, 0] *= 0.1
    return q, k, v


def small(**more: Any) -> Trace:
    return qkv.see(*tensors(), mask=qkv.causal(), tokens=TOKENS[:40], **more)


def long(L: int = 1500) -> Trace:
    """One whose map pools."""
    return qkv.see(*tensors(L=L), mask=qkv.causal() & (qkv.sliding_window(600) | qkv.prefix(4)))


def hostile() -> Trace:
    q, k, v = tensors(L=len(HOSTILE))
    return qkv.see(q, k, v, tokens=HOSTILE)


def paged() -> Trace:
    """Two sequences of unequal lengths that share a prompt."""
    cache = qkv.cache.PagedCache(pages=24, page_size=8, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    first = cache.add()
    _, k, v = tensors(L=32)
    cache.append([first], k, v)
    second = cache.fork(first)
    _, k, v = tensors(L=13, seed=1)
    cache.append([first], k[:, :, :5], v[:, :, :5])
    cache.append([second], k, v)
    q, _, _ = tensors(L=3, seed=2, B=2)
    return qkv.see(q, cache.view([first, second]))


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag not in ("meta", "input", "br", "hr"):
            self._open.append((tag, found.get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, tag
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        for _, name in self._open:
            if name is not None:
                self.texts[name] = self.texts.get(name, "") + data

    @property
    def ids(self) -> set[str]:
        return {name for _, found in self.elements if (name := found.get("id")) is not None}
