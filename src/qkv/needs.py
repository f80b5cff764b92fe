"""Which torch qkv needs, said before anything fails for want of it.

The floor is the oldest release on which the tests are known to pass. On 2.5.1 and 2.7.1 those of attention and of its
gradients do, but torch.compile cannot trace masks that are made inside a graph; 2.8 was not tried.
"""

from __future__ import annotations

import warnings

from qkv.errors import VersionError, describe

FLOOR = (2, 9)

with warnings.catch_warnings():
    # torch tells at its own import that NumPy is not there. Nothing here needs NumPy, so it is not ours to pass on.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version.

    >>> release("2.13.0+cpu"), release("2.15.0a0+git1234")
    ((2, 13), (2, 15))
    """
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def check(version: str) -> None:
    """Raise VersionError for a torch older than the floor."""
    if release(version) < FLOOR:
        needed = ".".join(map(str, FLOOR))
        fix = f"Use pip install 'torch>={needed}'"
        raise VersionError(describe("import qkv", f"torch {needed} or newer is needed", f"torch {version}", fix))


check(torch.__version__)
