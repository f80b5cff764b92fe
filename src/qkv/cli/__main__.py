"""`python -m qkv.cli` is `qkv`."""

from __future__ import annotations

import sys

from qkv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
