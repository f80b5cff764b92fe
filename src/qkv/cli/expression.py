"""A mask written as an expression: constructors with literal arguments, and & | ~. It is read, never evaluated."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

import torch

from qkv import masks
from qkv.errors import ArgumentError, QKVError
from qkv.masks import constructors

CALL = "qkv mask"
LONGEST = 2000  # letters of an expression; Python's parser is not meant for endless nesting

# What an expression may call. `mask_mod` takes a function, which an expression cannot hold.
CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    name: make for name, make in vars(constructors).items() if inspect.isfunction(make) and name != "mask_mod"
}
# Constructors whose first argument is a tensor: write a nested list.
_TENSORS = {"blocks": ("map", torch.bool), "dense": ("t", torch.bool), "selected_blocks": ("indices", torch.int64)}


def parse(expression: str) -> masks.Mask:
    """Turn an expression into a mask; it is read, never evaluated.

    >>> parse("causal() & (prefix(2) | sliding_window(4))")
    causal() & (prefix(2) | sliding_window(4))

    Raises
    ------
    ArgumentError
        For anything but the mask constructors, literals and the operators & | ~, and for a constructor's own errors.
    """
    if len(expression) > LONGEST:
        raise refuse(f"an expression has at most {LONGEST} letters", f"{len(expression)}", "Write a shorter one")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        found = _mask(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, QKVError):
            raise
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise refuse("this is not an expression", f"{expression!r} ({reason})", 'Try "causal()"') from None
    return found


def _mask(node: ast.expr) -> masks.Mask:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _mask(node.left), _mask(node.right)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand)
    if isinstance(node, ast.Call):
        return _call(node)
    if isinstance(node, ast.BoolOp) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
        raise refuse("masks combine with & | ~, not with and, or, not", _text(node), "Write a & b, a | b, ~a")
    if isinstance(node, ast.Name) and node.id in CONSTRUCTORS:
        raise refuse("a mask is made by a call", node.id, f"Write {node.id}(…)")
    fix = f"Use {', '.join(sorted(CONSTRUCTORS))}, and & | ~"
    raise refuse("an expression holds mask constructors, literals and & | ~ only", _text(node), fix)


def _call(node: ast.Call) -> masks.Mask:
    name = _name(node.func)
    if name not in CONSTRUCTORS:
        names = ", ".join(sorted(CONSTRUCTORS))
        hint = "mask_mod takes a function: use it from Python. The others are " if name == "mask_mod" else "Use "
        raise refuse("no such mask", _text(node.func), hint + names)
    if any(isinstance(argument, ast.Starred) for argument in node.args) or any(k.arg is None for k in node.keywords):
        raise refuse("arguments are written out", _text(node), "Leave out * and **")
    if name == "per_head":
        arguments: list[Any] = [_masks(argument) for argument in node.args]
    else:
        arguments = [_literal(argument) for argument in node.args]
    keywords = {k.arg: _literal(k.value) for k in node.keywords if k.arg is not None}
    if name in _TENSORS:
        first, dtype = _TENSORS[name]
        arguments = [_tensor(a, dtype, node) if index == 0 else a for index, a in enumerate(arguments)]
        keywords = {key: _tensor(a, dtype, node) if key == first else a for key, a in keywords.items()}
    try:
        found = CONSTRUCTORS[name](*arguments, **keywords)
    except TypeError as error:
        if isinstance(error, QKVError):
            raise
        raise refuse(
            "these arguments do not fit the constructor", f"{_text(node)} ({error})", "See help(qkv.masks)"
        ) from None
    assert isinstance(found, masks.Mask)
    return found


def _name(node: ast.expr) -> str:
    """Return the constructor's name, for `causal` and `qkv.causal` alike; anything else gives no name."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qkv":
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _masks(node: ast.expr) -> list[masks.Mask]:
    if not isinstance(node, (ast.List, ast.Tuple)):
        raise refuse("per_head takes a list of masks", _text(node), "Write per_head([causal(), sliding_window(4)])")
    return [_mask(item) for item in node.elts]


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise refuse(
            "an argument is a literal: a number, None, a string, or a list of them", _text(node), "Write it out"
        ) from None


def _tensor(value: Any, dtype: torch.dtype, node: ast.Call) -> torch.Tensor:
    try:
        return torch.tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        what = "0 and 1" if dtype == torch.bool else "integers"
        raise refuse(f"this constructor takes a nested list of {what}", _text(node), "Write [[1, 0], [1, 1]]") from None


def _text(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else text[:59] + "…"


def positions_of(call: str, text: str | None) -> str | int | None:
    """Where --positions says that the queries stand.

    >>> positions_of("qkv mask", "end"), positions_of("qkv mask", "-3")
    ('end', -3)
    """
    if text is None or text in ("start", "end"):
        return text
    try:
        return int(text)
    except ValueError:
        rule, fix = "--positions must be start, end or an integer", "Try --positions end"
        raise ArgumentError.of(call, rule, repr(text), fix) from None


def refuse(rule: str, given: str, fix: str) -> ArgumentError:
    return ArgumentError.of(CALL, rule, given, fix)
