"""What native sparse attention is, in dense float64: tables of all pairs and Python's sort."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.kit.layers import turn

SIZES = {"block": 8, "stride": 4, "selected_block": 8, "top_k": 4, "initial": 1, "local": 2, "window": 9}


def attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs (B, Hq, Lq, Dv) and weights (B, Hq, Lq, Lk) of keys that `seen` allows; 0 in rows that see none."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    top = scores.masked_fill(~seen, -1e300).amax(-1, keepdim=True) if k.shape[2] else scores.new_zeros(())
    weights = torch.where(seen, (scores - top).clamp(max=0).exp(), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bhij,bhjd->bhid", weights, v), weights


def blocks_of(x: Tensor, block: int, stride: int) -> Tensor:
    """(B, H, blocks, block, width): cut one by one."""
    starts = [s for s in range(0, x.shape[2], stride) if s + block <= x.shape[2]]
    return torch.stack([x[:, :, s : s + block] for s in starts], 2) if starts else x[:, :, :0, None].expand(
        -1, -1, -1, block, -1
    )  # fmt: skip


def picked(weights: Tensor, Hkv: int, at: list[int], Lk: int, o: dict[str, int]) -> list[list[list[list[int]]]]:
    """The selected blocks of each batch row, key/value head and query."""
    B, Hq, _, Lc = weights.shape
    wide, group = o["selected_block"], Hq // Hkv
    found = []
    shared = torch.zeros(Lc, -(-Lk // wide), dtype=torch.float64)
    for c in range(Lc):
        strides = range(c * o["stride"], c * o["stride"] + o["block"], o["stride"])
        for s in strides:
            shared[c, s // wide] += 1
    importance = weights.double().unflatten(1, (Hkv, group)).sum(2) @ shared  # (B, Hkv, Lq, blocks)
    for b in range(B):
        found.append([])
        for h in range(Hkv):
            rows = []
            for i, p in enumerate(at):
                own = p // wide
                always = [j for j in range(own + 1) if j < o["initial"] or j > own - o["local"]]
                others = [j for j in range(own + 1) if j not in always]
                others.sort(key=lambda j: (-importance[b, h, i, j].float().item(), j))
                rows.append(sorted((always + others)[: o["top_k"]]))
            found[-1].append(rows)
    return found


def sparse(
    q: Tensor, k: Tensor, v: Tensor, gates: Any, o: dict[str, int], *, cmp: Any = None, swa: Any = None,
    at: list[int] | None = None, scale: float | None = None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """The output, and the blocks that were selected. `cmp`, `swa`: keys and values of those branches."""
    Lk = k.shape[2]
    at = list(range(Lk)) if at is None else at
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p, j = torch.tensor(at, dtype=torch.int64)[:, None], torch.arange(Lk)
    if cmp is None:
        cmp = [blocks_of(x, o["block"], o["stride"]).mean(-2) for x in (k, v)]
    ends = torch.arange(cmp[0].shape[2]) * o["stride"] + o["block"] - 1
    out_cmp, weights = attended(q, *cmp, ends <= p, scale)
    blocks = picked(weights.detach(), k.shape[1], at, Lk, o)
    table = torch.zeros(q.shape[0], k.shape[1], len(at), Lk, dtype=torch.bool)
    for b, heads in enumerate(blocks):
        for h, rows in enumerate(heads):
            for i, chosen in enumerate(rows):
                for n in chosen:
                    table[b, h, i, n * o["selected_block"] : (n + 1) * o["selected_block"]] = True
    table = table.repeat_interleave(q.shape[1] // k.shape[1], 1) & (j <= p)
    out_slc, _ = attended(q, k, v, table, scale)
    out_swa, _ = attended(q, *((k, v) if swa is None else swa), (j <= p) & (j > p - o["window"]), scale)
    parts = [g[..., None] * out for g, out in zip(gates, (out_cmp, out_slc, out_swa), strict=True) if g is not None]
    return torch.stack(parts).sum(0), blocks


def phi(compress: nn.Module | None, tokens: Tensor) -> Tensor:
    """Blocks (.., l, width) as one token each, by the formula in the layer's docstring."""
    if compress is None:
        return tokens.mean(-2)
    w = dict(compress.named_parameters())
    flat = torch.cat((tokens + w["position"]).unbind(-2), -1)
    hidden = flat @ w["up_proj.weight"].T + w["up_proj.bias"]
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return hidden @ w["down_proj.weight"].T + w["down_proj.bias"]


def layer_truth(layer: Any, x: Tensor) -> Tensor:
    """The layer on x (B, L, dim), from its parameters."""
    w, o, H, Hkv = dict(layer.named_parameters()), layer.pattern._asdict(), layer.num_heads, layer.num_kv_heads

    def heads(name: str, count: int) -> Tensor:
        y = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
        return torch.stack(y.chunk(count, -1), 1)  # (B, H, L, D)

    def turned(t: Tensor) -> Tensor:
        if layer.rotary is None or not t.numel():
            return t
        return torch.stack([torch.stack([turn(h, layer.rotary, range(h.shape[0])) for h in row]) for row in t])

    branches = 1 if layer.shared_kv else 3
    q, k, v = turned(heads("q_proj", H)), turned(heads("k_proj", Hkv * branches)), heads("v_proj", Hkv * branches)
    ks, vs = ([t[:, b * Hkv : (b + 1) * Hkv] for b in range(branches)] * (3 // branches) for t in (k, v))
    gates = torch.sigmoid(heads("gate_proj", H)).unbind(-1)
    cmp = [
        phi(net, blocks_of(t, o["block"], o["stride"]))
        for net, t in ((layer.k_compress, ks[0]), (layer.v_compress, vs[0]))
    ]
    out, _ = sparse(q, ks[1], vs[1], gates, o, cmp=cmp, swa=(ks[2], vs[2]), scale=layer.scale)
    return torch.cat(out.unbind(1), -1) @ w["o_proj.weight"].T + w.get("o_proj.bias", 0)
