"""Constructors of patterns, tensors and functions."""

from __future__ import annotations

import qkv

CASES: list[tuple[str, type[qkv.QKVError], str]] = [
    (
        "qkv.chunked(0)",
        qkv.ArgumentError,
        "qkv.chunked(): n must be an integer >= 1. Got n=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.chunked(4.0)",
        qkv.ArgumentTypeError,
        "qkv.chunked(): n must be an integer. Got n=4.0 (float). Pass a whole number >= 1.",
    ),
    (
        "qkv.strided(0)",
        qkv.ArgumentError,
        "qkv.strided(): n must be an integer >= 1. Got n=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.strided(2, 0.5)",
        qkv.ArgumentTypeError,
        "qkv.strided(): offset must be an integer. Got offset=0.5 (float). Pass a whole number.",
    ),
    (
        "qkv.dilated(-1, 2)",
        qkv.ArgumentError,
        "qkv.dilated(): window must be an integer >= 0. Got window=-1. Pass a whole number >= 0.",
    ),
    (
        "qkv.dilated(1, 0)",
        qkv.ArgumentError,
        "qkv.dilated(): step must be an integer >= 1. Got step=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.dilated(2**40, 2**40)",
        qkv.ArgumentError,
        "qkv.dilated(): window * step must be at most 2**48. Got window=1099511627776, "
        "step=1099511627776. Use strided(step) to reach every key.",
    ),
    (
        "qkv.global_tokens(3)",
        qkv.ArgumentTypeError,
        "qkv.global_tokens(): indices must be a list or tensor of integers. Got indices=3 (int). "
        "Pass a list of whole numbers or an integer tensor.",
    ),
    (
        "qkv.global_tokens([-1])",
        qkv.ArgumentError,
        "qkv.global_tokens(): indices must hold integers >= 0. Got a value of -1. Pass values >= 0.",
    ),
    (
        "qkv.global_tokens([[0], [1]])",
        qkv.ShapeError,
        "qkv.global_tokens(): indices must have 1 dimension. Got indices of shape (2, 1). Reshape it.",
    ),
    (
        "qkv.random_blocks(-1, 4, 0)",
        qkv.ArgumentError,
        "qkv.random_blocks(): per_row must be an integer >= 0. Got per_row=-1. Pass a whole number >= 0.",
    ),
    (
        "qkv.random_blocks(1, 0, 0)",
        qkv.ArgumentError,
        "qkv.random_blocks(): block must be an integer >= 1. Got block=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.random_blocks(1, 4, -1)",
        qkv.ArgumentError,
        "qkv.random_blocks(): seed must be an integer >= 0. Got seed=-1. Pass a whole number >= 0.",
    ),
    (
        "qkv.random_blocks(1, 4, None)",
        qkv.ArgumentTypeError,
        "qkv.random_blocks(): seed must be an integer. Got seed=None (NoneType). Pass a whole number >= 0.",
    ),
    (
        "qkv.blocks(torch.ones(2, 2), 4)",
        qkv.ArgumentTypeError,
        "qkv.blocks(): map must be a bool tensor. Got a float32 tensor of shape (2, 2). Pass a bool "
        "tensor, e.g. map.bool().",
    ),
    (
        "qkv.blocks([[True]], 4)",
        qkv.ArgumentTypeError,
        "qkv.blocks(): map must be a bool tensor. Got [[True]] (list). Pass a bool tensor, e.g. map.bool().",
    ),
    (
        "qkv.blocks(torch.ones(2, dtype=torch.bool), 4)",
        qkv.ShapeError,
        "qkv.blocks(): map must be (nq, nk) or (B or 1, Hq or 1, nq, nk). Got a bool tensor of shape "
        "(2,). Add dimensions of size 1 for B and Hq.",
    ),
    (
        "qkv.blocks(torch.ones(2, 2, dtype=torch.bool), 0)",
        qkv.ArgumentError,
        "qkv.blocks(): block must be an integer >= 1. Got block=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.selected_blocks(torch.ones(1, 1, 2, 2), 4)",
        qkv.ArgumentTypeError,
        "qkv.selected_blocks(): indices must be an int32 or int64 tensor. Got a float32 tensor of shape "
        "(1, 1, 2, 2). Pass what torch.topk returns, or convert it with .to(torch.int64).",
    ),
    (
        "qkv.selected_blocks([[[[0]]]], 4)",
        qkv.ArgumentTypeError,
        "qkv.selected_blocks(): indices must be an int32 or int64 tensor. Got [[[[0]]]] (list). Pass what "
        "torch.topk returns, or convert it with .to(torch.int64).",
    ),
    (
        "qkv.selected_blocks(torch.ones(2, 2, dtype=torch.int32), 4)",
        qkv.ShapeError,
        "qkv.selected_blocks(): indices must be (B or 1, H, rows, n) with H >= 1. Got an int32 tensor of "
        "shape (2, 2). Add dimensions of size 1 for B and H.",
    ),
    (
        'qkv.selected_blocks(torch.ones(1, 1, 2, 2, dtype=torch.int32, device="meta"), 4)',
        qkv.ArgumentError,
        "qkv.selected_blocks(): indices must hold their values in a strided tensor. Got an int32 tensor of "
        "shape (1, 1, 2, 2) on meta, torch.strided. Fill it.",
    ),
    (
        "qkv.selected_blocks(torch.ones(1, 1, 2, 2, dtype=torch.int32), 0)",
        qkv.ArgumentError,
        "qkv.selected_blocks(): block must be an integer >= 1. Got block=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.selected_blocks(torch.ones(1, 1, 2, 2, dtype=torch.int32), 1, queries=0)",
        qkv.ArgumentError,
        "qkv.selected_blocks(): queries must be an integer >= 1. Got queries=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.per_head(qkv.causal())",
        qkv.ArgumentTypeError,
        "qkv.per_head(): masks must be a list of masks. Got causal() (Window). Pass one mask a query head.",
    ),
    (
        "qkv.per_head([qkv.causal(), None])",
        qkv.ArgumentTypeError,
        "qkv.per_head(): every head needs a mask. Got None for head 1. Use window(None, None) for a "
        "head that sees everything.",
    ),
    (
        "qkv.per_head([qkv.causal(), 3])",
        qkv.ArgumentTypeError,
        "qkv.per_head(): a mask must be a qkv mask or a bool tensor, True = may attend. Got 3 (int). "
        "Write qkv.causal(), qkv.sliding_window(n), ...; make an array a tensor with "
        "torch.from_numpy(x).",
    ),
    (
        'qkv.per_head("ab")',
        qkv.ArgumentTypeError,
        "qkv.per_head(): masks must be a list of masks. Got 'ab' (str). Pass one mask a query head.",
    ),
    (
        "qkv.dense([[True]])",
        qkv.ArgumentTypeError,
        "qkv.dense(): a mask tensor must be a bool tensor, True = may attend. Got [[True]] (list). "
        "Write t != 0 or t.bool(); a float mask that is added to the scores is bias=.",
    ),
    (
        "qkv.dense(torch.ones(2, 2))",
        qkv.ArgumentTypeError,
        "qkv.dense(): a mask tensor must be a bool tensor, True = may attend. Got a float32 tensor "
        "of shape (2, 2). Write t != 0 or t.bool(); a float mask that is added to the scores is "
        "bias=.",
    ),
    (
        "qkv.dense(torch.ones(2, 2, dtype=torch.int64))",
        qkv.ArgumentTypeError,
        "qkv.dense(): a mask tensor must be a bool tensor, True = may attend. Got an int64 tensor of "
        "shape (2, 2). Write t != 0 or t.bool(); a float mask that is added to the scores is bias=.",
    ),
    (
        "qkv.dense(torch.ones(2, 2, 2, dtype=torch.bool))",
        qkv.ShapeError,
        "qkv.dense(): a mask tensor must be (Lq, Lk) or (B, Hq, Lq, Lk). Got a bool tensor of shape "
        "(2, 2, 2). Add dimensions of size 1, e.g. t[:, None] for (B, Lq, Lk).",
    ),
    (
        'qkv.dense(torch.ones(2, 2, dtype=torch.bool, device="meta"))',
        qkv.ArgumentError,
        "qkv.dense(): a mask tensor must hold its values in a strided tensor. Got a bool tensor of "
        "shape (2, 2) on meta, torch.strided. Fill it.",
    ),
    (
        "qkv.mask_mod(3)",
        qkv.ArgumentTypeError,
        "qkv.mask_mod(): fn must be a function fn(b, h, p, j). Got 3 (int). Pass a function of four "
        "tensors, e.g. lambda b, h, p, j: j <= p.",
    ),
    (
        "qkv.bigbird(0)",
        qkv.ArgumentError,
        "qkv.bigbird(): block must be an integer >= 1. Got block=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.bigbird(64, window_blocks=0)",
        qkv.ArgumentError,
        "qkv.bigbird(): window_blocks must be an integer >= 1. Got window_blocks=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.bigbird(64, global_blocks=-1)",
        qkv.ArgumentError,
        "qkv.bigbird(): global_blocks must be an integer >= 0. Got global_blocks=-1. Pass a whole number >= 0.",
    ),
    (
        "qkv.bigbird(64, random_blocks=0.5)",
        qkv.ArgumentTypeError,
        "qkv.bigbird(): random_blocks must be an integer. Got random_blocks=0.5 (float). Pass a whole number >= 0.",
    ),
    (
        "qkv.bigbird(2**20, global_blocks=2**20)",
        qkv.ArgumentError,
        "qkv.bigbird(): global_blocks * block must be at most 2**24 tokens. Got "
        "global_blocks=1048576, block=1048576. Use window(None, None) to see everything.",
    ),
    (
        "qkv.longformer(3)",
        qkv.ArgumentError,
        "qkv.longformer(): window must be even, half of it on each side. Got window=3. Pass "
        "window=4, or window(left, right) for uneven sides.",
    ),
    (
        "qkv.longformer(0)",
        qkv.ArgumentError,
        "qkv.longformer(): window must be an integer >= 2. Got window=0. Pass a whole number >= 2.",
    ),
    (
        "qkv.longformer(4, 7)",
        qkv.ArgumentTypeError,
        "qkv.longformer(): global_indices must be a list or tensor of integers. Got global_indices=7 "
        "(int). Pass a list of whole numbers or an integer tensor.",
    ),
    (
        "qkv.longformer(4, dilation=0)",
        qkv.ArgumentError,
        "qkv.longformer(): dilation must be an integer >= 1. Got dilation=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.random_blocks(2**30, 1, 0)",
        qkv.ArgumentError,
        "qkv.random_blocks(): per_row must be an integer <= 1048576. Got per_row=1073741824. Pass a smaller number.",
    ),
    (
        "qkv.mask_mod(None)",
        qkv.ArgumentTypeError,
        "qkv.mask_mod(): fn must be a function fn(b, h, p, j). Got None (NoneType). Pass a function "
        "of four tensors, e.g. lambda b, h, p, j: j <= p.",
    ),
]
