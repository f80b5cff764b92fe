"""Malformed calls of the public functions: each has its exact error class, and a message with rule, sizes and fix.

An entry of a table is a name: (what to call with, the class, words that the message must contain).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import qkv
from qkv import ArgumentError, ArgumentTypeError, ShapeError, UnsupportedError

Entry = tuple[Any, type[Exception], tuple[str, ...]]


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def b(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def changed_lists() -> qkv.Mask:
    lists = torch.zeros(1, 1, 6, 2, dtype=torch.int64)
    mask = qkv.selected_blocks(lists, 4)
    lists[0, 0, 1] = 1
    return mask


def changed_mask() -> qkv.Mask:
    seen = b(6, 9)
    mask = qkv.dense(seen)
    seen[0, 0] = False
    return mask


BASE: dict[str, Any] = {"q": t(2, 4, 6, 8), "k": t(2, 2, 9, 8), "v": t(2, 2, 9, 8), "positions": "end"}
S, A, T, U = ShapeError, ArgumentError, ArgumentTypeError, UnsupportedError

# What is wrong with one argument (or more) of attention(); plan() takes the same ones.
CALLS: dict[str, Entry] = {
    "q is None": ({"q": None}, T, ("q", "NoneType")),
    "q is a list": ({"q": [[1.0]]}, T, ("q", "list")),
    "q is an array": ({"q": np.ones((2, 4, 6, 8))}, T, ("q", "ndarray")),
    "k is a list": ({"k": [1.0]}, T, ("k", "list")),
    "v is a string": ({"v": "v"}, T, ("v", "str")),
    "q is 3-D": ({"q": t(4, 6, 8)}, S, ("q", "(4, 6, 8)")),
    "k is 3-D": ({"k": t(2, 9, 8)}, S, ("k", "(2, 9, 8)")),
    "v is 5-D": ({"v": t(1, 2, 2, 9, 8)}, S, ("v", "(1, 2, 2, 9, 8)")),
    "q is 0-D": ({"q": t()}, S, ("q", "()")),
    "q is int": ({"q": t(2, 4, 6, 8, dtype=torch.int64)}, T, ("q", "int64")),
    "all are int": ({n: t(2, 2, 9, 8, dtype=torch.int32) for n in "qkv"}, T, ("q", "int32")),
    "k is bool": ({"k": b(2, 2, 9, 8)}, T, ("k", "bool")),
    "q is complex": ({"q": t(2, 4, 6, 8, dtype=torch.complex64)}, T, ("q", "complex64")),
    "v is float8": ({"v": t(2, 2, 9, 8).to(torch.float8_e4m3fn)}, T, ("v", "float8_e4m3fn")),
    "q is sparse": ({"q": t(2, 4, 6, 8).to_sparse()}, T, ("q", "sparse")),
    "dtypes differ": ({"k": t(2, 2, 9, 8, dtype=torch.float64)}, T, ("q float32", "k float64", "v float32")),
    "dtype of v": ({"v": t(2, 2, 9, 8, dtype=torch.bfloat16)}, T, ("v bfloat16",)),
    "devices differ": ({"k": torch.empty(2, 2, 9, 8, device="meta")}, T, ("q on cpu", "k on meta")),
    "batch of q": ({"q": t(3, 4, 6, 8)}, S, ("(3, 4, 6, 8)", "(2, 2, 9, 8)")),
    "batch of v": ({"v": t(1, 2, 9, 8)}, S, ("(1, 2, 9, 8)", "expand")),
    "batch of k of 1": ({"k": t(1, 2, 9, 8), "v": t(1, 2, 9, 8)}, S, ("(1, 2, 9, 8)", "expand")),
    "head size": ({"k": t(2, 2, 9, 16)}, S, ("D=8", "D=16")),
    "head size 0": ({"q": t(2, 4, 6, 0), "k": t(2, 2, 9, 0)}, S, ("(2, 4, 6, 0)",)),
    "lengths of k and v": ({"v": t(2, 2, 10, 8)}, S, ("Lk=9", "Lk=10")),
    "length of v is 0": ({"v": t(2, 2, 0, 8)}, S, ("Lk=9", "Lk=0")),
    "heads of k and v": ({"v": t(2, 4, 9, 8)}, S, ("Hkv=2", "Hkv=4")),
    "heads": ({"q": t(2, 5, 6, 8)}, S, ("Hq=5", "Hkv=2", "{1, 5}")),
    "fewer query heads": ({"q": t(2, 1, 6, 8)}, S, ("Hq=1", "Hkv=2")),
    "no key heads": ({"k": t(2, 0, 9, 8), "v": t(2, 0, 9, 8)}, S, ("Hq=4", "Hkv=0")),
    "no query heads": ({"q": t(2, 0, 6, 8)}, S, ("Hq=0", "Hkv=2")),
    "heads after length": ({"q": t(2, 18, 5, 8), "k": t(2, 9, 4, 8), "v": t(2, 9, 4, 8).mT}, S, ("(2, 9, 8, 4)",)),
    "mask is a float tensor": ({"mask": t(6, 9)}, T, ("float32", "bias=")),
    "mask is an int tensor": ({"mask": t(6, 9, dtype=torch.int64)}, T, ("int64", "!= 0")),
    "mask is a string": ({"mask": "causal"}, T, ("'causal'", "qkv.causal()")),
    "mask is a constructor": ({"mask": qkv.causal}, T, ("mask_mod",)),
    "mask is True": ({"mask": True}, T, ("True",)),
    "mask is an array": ({"mask": np.ones((6, 9), bool)}, T, ("from_numpy",)),
    "mask is a list": ({"mask": [[True]]}, T, ("list",)),
    "mask shape": ({"mask": b(6, 8)}, S, ("(6, 8)", "Lq=6", "Lk=9")),
    "mask shape transposed": ({"mask": b(9, 6)}, S, ("(9, 6)",)),
    "mask batch": ({"mask": b(3, 1, 6, 9)}, S, ("(3, 1, 6, 9)", "B=2")),
    "mask heads are key heads": ({"mask": b(2, 2, 6, 9)}, S, ("(2, 2, 6, 9)", "Hq=4")),
    "mask is 3-D": ({"mask": b(2, 6, 9)}, S, ("(2, 6, 9)",)),
    "mask is 1-D": ({"mask": b(9)}, S, ("(9,)",)),
    "mask was changed": ({"mask": changed_mask()}, A, ("changed", "dense")),
    "selected blocks were changed": ({"mask": changed_lists()}, A, ("changed", "selected_blocks")),
    "mask on another device": ({"mask": torch.empty(6, 9, dtype=torch.bool, device="meta")}, A, ("meta",)),
    "padding of another batch": ({"mask": qkv.padding([9])}, S, ("B=2", "1 value")),
    "padding beyond the keys": ({"mask": qkv.padding([3, 10])}, S, ("10", "Lk=9")),
    "prefix of another batch": ({"mask": qkv.prefix([1, 2, 3])}, S, ("B=2", "3 values")),
    "documents sum": ({"mask": qkv.documents([4, 4])}, S, ("8", "9")),
    "documents by index sum": ({"mask": qkv.documents([3, 2], [4, 5])}, S, ("5", "6")),
    "documents of k sum": ({"mask": qkv.documents([3, 3], [4, 4])}, S, ("8", "9")),
    "segment ids length": ({"mask": qkv.documents(segment_ids=torch.zeros(8, dtype=torch.int64))}, S, ("8", "9")),
    "segment ids batch": ({"mask": qkv.documents(segment_ids=torch.zeros(3, 9, dtype=torch.int64))}, S, ("3", "B=2")),
    "blocks too few for k": ({"mask": qkv.blocks(b(3, 2), 4)}, S, ("Lk=9", "nk")),
    "blocks too few for q": ({"mask": qkv.blocks(b(1, 3), 4)}, S, ("Lq=6", "nq")),
    "blocks of another batch": ({"mask": qkv.blocks(b(3, 1, 2, 3), 4)}, S, ("B=2",)),
    "per_head count": ({"mask": qkv.per_head([qkv.causal()] * 3)}, S, ("3 masks", "Hq=4")),
    "a part of a composition": ({"mask": qkv.causal() & (qkv.padding([1]) | ~qkv.prefix(2))}, S, ("B=2",)),
    "mask_mod returns floats": ({"mask": qkv.mask_mod(lambda b, h, p, j: (j - p).float())}, T, ("bool",)),
    "mask_mod returns nothing": ({"mask": qkv.mask_mod(lambda b, h, p, j: None)}, T, ("None",)),
    "mask_mod of another shape": ({"mask": qkv.mask_mod(lambda b, h, p, j: torch.ones(3, 5) > 0)}, S, ("(3, 5)",)),
    "positions left out": ({"mask": qkv.causal(), "positions": None}, A, ("Lq=6", "Lk=9", '"start"', '"end"', "■")),
    "positions left out for a bias": (
        {"bias": qkv.alibi([1.0] * 4), "positions": None}, A, ("Lq=6", "Lk=9", '"start"', '"end"', "■")),
    "positions of another word": ({"positions": "middle"}, A, ("'middle'", '"end"')),
    "positions is a float": ({"positions": 1.5}, T, ("1.5",)),
    "positions is True": ({"positions": True}, T, ("True",)),
    "positions is a float tensor": ({"positions": torch.zeros(1, 6)}, T, ("float32",)),
    "positions of another batch": ({"positions": [1, 2, 3]}, S, ("(3,)", "B=2")),
    "positions of another length": ({"positions": torch.zeros(2, 5, dtype=torch.int64)}, S, ("(2, 5)", "Lq=6")),
    "positions of three rows": ({"positions": torch.zeros(3, 6, dtype=torch.int64)}, S, ("(3, 6)", "B=2")),
    "positions is 3-D": ({"positions": torch.zeros(1, 1, 6, dtype=torch.int64)}, S, ("(1, 1, 6)",)),
    "positions too large": ({"positions": 2**62}, A, (str(2**62),)),
    "positions hold None": ({"positions": [1, None]}, T, ("None",)),
    "bias is a bool tensor": ({"bias": b(6, 9)}, T, ("bool", "mask=")),
    "bias is an int tensor": ({"bias": t(6, 9, dtype=torch.int64)}, T, ("int64",)),
    "bias is of a third dtype": ({"bias": t(6, 9, dtype=torch.float64)}, T, ("float64", "float32")),
    "bias shape": ({"bias": t(6, 8)}, S, ("(6, 8)", "(2, 4, 6, 9)")),
    "bias batch": ({"bias": t(3, 1, 6, 9)}, S, ("(3, 1, 6, 9)",)),
    "bias is 5-D": ({"bias": t(1, 1, 1, 6, 9)}, S, ("(1, 1, 1, 6, 9)",)),
    "bias is a function": ({"bias": lambda s, b, h, p, j: s}, T, ("score_mod",)),
    "bias is a number": ({"bias": 1.0}, T, ("float",)),
    "bias is a mask": ({"bias": qkv.causal()}, T, ("bias",)),
    "alibi slopes count": ({"bias": qkv.alibi([1.0, 2.0])}, S, ("2 slopes", "Hq=4")),
    "relative table heads": ({"bias": qkv.relative(t(2, 5))}, S, ("(2, 5)", "Hq=4")),
    "t5 table heads": ({"bias": qkv.relative(t(2, 32), buckets="t5")}, S, ("(2, 32)", "Hq=4")),
    "score_mod returns ints": ({"bias": qkv.score_mod(lambda s, b, h, p, j: p - j)}, T, ("int64",)),
    "score_mod returns a number": ({"bias": qkv.score_mod(lambda s, b, h, p, j: 0.5)}, T, ("float",)),
    "score_mod of another shape": ({"bias": qkv.score_mod(lambda s, b, h, p, j: torch.ones(3, 5))}, S, ("(3, 5)",)),
    "second term of a sum": ({"bias": qkv.alibi([1.0] * 4) + qkv.relative(t(3, 5))}, S, ("(3, 5)", "Hq=4")),
    "scale is nan": ({"scale": float("nan")}, A, ("scale=nan",)),
    "scale is inf": ({"scale": float("inf")}, A, ("scale=inf",)),
    "scale is a string": ({"scale": "auto"}, T, ("'auto'",)),
    "scale is a tensor": ({"scale": torch.tensor(0.1)}, T, ("scale",)),
    "scale is True": ({"scale": True}, T, ("True",)),
    "scale is complex": ({"scale": 1j}, T, ("1j",)),
    "softcap is 0": ({"softcap": 0.0}, A, ("softcap=0",)),
    "softcap is negative": ({"softcap": -5.0}, A, ("softcap=-5",)),
    "softcap is nan": ({"softcap": float("nan")}, A, ("softcap=nan",)),
    "softcap is inf": ({"softcap": float("inf")}, A, ("softcap=inf",)),
    "softcap is a list": ({"softcap": [30.0]}, T, ("list",)),
    "softcap is a bool": ({"softcap": False}, T, ("False",)),
    "sinks is a list": ({"sinks": [0.0] * 4}, T, ("sinks",)),
    "sinks is a number": ({"sinks": 0.0}, T, ("sinks",)),
    "sinks is int": ({"sinks": t(4, dtype=torch.int64)}, T, ("sinks",)),
    "sinks of key heads": ({"sinks": t(2)}, S, ("(2,)", "Hq=4")),
    "sinks is 2-D": ({"sinks": t(2, 4)}, S, ("(2, 4)", "Hq=4")),
    "sinks is 0-D": ({"sinks": t()}, S, ("()", "Hq=4")),
    "sinks on another device": ({"sinks": torch.empty(4, device="meta")}, T, ("meta", "cpu")),
    "dropout is 1": ({"dropout_p": 1.0}, A, ("dropout_p=1",)),
    "dropout is negative": ({"dropout_p": -0.1}, A, ("dropout_p=-0.1",)),
    "dropout is nan": ({"dropout_p": float("nan")}, A, ("dropout_p=nan",)),
    "dropout is None": ({"dropout_p": None}, T, ("None",)),
    "dropout is True": ({"dropout_p": True}, T, ("True",)),
    "dropout is a string": ({"dropout_p": "0.1"}, T, ("'0.1'",)),
    "return_lse is 1": ({"return_lse": 1}, T, ("return_lse=1",)),
    "return_lse is a string": ({"return_lse": "yes"}, T, ("'yes'",)),
    "backend is unknown": ({"backend": "flash"}, A, ("'flash'", "tiled")),
    "backend is a number": ({"backend": 3}, T, ("backend=3",)),
    "backend is an unknown instruction set": ({"backend": "cpu:sse9"}, A, ("'cpu:sse9'", "cpu:avx2")),
    "sdpa has no softcap": ({"backend": "sdpa", "softcap": 5.0}, U, ("softcap", "sdpa")),
    "sdpa has no bias": ({"backend": "sdpa", "bias": t(6, 9)}, U, ("sdpa",)),
    "sdpa has no window": ({"backend": "sdpa", "mask": qkv.sliding_window(3)}, U, ("mask", "sdpa")),
    "sdpa has no lse": ({"backend": "sdpa", "return_lse": True}, U, ("log-sum-exp", "sdpa")),
    "sdpa has no sinks": ({"backend": "sdpa", "sinks": t(4)}, U, ("sinks", "sdpa")),
}  # fmt: skip
# What only a function's result can tell. plan() runs nothing.
LATE = ("mask_mod", "score_mod returns", "score_mod of")

# (function, arguments): the class and the words.
CONSTRUCTORS: dict[str, Entry] = {
    "sliding_window of 0": (lambda: qkv.sliding_window(0), A, ("n=0", ">= 1")),
    "sliding_window negative": (lambda: qkv.sliding_window(-4), A, ("n=-4",)),
    "sliding_window of a float": (lambda: qkv.sliding_window(4.0), T, ("4.0", "float")),
    "sliding_window of True": (lambda: qkv.sliding_window(True), T, ("True", "bool")),
    "sliding_window of None": (lambda: qkv.sliding_window(None), T, ("None",)),
    "sliding_window of a tensor": (lambda: qkv.sliding_window(torch.ones(2)), T, ("n",)),
    "sliding_window huge": (lambda: qkv.sliding_window(2**60), A, (str(2**60),)),
    "window negative": (lambda: qkv.window(-1, 0), A, ("left=-1",)),
    "window right negative": (lambda: qkv.window(3, -2), A, ("right=-2",)),
    "window of a string": (lambda: qkv.window("4", 0), T, ("'4'",)),
    "prefix negative": (lambda: qkv.prefix(-1), A, ("-1",)),
    "prefix of a float": (lambda: qkv.prefix(2.5), T, ("2.5",)),
    "prefix of floats": (lambda: qkv.prefix([1.0, 2.0]), T, ("1.0",)),
    "prefix 2-D": (lambda: qkv.prefix(torch.ones(2, 2, dtype=torch.int64)), S, ("(2, 2)",)),
    "prefix of a negative row": (lambda: qkv.prefix([3, -1]), A, ("-1",)),
    "padding of a number": (lambda: qkv.padding(5), T, ("5",)),
    "padding negative": (lambda: qkv.padding([3, -2]), A, ("-2",)),
    "padding of bools": (lambda: qkv.padding([True, False]), T, ("True",)),
    "padding of a bool tensor": (lambda: qkv.padding(b(2, 9)), T, ("bool",)),
    "padding side": (lambda: qkv.padding([3], side="top"), A, ("'top'", "left")),
    "documents of nothing": (lambda: qkv.documents(), T, ("neither",)),
    "documents given twice": (lambda: qkv.documents([2], segment_ids=torch.zeros(2, dtype=torch.int64)), T, ("both",)),
    "documents of a number": (lambda: qkv.documents(8), T, ("8",)),
    "documents negative": (lambda: qkv.documents([3, -1]), A, ("-1",)),
    "documents of floats": (lambda: qkv.documents(torch.tensor([1.0])), T, ("float32",)),
    "documents counts": (lambda: qkv.documents([3, 2], [5]), S, ("2 lengths", "1 k_lengths")),
    "documents k alone": (lambda: qkv.documents(segment_ids=[0], k_lengths=[1]), T, ("k_lengths",)),
    "segments 3-D": (lambda: qkv.documents(segment_ids=torch.zeros(1, 1, 2, dtype=torch.int64)), S, ("(1, 1, 2)",)),
    "segments of two batches": (
        lambda: qkv.documents(segment_ids=torch.zeros(2, 4, dtype=torch.int64),
                              k_segment_ids=torch.zeros(3, 4, dtype=torch.int64)), S, ("2 and 3",)),
    "chunked of 0": (lambda: qkv.chunked(0), A, ("n=0",)),
    "chunked of a float": (lambda: qkv.chunked(2.0), T, ("2.0",)),
    "strided of 0": (lambda: qkv.strided(0), A, ("n=0",)),
    "strided offset": (lambda: qkv.strided(2, 0.5), T, ("0.5",)),
    "dilated negative": (lambda: qkv.dilated(-1, 2), A, ("window=-1",)),
    "dilated step 0": (lambda: qkv.dilated(1, 0), A, ("step=0",)),
    "global negative": (lambda: qkv.global_tokens([-1]), A, ("-1",)),
    "global of a number": (lambda: qkv.global_tokens(3), T, ("3",)),
    "global of floats": (lambda: qkv.global_tokens([0.5]), T, ("0.5",)),
    "random negative": (lambda: qkv.random_blocks(-1, 4, 0), A, ("per_row=-1",)),
    "random block 0": (lambda: qkv.random_blocks(1, 0, 0), A, ("block=0",)),
    "random seed": (lambda: qkv.random_blocks(1, 4, -3), A, ("seed=-3",)),
    "blocks of floats": (lambda: qkv.blocks(t(2, 2), 4), T, ("float32",)),
    "blocks 3-D": (lambda: qkv.blocks(b(1, 2, 2), 4), S, ("(1, 2, 2)",)),
    "blocks of size 0": (lambda: qkv.blocks(b(2, 2), 0), A, ("block=0",)),
    "per_head of a mask": (lambda: qkv.per_head(qkv.causal()), T, ("list",)),
    "per_head with None": (lambda: qkv.per_head([qkv.causal(), None]), T, ("head 1",)),
    "per_head of strings": (lambda: qkv.per_head(["causal"]), T, ("'causal'",)),
    "dense of floats": (lambda: qkv.dense(t(2, 2)), T, ("float32", "bias=")),
    "dense of a list": (lambda: qkv.dense([[True]]), T, ("list",)),
    "dense 3-D": (lambda: qkv.dense(b(1, 2, 2)), S, ("(1, 2, 2)",)),
    "mask_mod of a number": (lambda: qkv.mask_mod(3), T, ("3", "fn")),
    "bigbird block": (lambda: qkv.bigbird(0), A, ("block=0",)),
    "bigbird window": (lambda: qkv.bigbird(4, window_blocks=0), A, ("window_blocks=0",)),
    "longformer odd": (lambda: qkv.longformer(5), A, ("window=5", "even")),
    "longformer dilation": (lambda: qkv.longformer(4, dilation=0), A, ("dilation=0",)),
    "and with None": (lambda: qkv.causal() & None, T, ("None",)),
    "or with a number": (lambda: qkv.causal() | 3, T, ("3",)),
    "and with floats": (lambda: qkv.causal() & t(2, 2), T, ("float32",)),
    "a mask as a truth value": (lambda: bool(qkv.causal()), T, ("& | ~",)),
    "masks joined by and": (lambda: qkv.causal() and qkv.prefix(1), T, ("& | ~",)),
    "tensor of a negative length": (lambda: qkv.causal().tensor(-1, 4), A, ("Lq=-1",)),
    "tensor of two readings": (lambda: qkv.causal().tensor(2, 4), A, ("Lq=2", "Lk=4", "■")),
    "tensor of a wrong sum": (lambda: qkv.documents([3]).tensor(4, 4), S, ("3", "4")),
    "picture of a head that is not": (lambda: qkv.causal().picture(4, 4, h=2), A, ("h=2",)),
    "picture of a float": (lambda: qkv.causal().picture(4.0, 4), T, ("4.0",)),
    "alibi of a number": (lambda: qkv.alibi(1.0), T, ("1.0",)),
    "alibi of strings": (lambda: qkv.alibi(["a"]), T, ("'a'",)),
    "alibi nan": (lambda: qkv.alibi([float("nan")]), A, ("nan",)),
    "alibi 2-D": (lambda: qkv.alibi(t(2, 2)), S, ("(2, 2)",)),
    "alibi of ints": (lambda: qkv.alibi(t(2, dtype=torch.int64)), T, ("int64",)),
    "relative of a list": (lambda: qkv.relative([[1.0]]), T, ("list",)),
    "relative even": (lambda: qkv.relative(t(2, 4)), S, ("(2, 4)", "2R + 1")),
    "relative 1-D": (lambda: qkv.relative(t(5)), S, ("(5,)",)),
    "relative buckets": (lambda: qkv.relative(t(2, 5), buckets="t6"), A, ("'t6'", "t5")),
    "relative distance": (lambda: qkv.relative(t(2, 32), buckets="t5", max_distance=4), A, ("max_distance=4",)),
    "relative distance of a float": (lambda: qkv.relative(t(2, 32), buckets="t5", max_distance=9.5), T, ("9.5",)),
    "relative without buckets": (lambda: qkv.relative(t(2, 5), max_distance=9), A, ("max_distance=9",)),
    "relative direction": (lambda: qkv.relative(t(2, 32), buckets="t5", bidirectional="no"), T, ("'no'",)),
    "score_mod of a number": (lambda: qkv.score_mod(3), T, ("fn", "int")),
    "terms with a string": (lambda: qkv.alibi([1.0]) + "x", T, ("str",)),
}  # fmt: skip

OUT, LSE = t(2, 3, 4), t(2, 3)
OTHERS: dict[str, Entry] = {
    "merge of a list": (lambda: qkv.merge([1.0], LSE, OUT, LSE), T, ("out1", "list")),
    "merge lse None": (lambda: qkv.merge(OUT, LSE, OUT, None), T, ("lse2", "NoneType")),
    "merge of two shapes": (lambda: qkv.merge(OUT, LSE, t(2, 3, 5), LSE), S, ("(2, 3, 4)", "(2, 3, 5)")),
    "merge lse shape": (lambda: qkv.merge(OUT, t(2, 4), OUT, LSE), S, ("(2, 4)",)),
    "merge lse with a last dimension": (lambda: qkv.merge(OUT, t(2, 3, 1), OUT, t(2, 3, 1)), S, ("(2, 3, 1)",)),
    "merge 1-D": (lambda: qkv.merge(t(3), t(), t(3), t()), S, ("(3,)",)),
    "merge of ints": (lambda: qkv.merge(OUT.long(), LSE, OUT.long(), LSE), T, ("int64",)),
    "merge of two dtypes": (lambda: qkv.merge(OUT, LSE, OUT.double(), LSE), T, ("float32", "float64")),
    "merge lse dtype": (lambda: qkv.merge(OUT.bfloat16(), LSE.bfloat16(), OUT.bfloat16(), LSE), T, ("bfloat16",)),
    "merge lse of float64": (lambda: qkv.merge(OUT.double(), LSE, OUT.double(), LSE), T, ("float64",)),
    "merge of two devices": (lambda: qkv.merge(OUT, LSE, OUT.to("meta"), LSE.to("meta")), T, ("meta",)),
    "weights of 3-D": (lambda: qkv.weights(t(4, 6, 8), t(2, 9, 8)), S, ("(4, 6, 8)",)),
    "weights of None": (lambda: qkv.weights(t(1, 1, 2, 8), None), T, ("k",)),
    "weights heads": (lambda: qkv.weights(t(1, 3, 2, 8), t(1, 2, 2, 8)), S, ("Hq=3", "Hkv=2")),
    "weights head size": (lambda: qkv.weights(t(1, 2, 2, 8), t(1, 2, 2, 4)), S, ("D=8", "D=4")),
    "weights rows outside": (lambda: qkv.weights(t(1, 1, 2, 8), t(1, 1, 2, 8), rows=[2]), A, ("Lq=2", "[2]")),
    "weights rows before": (lambda: qkv.weights(t(1, 1, 2, 8), t(1, 1, 2, 8), rows=-3), A, ("Lq=2", "-3")),
    "weights rows of floats": (lambda: qkv.weights(t(1, 1, 2, 8), t(1, 1, 2, 8), rows=[0.5]), T, ("0.5",)),
    "weights rows of a mask": (lambda: qkv.weights(t(1, 1, 2, 8), t(1, 1, 2, 8), rows=b(2)), T, ("bool",)),
    "weights rows of a bad slice": (lambda: qkv.weights(t(1, 1, 2, 8), t(1, 1, 2, 8), rows=slice("a")), T, ("rows",)),
    "weights mask": (lambda: qkv.weights(t(1, 1, 2, 8), t(1, 1, 2, 8), mask=t(2, 2)), T, ("float32", "bias=")),
    "weights positions": (lambda: qkv.weights(t(1, 1, 2, 8), t(1, 1, 3, 8), mask=qkv.causal()), A, ("Lq=2", "Lk=3")),
    "weights scale": (lambda: qkv.weights(t(1, 1, 2, 8), t(1, 1, 2, 8), scale=float("inf")), A, ("scale=inf",)),
    "weights sinks": (lambda: qkv.weights(t(1, 1, 2, 8), t(1, 1, 2, 8), sinks=t(2)), S, ("(2,)", "Hq=1")),
    "attention without v": (lambda: qkv.attention(t(1, 1, 2, 8), t(1, 1, 2, 8)), T, ("v", "view")),
    "third derivative": (lambda: three_times("tiled"), U, ("gradient of a gradient of a gradient", "reference")),
    "score_mod that learns": (lambda: learned_score_mod(), U, ("score_mod", "gradient")),
}  # fmt: skip

MESSAGE = re.compile(r"(?P<call>.+?): (?P<rule>.+)\. Got (?P<given>.+?)\. (?P<fix>.+\..*)", re.DOTALL)


def three_times(backend: str) -> None:
    q = t(1, 1, 2, 8).requires_grad_()
    found = qkv.attention(q, t(1, 1, 2, 8), t(1, 1, 2, 8), backend=backend)
    for last in (False, False, True):
        (found,) = torch.autograd.grad((found**2).mean(), q, create_graph=not last)


def learned_score_mod() -> None:
    weight = t(1).requires_grad_()
    qkv.attention(*(t(1, 1, 2, 8),) * 3, bias=qkv.score_mod(lambda s, b, h, p, j: s * weight))


def refused(function: Callable[[], Any], kind: type[Exception], words: tuple[str, ...], call: str) -> None:
    with pytest.raises(qkv.QKVError) as caught:
        function()
    error = caught.value
    message = str(error)
    assert type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {message}"
    assert isinstance(error, (ValueError, TypeError))
    parts = MESSAGE.fullmatch(message)
    assert parts, f"not 'call: rule. Got given. Fix.': {message}"
    assert call in parts["call"], message
    assert all(len(parts[name].strip()) >= 3 or name == "given" for name in ("rule", "given", "fix")), message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("name", CALLS)
def test_attention(name: str) -> None:
    changes, kind, words = CALLS[name]
    refused(lambda: qkv.attention(**BASE | changes), kind, words, "mask_mod" if "mask_mod" in name else "qkv.")


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith(LATE)])
def test_plan(name: str) -> None:
    """plan() raises whatever attention() would."""
    changes, kind, words = CALLS[name]
    refused(lambda: qkv.plan(**BASE | changes), kind, words, "qkv.")


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name: str) -> None:
    function, kind, words = CONSTRUCTORS[name]
    refused(function, kind, words, "")


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    function, kind, words = OTHERS[name]
    refused(function, kind, words, "")


def test_there_are_enough() -> None:
    assert len(CALLS) + len(CONSTRUCTORS) + len(OTHERS) >= 150


@pytest.mark.parametrize("word", ["is_causal", "attn_mask", "dropout", "scale_factor", "enable_gqa", "window_size"])
def test_unknown_arguments_are_refused(word: str) -> None:
    with pytest.raises(TypeError, match=word):
        qkv.attention(**BASE, **{word: 1})


def test_nothing_malformed_leaves_a_trace() -> None:
    """After all of them a good call still gives the same bits: nothing half-made stays in a cache."""
    q = torch.randn(2, 4, 6, 8)
    good = BASE | {"q": q, "k": torch.randn(2, 2, 9, 8), "v": torch.randn(2, 2, 9, 8), "mask": qkv.causal()}
    before = qkv.attention(**good)
    for changes, kind, _ in CALLS.values():
        with pytest.raises(kind):
            qkv.attention(**good | changes)
    assert torch.equal(before, qkv.attention(**good))
