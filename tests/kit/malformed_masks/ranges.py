"""Constructors of ranges and documents."""

from __future__ import annotations

import qkv

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
        "qkv.documents(): lengths are those of one packed row, shared by the batch. Got lengths=[[1, 2]]. Where rows "
        "differ pass segment_ids=, (B, L), each token's document: "
        "torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]).",
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
]
