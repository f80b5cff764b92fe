"""Generate for many sequences at once on one paged cache: a shared prompt is stored once, and each step is one pass."""

from __future__ import annotations

import torch

import qkv
from qkv.lm import load  # a small model of bytes that ships with the package; any model of qkv.nn will do

model = load()
size = model.blocks[0].attention
cache = qkv.cache.PagedCache(
    pages=64, num_kv_heads=size.num_kv_heads, head_dim=size.head_dim, layers=6, dtype=torch.float32
)

system = b"The Python language reference describes the exact syntax and semantics of the language. "
prompts = [system + p for p in (b"The for statement ", b"A list ", b"If a class ", b"A generator ")]
texts, seqs = [list(p) for p in prompts], []
with torch.inference_mode():
    for text in texts:  # each prompt is computed as far as no page of the cache holds its first tokens
        seqs.append(cache.add(tokens=text))
        new = text[seqs[-1].length :]
        text.append(int(model(torch.tensor([new]), cache.step(seqs[-1:], T=len(new)))[0, -1].argmax()))
    for _ in range(48):  # then one byte for all of them at a time
        logits = model(torch.tensor([text[-1:] for text in texts]), cache.step(seqs, T=1))
        for text, byte in zip(texts, logits[:, -1].argmax(-1).tolist(), strict=True):
            text.append(byte)

print(*(" ".join(bytes(text[len(system) :]).decode(errors="replace").split()) for text in texts), sep="\n")
print(cache.stats(), cache.table(), sep="\n\n")
