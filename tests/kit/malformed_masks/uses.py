"""Operators, and everything that uses a mask: sizes, positions, pictures."""

from __future__ import annotations

import qkv

CASES: list[tuple[str, type[qkv.QKVError], str]] = [
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
        "qkv.selected_blocks(torch.ones(2, 1, 2, 2).int(), 4).tensor(2, 8, B=3)",
        qkv.ShapeError,
        "Mask.tensor(): selected_blocks: indices must be (B or 1, H, rows, n), and H must divide Hq. Got "
        "indices (2, 1, 2, 2), B=3 and Hq=1. Give them a list for each batch row and head of keys, or one for all.",
    ),
    (
        "qkv.selected_blocks(torch.ones(1, 2, 2, 2).int(), 4).tensor(2, 8, Hq=3)",
        qkv.ShapeError,
        "Mask.tensor(): selected_blocks: indices must be (B or 1, H, rows, n), and H must divide Hq. Got "
        "indices (1, 2, 2, 2), B=1 and Hq=3. Give them a list for each batch row and head of keys, or one for all.",
    ),
    (
        "qkv.selected_blocks(torch.ones(1, 1, 2, 2).int(), 4, queries=3).tensor(7, 8)",
        qkv.ShapeError,
        "Mask.tensor(): selected_blocks: there must be a list for every query. Got indices (1, 1, 2, 2) with "
        "queries=3, which cover 6, and Lq=7. Pass 3 rows of lists.",
    ),
    (
        "qkv.selected_blocks(torch.ones(1, 1, 2, 2).int(), 4)"
        '.check("f()", qkv.masks.Sizes(1, 1, 2, 2, device=torch.device("cuda")))',
        qkv.ArgumentError,
        "f(): the indices of selected blocks must be on the device of the queries. Got a mask on cpu and queries "
        "on cuda. Move it with .to().",
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
        "qkv.mask_mod(lambda b, h, p, j: j <= p).picture(2**20, 2**20)",
        qkv.ArgumentError,
        "Mask.picture(): Lq * Lk must be at most 268435456 where a mask is a tensor or a function. "
        "Got Lq=1048576, Lk=1048576. Draw a shorter piece.",
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
        "qkv.dense(torch.ones(2, 2, dtype=torch.bool))"
        '.check("f()", qkv.masks.Sizes(1, 1, 2, 2, device=torch.device("cuda")))',
        qkv.ArgumentError,
        "f(): a mask tensor must be on the device of the queries. Got a mask on cpu and queries on "
        "cuda. Move it with .to().",
    ),
]
