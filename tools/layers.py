"""The pictures of the layers in docs/design.md and CONTRIBUTING.md, from the contract in pyproject.toml.

    python tools/layers.py           # writes both; `make format` does
    python tools/layers.py --check   # says whether they are what it would write

The order is written once, under [[tool.importlinter.contracts]]. What a level holds is told by the first sentence of
its files' docstrings.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- layers:start -->", "<!-- layers:end -->"


def levels() -> list[list[str]]:
    """The names of each level, the lowest first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^type = "layers"$.*?^layers = \[(.*?)^\]', text, re.MULTILINE | re.DOTALL)
    assert found is not None, "pyproject.toml has no contract of layers"
    order = re.findall(r'"([^"]+)"', found[1])
    return [[name.strip().removeprefix("qkv.") for name in level.split(":")] for level in reversed(order)]


def purpose(name: str) -> str:
    """The first sentence of a file's or folder's docstring."""
    place = ROOT / "src" / "qkv" / name
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    told = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    first = re.split(r"(?<=\w)\.(?:\s|$)", " ".join(told.split()))[0]
    return first.rstrip(".").replace("|", "\\|")


def table() -> str:
    """The table of docs/design.md, a row a file or folder, the lowest level last: nothing points downwards."""
    lines = ["| level | | what it is |", "|---|---|---|"]
    for number, names in reversed(list(enumerate(levels()))):
        for name in names:
            folder = (ROOT / "src" / "qkv" / name).is_dir()
            lines.append(f"| {number} | `{name}{'/' if folder else ''}` | {purpose(name)} |")
    return "\n".join(lines)


def picture() -> str:
    """The lines of CONTRIBUTING.md: levels from the lowest on, a dot between two."""
    text = " · ".join("\N{NO-BREAK SPACE}".join(names) for names in levels())
    return textwrap.indent("\n".join(textwrap.wrap(text, 110)), "    ").replace("\N{NO-BREAK SPACE}", " ")


PAGES = {"docs/design.md": table, "CONTRIBUTING.md": picture}


def page(name: str) -> str:
    """What a page should hold: its text, with what stands between the marks made anew."""
    text = (ROOT / name).read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    assert start, f"{name} has no {START}"
    assert end, f"{name} has no {END}"
    return f"{before}{START}\n\n{PAGES[name]()}\n\n{END}{after}"


def main() -> int:
    """Write the pages, or check them; 1 where one is not as it should be."""
    stale = [name for name in PAGES if (ROOT / name).read_text(encoding="utf-8") != page(name)]
    if "--check" in sys.argv[1:]:
        print("\n".join(f"{name}: run python tools/layers.py" for name in stale), file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(page(name), encoding="utf-8")
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
