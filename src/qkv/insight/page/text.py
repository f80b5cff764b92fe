"""Texts and numbers as the page shows them: a token is data, so what a reader could not see is spelled out."""

from __future__ import annotations

import math
import unicodedata

from qkv.insight.page.markup import Markup, node

LONGEST = 28
_BLANK = frozenset({0x00AD, 0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0})


def visible(text: str, longest: int = LONGEST) -> str:
    """A token in one line: spaces at its ends, controls and letters without a shape are spelled out, a cut one says so.

    >>> visible(" the"), visible("a\\nb\\x00"), visible("x\\u202ey"), visible("\\ud800"), visible("")
    ('␣the', 'a␊b␀', 'x⟨U+202E⟩y', '⟨U+D800⟩', '⟨empty⟩')
    >>> visible("\u0301e\u0301") == "◌\u0301e\u0301"
    True
    >>> visible("a" * 1_000_000, 5)
    'aaaaa… (1,000,000 characters)'
    """
    if not text:
        return "⟨empty⟩"
    head = text[:longest]
    inner = head.strip(" ")
    left = len(head) - len(head.lstrip(" "))
    shown = "␣" * (left if inner else len(head)) + _spelled(inner)
    if len(text) > longest:
        return f"{shown}… ({len(text):,} characters)"
    return shown + "␣" * (len(head) - left - len(inner) if inner else 0)


def _letter(letter: str) -> str:
    number, category = ord(letter), unicodedata.category(letter)
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "␡"
    if category[0] == "C" or category in ("Zl", "Zp") or (category == "Zs" and letter != " ") or number in _BLANK:
        return f"⟨U+{number:04X}⟩"
    return letter


def _spelled(text: str) -> str:
    """The letters of a text; marks without a letter, and all but two on one, stand on a circle of their own."""
    found, marks = [], 2
    for letter in text:
        mark = unicodedata.category(letter) in ("Mn", "Me") and ord(letter) & 0xFFF0 != 0xFE00
        marks = marks + 1 if mark else 0
        found.append(f"◌{letter}" if mark and marks > 2 else _letter(letter))
    return "".join(found)


def plain(text: str) -> str:
    """A text of several lines, such as a plan: line ends stay, what a reader could not see is spelled out."""
    return "\n".join(
        "".join(letter if letter == " " else _letter(letter) for letter in line) for line in text.split("\n")
    )


def token(text: str) -> Markup:
    """A token already made visible, kept from turning the text around it."""
    return node("bdi", text, class_="tok")


def digits(value: float, count: int = 4) -> str:
    """A number with so many digits, as the page's script writes it, too.

    >>> [digits(x) for x in (0.0, 1.0, 0.25, 0.0001234567, 12345.678, -2.5, 3e-9, math.inf, math.nan)]
    ['0', '1.000', '0.2500', '0.0001235', '12,346', '−2.500', '3.000e−9', '∞', 'NaN']
    """
    if value != value:
        return "NaN"
    sign = "−" if value < 0 else ""
    size = abs(value)
    if size == 0:
        return "0"
    if size == math.inf:
        return sign + "∞"
    exponent = int(f"{size:.{count - 1}e}".partition("e")[2])
    if exponent < -4:
        mantissa = f"{size:.{count - 1}e}".partition("e")[0]
        return f"{sign}{mantissa}e−{-exponent}"
    return f"{sign}{size:,.{max(0, count - 1 - exponent)}f}"


def percent(share: float) -> str:
    """A share in per cent.

    >>> percent(0.412), percent(0.0421), percent(0.00042), percent(0.0), percent(math.nan)
    ('41 %', '4.2 %', '0.04 %', '0 %', 'NaN')
    >>> percent(1e-7)
    '< 0.01 %'
    """
    if share != share:
        return "NaN"
    if share == 0:
        return "0 %"
    if 0 < share < 5e-5:
        return "< 0.01 %"
    return f"{100 * share:.{0 if share >= 0.0995 else 1 if share >= 0.00995 else 2}f} %"


def counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> counted(1, "head"), counted(1200, "key"), counted(2, "query", "queries")
    ('1 head', '1,200 keys', '2 queries')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def ordered(values: list[str]) -> str:
    """A list in words.

    >>> ordered(["3"]), ordered(["1", "2", "5"])
    ('3', '1, 2 and 5')
    """
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"
