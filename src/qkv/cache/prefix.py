"""Which page holds which tokens: a chain of keyed digests over full pages, where no digest is ever trusted.

::

    root = digest(salt, adapter, identity, dtype, storage, page size)
    page 0 = digest(root, tokens 0 .. P - 1)      page 1 = digest(page 0, tokens P .. 2 P - 1)      ...

A digest only finds candidates. A page is taken where its tokens are equal, and its parent is the very page matched
before it; the first page's salt and adapter are compared as they are. So a forged or constant digest cannot lead to
keys of other tokens or of another salt. Digests are keyed with random bytes of this cache: nobody outside can aim at
one.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from qkv.checks import shown
from qkv.errors import ArgumentTypeError

Name = tuple[str, Any]  # a typed value: 1, "1" and b"1" are three
TOKEN_BYTES = 8


def typed(call: str, name: str, value: Any) -> Name:
    """A salt, adapter or identity with its type: what digests and comparisons see."""
    kind = type(value)
    if value is None or kind in (str, bytes, int):
        return kind.__name__, value
    given = f"{name}={shown(value)} ({kind.__name__})"
    raise ArgumentTypeError.of(call, f"{name} must be a str, bytes or int", given, f"Pass str({name})")


def framed(names: Iterable[Name]) -> bytes:
    """The values in a form that no other list of values has: each with its type and its length before it."""
    parts = []
    for kind, value in names:
        text = "" if value is None else f"{value:x}" if isinstance(value, int) else value
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        parts += [len(kind).to_bytes(8, "little"), kind.encode(), len(data).to_bytes(8, "little"), data]
    return b"".join(parts)


class Root:
    """What the first page of a chain follows: the salt and adapter it is for."""

    __slots__ = ("digest", "key", "page")

    def __init__(self, digest: bytes, key: tuple[Name, Name]) -> None:
        self.digest, self.key = digest, key
        self.page = 0  # always alive


class Entry:
    """A full page that holds `tokens` after its parent's; page is -1 once it was evicted or written anew."""

    __slots__ = ("digest", "page", "parent", "tokens")

    def __init__(self, digest: bytes, parent: Entry | Root, tokens: bytes, page: int) -> None:
        self.digest, self.parent, self.tokens, self.page = digest, parent, tokens, page


class PrefixIndex:
    """Finds the pages of a prefix.

    `digest(parent digest, tokens)` may be replaced by any function, the worst included: answers stay right.
    """

    def __init__(self, page_size: int, names: Iterable[Name]) -> None:
        self.digest: Callable[[bytes, bytes], bytes] = self._keyed
        self._names = framed(names)
        self._bytes = page_size * TOKEN_BYTES
        # One hasher that was given the key and the frame of a page; copying it saves a third of each page's time.
        self._hasher = hashlib.blake2b(digest_size=32, key=secrets.token_bytes(64))
        self._hasher.update(self._bytes.to_bytes(8, "little"))
        self._found: dict[bytes, list[Entry]] = {}

    def _keyed(self, parent: bytes, tokens: bytes) -> bytes:
        hasher = self._hasher.copy()
        hasher.update(parent)
        hasher.update(tokens)
        return hasher.digest()

    def root(self, salt: Name, adapter: Name) -> Root:
        """Where the chains of this salt and adapter begin."""
        return Root(self.digest(bytes(32), framed((salt, adapter)) + self._names), (salt, adapter))

    def match(self, root: Root, tokens: bytes, pages: int) -> list[Entry]:
        """The entries of the leading pages, at most `pages` of them, that hold these tokens under this root."""
        size, digest, found = self._bytes, self.digest, self._found
        parent: Entry | Root = root
        matched: list[Entry] = []
        for start in range(0, pages * size, size):
            chunk = tokens[start : start + size]
            for entry in found.get(digest(parent.digest, chunk), ()):
                if entry.tokens == chunk and _follows(entry.parent, parent):
                    break
            else:
                break
            matched.append(entry)
            parent = entry
        return matched

    def find(self, parent: Entry | Root, tokens: bytes) -> tuple[bytes, Entry | None]:
        """The digest of one page after `parent`, and the entry that holds it already."""
        digest = self.digest(parent.digest, tokens)
        for entry in self._found.get(digest, ()):
            if entry.tokens == tokens and _follows(entry.parent, parent):
                return digest, entry
        return digest, None

    def add(self, entry: Entry) -> None:
        self._found.setdefault(entry.digest, []).append(entry)

    def remove(self, entry: Entry) -> None:
        same = self._found.get(entry.digest)
        if same is not None and entry in same:
            same.remove(entry)
            if not same:
                del self._found[entry.digest]

    def rebuild(self, alive: Iterable[Entry]) -> None:
        self._found = {}
        for entry in alive:
            self.add(entry)

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))


def _follows(had: Entry | Root, wanted: Entry | Root) -> bool:
    return had is wanted or (isinstance(had, Root) and isinstance(wanted, Root) and had.key == wanted.key)
