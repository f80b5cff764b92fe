"""The errors qkv raises, and the one way their messages are built.

Every error says the rule that was broken, the named values that were given, and the fix.
All of them are also a `ValueError` or a `TypeError` (a full page pool and a lost rank: a `RuntimeError`), so code
written for PyTorch keeps working.
"""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound="QKVError")


class QKVError(Exception):
    """Base of every error that qkv raises on purpose."""

    @classmethod
    def of(cls: type[E], call: str, rule: str, given: str, fix: str) -> E:
        """The error of this kind whose message has these four parts.

        Parameters
        ----------
        call : str
            What was called, such as "qkv.attention()".
        rule : str
            The rule that was broken.
        given : str
            The named values that were given.
        fix : str
            What to write instead.

        Returns
        -------
        QKVError
            Of the class that it is asked of; to be raised.

        Notes
        -----
        It is not the constructor: torch.compile cannot trace one of an exception, and a data loader of torch makes an
        error of another process anew from its message.

        Examples
        --------
        >>> print(ArgumentError.of("qkv.attention()", "scale must be finite", "scale=nan", "Leave it out"))
        qkv.attention(): scale must be finite. Got scale=nan. Leave it out.
        """
        return cls(f"{call}: {rule}. Got {given}. {fix}.")


class ShapeError(QKVError, ValueError):
    """Sizes that do not fit together."""


class ArgumentError(QKVError, ValueError):
    """A value outside its allowed range, or a combination that has no meaning."""


class ArgumentTypeError(QKVError, TypeError):
    """An argument of a type that the function does not take."""


class UnsupportedError(QKVError, ValueError):
    """A backend was asked for something it cannot do."""


class VersionError(QKVError, ImportError, ValueError):
    """A package that qkv works with is older than what it needs; raised when it is imported or registered."""


class PagesExhausted(QKVError, RuntimeError):
    """A page pool has too few free pages for a step; nothing was changed."""


class RankError(QKVError, RuntimeError):
    """Another rank of a distributed call did not answer: it died, is too slow, or does something else."""


class RecordingWarning(UserWarning):
    """The file of measurements that `qkv doctor --tune` writes cannot be read; it is ignored."""


def from_function(call: str, signature: str, error: Exception) -> QKVError:
    """An error raised inside of a user's function, as one that says how the function is called; raise it `from` that.

    >>> print(from_function("mask_mod(seen)", "fn(b, h, p, j)", TypeError("seen() takes 2 arguments")))
    mask_mod(seen): the function is called as fn(b, h, p, j), with tensors that broadcast. Got TypeError: seen() takes \
2 arguments. Let it take these arguments and return a tensor computed from them elementwise.
    """
    told = str(error).strip().split("\n", 1)[0]
    told = told if len(told) <= 160 else f"{told[:157]}..."
    given = f"{type(error).__name__}: {told.rstrip('.')}" if told else type(error).__name__
    fix = "Let it take these arguments and return a tensor computed from them elementwise"
    if "oolean value of" in told or "data-dependent" in told:
        fix = (
            "Its arguments are tensors of many values: write & | ~ for and, or, not, and torch.where(p > j, x, y) for "
            "if p > j"
        )
    kind = ArgumentTypeError if isinstance(error, TypeError) else ArgumentError
    return kind.of(call, f"the function is called as {signature}, with tensors that broadcast", given, fix)
