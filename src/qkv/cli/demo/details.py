"""What `qkv demo --full` prints after the first screen."""

from __future__ import annotations

import textwrap

import torch

from qkv.cli.demo.features import DAMPING, HEADING, LENGTH, SHARPNESS, Features
from qkv.cli.demo.lookup import Found
from qkv.cli.demo.measure import HEADS, KEYS, KV_HEADS, SIZE, Agreement, Timing
from qkv.cli.demo.screen import milliseconds
from qkv.cli.demo.words import PIECE
from qkv.insight.terminal import number, paint, table
from qkv.plans import plan


def details(found: Found, agreed: Agreement, timings: list[Timing]) -> str:
    """Return what `--full` adds to the first screen."""
    plan_lines = textwrap.indent(str(plan(found.q, found.features.k, found.features.v)), "  ")
    sections = {
        "The passages found": _passages(found),
        "How q, k and v are made": _projections(found.features),
        "Shapes and bytes": _shapes(found),
        "The plan of the lookup": plan_lines,
        "Error against float64, of the largest value": _errors(agreed),
        f"One decode step, {KEYS:,} keys, {HEADS} query and {KV_HEADS} key/value heads of {SIZE}": _times(timings),
    }
    return "\n\n".join(["", *(f"{paint(title, 'bold')}\n{text}" for title, text in sections.items())])[1:]


def _passages(found: Found) -> str:
    parts = []
    for hit in found.hits:
        heading = f" · {hit.passage.heading}" if hit.passage.heading else ""
        parts.append(f"{hit.weight:.4f}  {hit.passage.where}{heading}\n{textwrap.indent(hit.passage.text, '    ')}")
    return "\n\n".join(parts)


def _projections(f: Features) -> str:
    shared = " (rarer ones share a row, by hash)" if f.shared else ""
    damping = f"BM25's damping, k1 = {DAMPING}, b = {LENGTH}"
    return f"""\
  x     counts of {f.size:,} features{shared}: stems of words (1 each) and their pieces of four letters
        ({PIECE} each); a heading's words count {HEADING}. On the passages' side {damping}.
  W_K   {tuple(f.w_k.shape)}: rarity of each feature × a seeded random direction; random directions are nearly
        orthogonal, so q·k adds up the rarities of the shared features and little else
  W_Q   the same, × sharpness {SHARPNESS} × √D (the scale is the usual 1/√D); x of the question has length 1
  W_V   {tuple(f.w_v.shape)}: rarity × other random directions, so that out can be read back into words
  Nothing is trained. A trained model differs in where the three matrices come from, not in what follows."""


def _shapes(found: Found) -> str:
    f = found.features
    tensors = {"W_Q": f.w_q, "W_K": f.w_k, "W_V": f.w_v, "q": found.q, "k": f.k, "v": f.v}
    tensors |= {"weights": found.weights, "out": found.out}
    rows = [
        [name, str(tuple(t.shape)), str(t.dtype).removeprefix("torch."), f"{t.nbytes:,} bytes"]
        for name, t in tensors.items()
    ]
    return table(rows, "<<<>")


def _errors(agreed: Agreement) -> str:
    rows = [["", *next(iter(agreed.errors.values()))]]
    rows += [[name, *(f"{error:.1e}" for error in cases.values())] for name, cases in agreed.errors.items()]
    refused = [f"  {name} did not run: {reason}" for name, reason in agreed.refused.items()]
    return "\n".join([table(rows, "<>>>"), *refused])


def _times(timings: list[Timing]) -> str:
    rows = [["ms, in turn", "least", "median", "most", "runs", "results differ by"]]
    for t in timings:
        for name, runs, middle in zip(("PyTorch", "qkv"), (t.torch, t.qkv), t.medians, strict=True):
            times = map(milliseconds, (min(runs), middle, max(runs)))
            rows.append([f"{name} {t.dtype}", *times, str(len(runs)), number(t.difference)])
    call = "scaled_dot_product_attention(q, k, v, enable_gqa=True)"
    about = f"  torch {torch.__version__}, {torch.get_num_threads()} threads; PyTorch's is {call}"
    return f"{table(rows, '<>>>>>')}\n{about}"
