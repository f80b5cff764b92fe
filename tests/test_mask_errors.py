"""Every malformed mask raises its exact typed error: the rule, what was given, the fix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qkv

# (what a user might write, the type, the message)
CASES: list[tuple[str, type[qkv.QKVError], str]] = [
    (
        "qkv.sliding_window(0)",
        qkv.ArgumentError,
        "qkv.sliding_window(): n must be an integer >= 1. Got n=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.sliding_window(-3)",
        qkv.ArgumentError,
        "qkv.sliding_window(): n must be an integer >= 1. Got n=-3. Pass a whole number >= 1.",
    ),
    (
        "qkv.sliding_window(2.0)",
        qkv.ArgumentTypeError,
        "qkv.sliding_window(): n must be an integer. Got n=2.0 (float). Pass a whole number >= 1.",
    ),
    (
        "qkv.sliding_window(True)",
        qkv.ArgumentTypeError,
        "qkv.sliding_window(): n must be an integer. Got n=True (bool). Pass a whole number >= 1.",
    ),
    (
        'qkv.sliding_window("8")',
        qkv.ArgumentTypeError,
        "qkv.sliding_window(): n must be an integer. Got n='8' (str). Pass a whole number >= 1.",
    ),
    (
        "qkv.sliding_window(None)",
        qkv.ArgumentTypeError,
        "qkv.sliding_window(): n must be an integer. Got n=None (NoneType). Pass a whole number >= 1.",
    ),
    (
        "qkv.sliding_window(torch.tensor(True))",
        qkv.ArgumentTypeError,
        "qkv.sliding_window(): n must be an integer. Got n=a bool tensor of shape () (Tensor). Pass "
        "a whole number >= 1.",
    ),
    (
        "qkv.sliding_window(torch.tensor([4]))",
        qkv.ArgumentTypeError,
        "qkv.sliding_window(): n must be an integer. Got n=an int64 tensor of shape (1,) (Tensor). "
        "Pass a whole number >= 1.",
    ),
    (
        "qkv.sliding_window(2**60)",
        qkv.ArgumentError,
        "qkv.sliding_window(): n must be an integer <= 281474976710656. Got n=1152921504606846976. "
        "Pass a smaller number.",
    ),
    (
        "qkv.window(-1, 0)",
        qkv.ArgumentError,
        "qkv.window(): left must be an integer >= 0. Got left=-1. Pass a whole number >= 0.",
    ),
    (
        "qkv.window(0, -1)",
        qkv.ArgumentError,
        "qkv.window(): right must be an integer >= 0. Got right=-1. Pass a whole number >= 0.",
    ),
    (
        "qkv.window(1.5, None)",
        qkv.ArgumentTypeError,
        "qkv.window(): left must be an integer. Got left=1.5 (float). Pass a whole number >= 0.",
    ),
    (
        "qkv.window(None, False)",
        qkv.ArgumentTypeError,
        "qkv.window(): right must be an integer. Got right=False (bool). Pass a whole number >= 0.",
    ),
    (
        "qkv.prefix(-1)",
        qkv.ArgumentError,
        "qkv.prefix(): n must be an integer >= 0. Got n=-1. Pass a whole number >= 0.",
    ),
    (
        "qkv.prefix(0.5)",
        qkv.ArgumentTypeError,
        "qkv.prefix(): n must be an integer. Got n=0.5 (float). Pass a whole number >= 0.",
    ),
    (
        'qkv.prefix("4")',
        qkv.ArgumentTypeError,
        "qkv.prefix(): n must be an integer. Got n='4' (str). Pass a whole number >= 0.",
    ),
    (
        "qkv.prefix(None)",
        qkv.ArgumentTypeError,
        "qkv.prefix(): n must be an integer. Got n=None (NoneType). Pass a whole number >= 0.",
    ),
    (
        "qkv.prefix([1, -2])",
        qkv.ArgumentError,
        "qkv.prefix(): n must hold integers >= 0. Got a value of -2. Pass values >= 0.",
    ),
    (
        "qkv.prefix([1, True])",
        qkv.ArgumentTypeError,
        "qkv.prefix(): n must hold integers. Got an entry True (bool). Pass a list of whole numbers "
        "or an integer tensor.",
    ),
    (
        "qkv.prefix(torch.tensor([[1]]))",
        qkv.ShapeError,
        "qkv.prefix(): n must have 1 dimension. Got n of shape (1, 1). Reshape it.",
    ),
    (
        "qkv.prefix(torch.tensor([1.0]))",
        qkv.ArgumentTypeError,
        "qkv.prefix(): n must hold integers. Got n as a float32 tensor of shape (1,). Convert it "
        "with .to(torch.int64).",
    ),
    (
        "qkv.padding(3)",
        qkv.ArgumentTypeError,
        "qkv.padding(): lengths must be a list or tensor of integers. Got lengths=3 (int). Pass a "
        "list of whole numbers or an integer tensor.",
    ),
    (
        "qkv.padding([3.0, 4])",
        qkv.ArgumentTypeError,
        "qkv.padding(): lengths must hold integers. Got an entry 3.0 (float). Pass a list of whole "
        "numbers or an integer tensor.",
    ),
    (
        "qkv.padding([-1])",
        qkv.ArgumentError,
        "qkv.padding(): lengths must hold integers >= 0. Got a value of -1. Pass values >= 0.",
    ),
    (
        "qkv.padding(torch.tensor([True, False]))",
        qkv.ArgumentTypeError,
        "qkv.padding(): lengths must hold integers. Got lengths as a bool tensor of shape (2,). "
        "Convert it with .to(torch.int64).",
    ),
    (
        'qkv.padding([2], side="top")',
        qkv.ArgumentError,
        'qkv.padding(): side must be "right" or "left", the end where the padding is. Got '
        'side=\'top\'. Use side="right" or side="left".',
    ),
    (
        "qkv.padding([2], side=None)",
        qkv.ArgumentError,
        'qkv.padding(): side must be "right" or "left", the end where the padding is. Got side=None. '
        'Use side="right" or side="left".',
    ),
    (
        'qkv.padding(torch.zeros(2, dtype=torch.int64, device="meta"))',
        qkv.ArgumentError,
        "qkv.padding(): lengths must have values. Got lengths on the meta device. Pass a tensor that holds data.",
    ),
    (
        "qkv.documents()",
        qkv.ArgumentTypeError,
        "qkv.documents(): documents are given by lengths or by segment_ids. Got neither. Pass "
        "documents(lengths) or documents(segment_ids=...).",
    ),
    (
        "qkv.documents([1], segment_ids=[0])",
        qkv.ArgumentTypeError,
        "qkv.documents(): documents are given by lengths or by segment_ids. Got both. Pass "
        "documents(lengths) or documents(segment_ids=...).",
    ),
    (
        "qkv.documents(segment_ids=[0], k_lengths=[1])",
        qkv.ArgumentTypeError,
        "qkv.documents(): queries and keys must be given in the same way. Got segment_ids with "
        "k_lengths. Pass documents(lengths, k_lengths) or documents(segment_ids=..., "
        "k_segment_ids=...).",
    ),
    (
        "qkv.documents([1], k_segment_ids=[0])",
        qkv.ArgumentTypeError,
        "qkv.documents(): queries and keys must be given in the same way. Got lengths with "
        "k_segment_ids. Pass documents(lengths, k_lengths) or documents(segment_ids=..., "
        "k_segment_ids=...).",
    ),
    (
        "qkv.documents([2, -1])",
        qkv.ArgumentError,
        "qkv.documents(): lengths must hold integers >= 0. Got a value of -1. Pass values >= 0.",
    ),
    (
        "qkv.documents(5)",
        qkv.ArgumentTypeError,
        "qkv.documents(): lengths must be a list or tensor of integers. Got lengths=5 (int). Pass a "
        "list of whole numbers or an integer tensor.",
    ),
    (
        'qkv.documents("ab")',
        qkv.ArgumentTypeError,
        "qkv.documents(): lengths must be a list or tensor of integers. Got lengths='ab' (str). Pass "
        "a list of whole numbers or an integer tensor.",
    ),
    (
        "qkv.documents([1, 2], [3])",
        qkv.ShapeError,
        "qkv.documents(): lengths and k_lengths must name the same documents. Got 2 lengths and 1 "
        "k_lengths. Pass 0 for a document without queries or keys.",
    ),
    (
        "qkv.documents([[1, 2]])",
        qkv.ShapeError,
        "qkv.documents(): lengths must have 1 dimension. Got lengths of shape (1, 2). Reshape it.",
    ),
    (
        "qkv.documents([2**50])",
        qkv.ArgumentError,
        "qkv.documents(): lengths must hold integers of magnitude <= 281474976710656. Got "
        "lengths=[1125899906842624]. Pass smaller values.",
    ),
    (
        "qkv.documents(segment_ids=torch.zeros(2, 2, 2, dtype=torch.int64))",
        qkv.ShapeError,
        "qkv.documents(): segment_ids must have 1 or 2 dimensions. Got segment_ids of shape (2, 2, 2). Reshape it.",
    ),
    (
        "qkv.documents(segment_ids=[0.0])",
        qkv.ArgumentTypeError,
        "qkv.documents(): segment_ids must hold integers. Got an entry 0.0 (float). Pass a list of "
        "whole numbers or an integer tensor.",
    ),
    (
        "qkv.documents(segment_ids=[[0, 1], [0]])",
        qkv.ShapeError,
        "qkv.documents(): rows of segment_ids must have one length. Got rows of shapes [(1,), (2,)]. "
        "Pad with a negative id.",
    ),
    (
        "qkv.documents(segment_ids=[[0], [0]], k_segment_ids=[[0], [0], [0]])",
        qkv.ShapeError,
        "qkv.documents(): segment_ids and k_segment_ids must be of the same batch. Got 2 and 3 rows. "
        "Pass (B, Lq) and (B, Lk), or one row for all.",
    ),
    (
        'qkv.documents([2, 2]).positions("middle")',
        qkv.ArgumentError,
        'documents().positions(): align must be "start" or "end". Got \'middle\'. Use one of the two.',
    ),
    (
        'qkv.documents(segment_ids=[0]).positions("end")',
        qkv.ArgumentError,
        "documents().positions(): positions follow from lengths only. Got "
        "documents(segment_ids=[0]). Make the mask with documents(lengths, k_lengths).",
    ),
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
        "bool(qkv.causal())",
        qkv.ArgumentTypeError,
        "bool(mask): a mask is neither true nor false. Got causal(). Write & | ~ where you wrote "
        "and, or, not; test for a mask with `is None`.",
    ),
    (
        "qkv.causal() and qkv.prefix(2)",
        qkv.ArgumentTypeError,
        "bool(mask): a mask is neither true nor false. Got causal(). Write & | ~ where you wrote "
        "and, or, not; test for a mask with `is None`.",
    ),
    (
        "not qkv.prefix(2)",
        qkv.ArgumentTypeError,
        "bool(mask): a mask is neither true nor false. Got prefix(2). Write & | ~ where you wrote "
        "and, or, not; test for a mask with `is None`.",
    ),
    (
        "qkv.causal() & None",
        qkv.ArgumentTypeError,
        "mask & mask: both sides must be masks or bool tensors. Got None and causal(). Leave it out.",
    ),
    (
        "qkv.causal() | 3",
        qkv.ArgumentTypeError,
        "mask | mask: a mask must be a qkv mask or a bool tensor, True = may attend. Got 3 (int). "
        "Write qkv.causal(), qkv.sliding_window(n), ...; make an array a tensor with "
        "torch.from_numpy(x).",
    ),
    (
        "qkv.causal() & torch.ones(2, 2)",
        qkv.ArgumentTypeError,
        "mask & mask: a mask must be a qkv mask or a bool tensor, True = may attend. Got a float32 "
        "tensor of shape (2, 2). Pass it as bias=, which is added to the scores; or write t == 0 if "
        "it holds 0 and -inf.",
    ),
    (
        '"causal" & qkv.causal()',
        qkv.ArgumentTypeError,
        "mask & mask: a mask must be a qkv mask or a bool tensor, True = may attend. Got 'causal' "
        "(str). Write it as a call, e.g. qkv.causal().",
    ),
    (
        "qkv.masks.as_mask(torch.zeros(2, 2))",
        qkv.ArgumentTypeError,
        "qkv.attention(): a mask must be a qkv mask or a bool tensor, True = may attend. Got a "
        "float32 tensor of shape (2, 2). Pass it as bias=, which is added to the scores; or write t "
        "== 0 if it holds 0 and -inf.",
    ),
    (
        "qkv.masks.as_mask(torch.zeros(2, 2, dtype=torch.int64))",
        qkv.ArgumentTypeError,
        "qkv.attention(): a mask must be a qkv mask or a bool tensor, True = may attend. Got an "
        "int64 tensor of shape (2, 2). Write t != 0 if 1 means may attend.",
    ),
    (
        'qkv.masks.as_mask("causal")',
        qkv.ArgumentTypeError,
        "qkv.attention(): a mask must be a qkv mask or a bool tensor, True = may attend. Got "
        "'causal' (str). Write it as a call, e.g. qkv.causal().",
    ),
    (
        "qkv.masks.as_mask(len)",
        qkv.ArgumentTypeError,
        "qkv.attention(): a mask must be a qkv mask or a bool tensor, True = may attend. Got "
        "<built-in function len> (builtin_function_or_method). Wrap the function: qkv.mask_mod(fn), "
        "or call the constructor: qkv.causal().",
    ),
    (
        "qkv.prefix([1, 2]).tensor(4, 4)",
        qkv.ShapeError,
        "Mask.tensor(): prefix(n) with a value for each batch row needs B of them. Got 2 values and B=1. Pass 1 value.",
    ),
    (
        "qkv.padding([1, 2]).tensor(4, 4, B=3)",
        qkv.ShapeError,
        "Mask.tensor(): padding(lengths) with a value for each batch row needs B of them. Got 2 "
        "values and B=3. Pass 3 values.",
    ),
    (
        "qkv.padding([5]).tensor(4, 4)",
        qkv.ShapeError,
        "Mask.tensor(): padding(lengths) must be at most the number of keys. Got a length of 5 and "
        "Lk=4. Pass lengths in 0..Lk.",
    ),
    (
        "qkv.documents([2, 3]).tensor(4, 4)",
        qkv.ShapeError,
        "Mask.tensor(): documents: lengths must sum exactly to Lk. Got lengths that sum to 5 and "
        "Lk=4. Make lengths sum to 4; for queries of another packing pass documents(lengths, "
        "k_lengths).",
    ),
    (
        "qkv.documents([2, 3], [2, 2]).tensor(4, 4)",
        qkv.ShapeError,
        "Mask.tensor(): documents: the queries' lengths must sum exactly to Lq. Got lengths that sum "
        "to 5 and Lq=4. Make the queries' lengths sum to 4.",
    ),
    (
        "qkv.documents([2, 2], [2, 3]).tensor(4, 4)",
        qkv.ShapeError,
        "Mask.tensor(): documents: the keys' lengths must sum exactly to Lk. Got lengths that sum to "
        "5 and Lk=4. Make the keys' lengths sum to 4.",
    ),
    (
        "qkv.documents(segment_ids=[0, 0, 0]).tensor(4, 4)",
        qkv.ShapeError,
        "Mask.tensor(): documents: ids must have length Lk. Got ids of length 3 and Lk=4. Make ids have length 4.",
    ),
    (
        "qkv.documents(segment_ids=[[0] * 4] * 2).tensor(4, 4, B=3)",
        qkv.ShapeError,
        "Mask.tensor(): documents: ids of two dimensions must be (B, L). Got ids of 2 rows and B=3. "
        "Pass 3 rows, or one row for all.",
    ),
    (
        "qkv.documents(segment_ids=[0] * 3, k_segment_ids=[0] * 4).tensor(4, 4)",
        qkv.ShapeError,
        "Mask.tensor(): documents: the queries' ids must have length Lq. Got ids of length 3 and "
        "Lq=4. Make the queries' ids have length 4.",
    ),
    (
        'qkv.blocks(torch.ones(2, 2, dtype=torch.bool), 4).tensor(8, 9, positions="start")',
        qkv.ShapeError,
        "Mask.tensor(): blocks: the map must cover Lk. Got map (1, 1, 2, 2) of blocks of 4, which "
        "covers 8, and Lk=9. Pass a map with nk >= 3.",
    ),
    (
        'qkv.blocks(torch.ones(2, 2, dtype=torch.bool), 4).tensor(9, 8, positions="start")',
        qkv.ShapeError,
        "Mask.tensor(): blocks: the map must cover Lq. Got map (1, 1, 2, 2) of blocks of 4, which "
        "covers 8, and Lq=9. Pass a map with nq >= 3.",
    ),
    (
        "qkv.blocks(torch.ones(2, 1, 2, 2, dtype=torch.bool), 4).tensor(8, 8, B=3)",
        qkv.ShapeError,
        "Mask.tensor(): blocks: the map must be (B or 1, Hq or 1, nq, nk). Got map (2, 1, 2, 2) of "
        "blocks of 4, B=3 and Hq=1. Give it one entry for each, or one for all.",
    ),
    (
        "qkv.per_head([qkv.causal()] * 3).tensor(4, 4, Hq=2)",
        qkv.ShapeError,
        "Mask.tensor(): per_head needs one mask for each query head. Got 3 masks and Hq=2. Pass 2 masks.",
    ),
    (
        "qkv.dense(torch.ones(3, 4, dtype=torch.bool)).tensor(4, 4)",
        qkv.ShapeError,
        "Mask.tensor(): a mask tensor must broadcast to (Lq, Lk). Got mask (3, 4) and Lq=4, Lk=4. "
        "Pass a bool tensor of shape (4, 4), with 1 where it is shared.",
    ),
    (
        "qkv.dense(torch.ones(2, 1, 4, 4, dtype=torch.bool)).tensor(4, 4, B=3)",
        qkv.ShapeError,
        "Mask.tensor(): a mask tensor must broadcast to (B, Hq, Lq, Lk). Got mask (2, 1, 4, 4) and "
        "B=3, Hq=1, Lq=4, Lk=4. Pass a bool tensor of shape (3, 1, 4, 4), with 1 where it is shared.",
    ),
    (
        "(qkv.causal() & ~qkv.padding([9])).tensor(4, 4)",
        qkv.ShapeError,
        "Mask.tensor(): padding(lengths) must be at most the number of keys. Got a length of 9 and "
        "Lk=4. Pass lengths in 0..Lk.",
    ),
    (
        'qkv.causal().tensor(4, 4, positions="middle")',
        qkv.ArgumentError,
        'Mask.tensor(): positions must be "start" or "end". Got positions=\'middle\'. Use "start" (p = '
        'i), "end" (p = i + Lk - Lq), an int, B ints or a (B or 1, Lq) integer tensor.',
    ),
    (
        "qkv.causal().tensor(4, 4, positions=1.5)",
        qkv.ArgumentTypeError,
        'Mask.tensor(): positions must be integers. Got positions=1.5 (float). Use "start", "end", '
        "an int, B ints or a (B or 1, Lq) integer tensor.",
    ),
    (
        "qkv.causal().tensor(4, 4, positions=True)",
        qkv.ArgumentTypeError,
        'Mask.tensor(): positions must be integers. Got positions=True (bool). Use "start", "end", '
        "an int, B ints or a (B or 1, Lq) integer tensor.",
    ),
    (
        "qkv.causal().tensor(4, 4, positions=[1, 2])",
        qkv.ShapeError,
        "Mask.tensor(): positions of one dimension must hold the first position of each batch row. "
        "Got positions (2,) and B=1. Pass 1 int, or a tensor of shape (1, 4) for the position of "
        "each query.",
    ),
    (
        "qkv.causal().tensor(4, 4, positions=torch.zeros(2, 4, dtype=torch.int64))",
        qkv.ShapeError,
        "Mask.tensor(): positions of two dimensions must be (B or 1, Lq). Got positions (2, 4), B=1 "
        "and Lq=4. Pass a tensor of shape (1, 4).",
    ),
    (
        "qkv.causal().tensor(4, 4, positions=torch.zeros(1, 3, dtype=torch.int64))",
        qkv.ShapeError,
        "Mask.tensor(): positions of two dimensions must be (B or 1, Lq). Got positions (1, 3), B=1 "
        "and Lq=4. Pass a tensor of shape (1, 4).",
    ),
    (
        "qkv.causal().tensor(4, 4, positions=torch.zeros(1, 4))",
        qkv.ArgumentTypeError,
        "Mask.tensor(): positions must hold integers. Got positions as a float32 tensor of shape (1, "
        "4). Convert it with .to(torch.int64).",
    ),
    (
        "qkv.causal().tensor(4, 4, positions=2**50)",
        qkv.ArgumentError,
        "Mask.tensor(): positions must be of magnitude <= 281474976710656. Got "
        "positions=1125899906842624. Pass smaller positions.",
    ),
    (
        "qkv.causal().tensor(-1, 4)",
        qkv.ArgumentError,
        "Mask.tensor(): Lq must be an integer >= 0. Got Lq=-1. Pass a whole number >= 0.",
    ),
    (
        "qkv.causal().tensor(4, 2.0)",
        qkv.ArgumentTypeError,
        "Mask.tensor(): Lk must be an integer. Got Lk=2.0 (float). Pass a whole number >= 0.",
    ),
    (
        "qkv.causal().tensor(4, 4, B=True)",
        qkv.ArgumentTypeError,
        "Mask.tensor(): B must be an integer. Got B=True (bool). Pass a whole number >= 0.",
    ),
    (
        "qkv.causal().tensor(2, 3)",
        qkv.ArgumentError,
        "Mask.tensor(): positions= must say where the queries stand when Lq != Lk and the mask "
        'depends on position. Got Lq=2, Lk=3 and causal(). Pass positions="start" or "end", drawn '
        "below, or the positions themselves.\n"
        'positions="start" (p = i):\n'
        "p/j 0 1 2\n"
        "  0 ■ · ·\n"
        "  1 ■ ■ ·\n"
        'positions="end" (p = i + 1):\n'
        "p/j 0 1 2\n"
        "  1 ■ ■ ·\n"
        "  2 ■ ■ ■",
    ),
    (
        "qkv.causal().picture(2, 3)",
        qkv.ArgumentError,
        "Mask.picture(): positions= must say where the queries stand when Lq != Lk and the mask "
        'depends on position. Got Lq=2, Lk=3 and causal(). Pass positions="start" or "end", drawn '
        "below, or the positions themselves.\n"
        'positions="start" (p = i):\n'
        "p/j 0 1 2\n"
        "  0 ■ · ·\n"
        "  1 ■ ■ ·\n"
        'positions="end" (p = i + 1):\n'
        "p/j 0 1 2\n"
        "  1 ■ ■ ·\n"
        "  2 ■ ■ ■",
    ),
    (
        "qkv.causal().picture(4, 4, b=1)",
        qkv.ArgumentError,
        "Mask.picture(): b must be an integer <= 0. Got b=1. Pass a smaller number.",
    ),
    (
        "qkv.causal().picture(4, 4, h=-1)",
        qkv.ArgumentError,
        "Mask.picture(): h must be an integer >= 0. Got h=-1. Pass a whole number >= 0.",
    ),
    (
        "qkv.causal().picture(4, 4, B=0)",
        qkv.ArgumentError,
        "Mask.picture(): B must be an integer >= 1. Got B=0. Pass a whole number >= 1.",
    ),
    (
        "qkv.causal().picture(4, 4, B=True)",
        qkv.ArgumentTypeError,
        "Mask.picture(): B must be an integer. Got B=True (bool). Pass a whole number >= 1.",
    ),
    (
        "qkv.masks.as_mask(1.0)",
        qkv.ArgumentTypeError,
        "qkv.attention(): a mask must be a qkv mask or a bool tensor, True = may attend. Got 1.0 "
        "(float). Write qkv.causal(), qkv.sliding_window(n), ...; make an array a tensor with "
        "torch.from_numpy(x).",
    ),
    (
        "qkv.documents(segment_ids=[[0, 1], 2])",
        qkv.ArgumentTypeError,
        "qkv.documents(): segment_ids must hold integers. Got an entry [0, 1] (list). Pass a list of "
        "whole numbers or an integer tensor.",
    ),
    (
        "qkv.documents(segment_ids=5)",
        qkv.ArgumentTypeError,
        "qkv.documents(): segment_ids must be a list or tensor of integers. Got segment_ids=5 (int). "
        "Pass a list of whole numbers or an integer tensor.",
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
    (
        "qkv.causal().tensor(4, 4, positions={})",
        qkv.ArgumentTypeError,
        'Mask.tensor(): positions must be integers. Got positions={} (dict). Use "start", "end", an '
        "int, B ints or a (B or 1, Lq) integer tensor.",
    ),
    (
        "qkv.causal().tensor(4, 4, positions=None, Hq=-2)",
        qkv.ArgumentError,
        "Mask.tensor(): Hq must be an integer >= 0. Got Hq=-2. Pass a whole number >= 0.",
    ),
    (
        "qkv.causal().picture(2**20, 2**20)",
        qkv.ArgumentError,
        "Mask.picture(): Lq * Lk must be at most 268435456. Got Lq=1048576, Lk=1048576. Draw a shorter piece.",
    ),
    (
        "qkv.causal().tensor(20000, 1000)",
        qkv.ArgumentError,
        "Mask.tensor(): positions= must say where the queries stand when Lq != Lk and the mask "
        'depends on position. Got Lq=20000, Lk=1000 and causal(). Pass positions="start" or "end", '
        "drawn below, or the positions themselves.\n"
        'positions="start" (p = i)\n'
        'positions="end" (p = i - 19000)',
    ),
    (
        "qkv.mask_mod(lambda b, h, p, j: True).tensor(2, 2)",
        qkv.ArgumentTypeError,
        "mask_mod(<lambda>): the function must return a bool tensor. Got True. Return a comparison "
        "of its arguments, e.g. j <= p.",
    ),
    (
        "qkv.mask_mod(lambda b, h, p, j: j - p).tensor(2, 2)",
        qkv.ArgumentTypeError,
        "mask_mod(<lambda>): the function must return a bool tensor. Got an int64 tensor of shape "
        "(1, 1, 2, 2). Return a comparison of its arguments, e.g. j <= p.",
    ),
    (
        "qkv.mask_mod(lambda b, h, p, j: torch.ones(5, dtype=torch.bool)).tensor(2, 2)",
        qkv.ShapeError,
        "mask_mod(<lambda>): the function's result must broadcast to its arguments. Got a result "
        "(5,) for arguments that broadcast to (1, 1, 2, 2). Compute it elementwise from b, h, p and "
        "j.",
    ),
    (
        'qkv.dense(torch.ones(2, 2, dtype=torch.bool)).check("f()", B=1, Hq=1, Lq=2, Lk=2, device="cuda")',
        qkv.ArgumentError,
        "f(): a mask tensor must be on the device of the queries. Got a mask on cpu and queries on "
        "cuda. Move it with .to().",
    ),
]


@pytest.mark.parametrize(("text", "kind", "message"), CASES, ids=[case[0] for case in CASES])
def test_malformed(text: str, kind: type[qkv.QKVError], message: str) -> None:
    with pytest.raises(kind) as caught:
        eval(text, {"qkv": qkv, "torch": torch})
    assert type(caught.value) is kind
    assert str(caught.value) == message
    assert isinstance(caught.value, (ValueError, TypeError))


def test_no_case_is_listed_twice() -> None:
    assert len({text for text, _, _ in CASES}) == len(CASES) >= 100


@pytest.mark.parametrize("integer", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)])
def test_every_kind_of_integer_is_taken(integer: object) -> None:
    assert qkv.sliding_window(integer) == qkv.sliding_window(3)  # type: ignore[arg-type]
    assert qkv.prefix(integer) == qkv.prefix(3)


@pytest.mark.parametrize(
    "lengths",
    [[3, 5], (3, 5), np.array([3, 5]), torch.tensor([3, 5], dtype=torch.int32), [np.int64(3), torch.tensor(5)]],
    ids=lambda x: type(x).__name__,
)
def test_every_kind_of_list_is_taken(lengths: object) -> None:
    assert qkv.documents(lengths) == qkv.documents([3, 5])
    assert qkv.padding(lengths) == qkv.padding([3, 5])
    assert qkv.prefix(lengths) == qkv.prefix([3, 5])
    assert qkv.documents(segment_ids=lengths) == qkv.documents(segment_ids=[[3, 5]])
    assert qkv.documents(segment_ids=np.array([[3, 5]])) == qkv.documents(segment_ids=[[3, 5]])


def test_a_numpy_mask_is_not_guessed_at() -> None:
    with pytest.raises(qkv.ArgumentTypeError, match=r"torch\.from_numpy"):
        qkv.masks.as_mask(np.ones((2, 2), dtype=bool))


def test_the_function_of_a_mask_mod_raises_its_own_errors() -> None:
    def broken(b: object, h: object, p: object, j: object) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        qkv.mask_mod(broken).tensor(2, 2)


def test_other_torch_functions_refuse_a_mask() -> None:
    t = torch.ones(2, 2, dtype=torch.bool)
    for use in (
        lambda: torch.where(qkv.causal(), t, t),
        lambda: t + qkv.causal(),
        lambda: torch.softmax(qkv.causal(), 0),
    ):
        with pytest.raises(TypeError):
            use()
