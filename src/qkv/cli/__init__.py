"""The installed program: `qkv demo`, `qkv why`, `qkv see`, `qkv plan`, `qkv mask`, `qkv doctor`, `qkv train`,
`qkv bench`.

A command is a module of this package, or a folder; it reads its arguments, calls the library and prints.
"""

from __future__ import annotations
