"""Everything the documentation shows is run: doctests of all modules, and the code blocks of README and docs."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

import qkv
from qkv.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
JUDGED_APART = {"generate"}  # run by tests/lm/test_generate_example.py, which knows what it has to print
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")  # said once where there is no native extension


def _modules() -> list[str]:
    found = [name for _, name, _ in pkgutil.walk_packages(qkv.__path__, "qkv.")]
    return ["qkv", *(name for name in found if not name.endswith(("._native", ".__main__")))]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=FLAGS)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples of {name} failed"


def test_there_are_docstring_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {name: finder.find(importlib.import_module(name)) for name in _modules()}
    examples = {name: sum(len(test.examples) for test in tests) for name, tests in found.items()}
    assert sum(examples.values()) > 150
    assert sum(n for name, n in examples.items() if name.startswith("qkv.masks")) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks(page: Path) -> None:
    """Run a page's python blocks in order; a text block right after one must be what it prints."""
    scope: dict[str, object] = {}
    printed = ""
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "text":
            assert code.strip() in printed, f"{page.name} shows\n{code}\nbut the block before prints\n{printed}"
        if language != "python":
            continue
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            if ">>>" in code:
                test = doctest.DocTestParser().get_doctest(code, scope, page.name, str(page), 0)
                runner = doctest.DocTestRunner(optionflags=FLAGS)
                runner.run(test, out=sys.stderr.write, clear_globs=False)
                assert runner.failures == 0
                scope.update(test.globs)
            else:
                exec(compile(code, f"{page.name}", "exec"), scope)
        printed = stream.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if not link.startswith("https://"):
            file, _, heading = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in _headings(target), f"{page.name}: {link}"


def _headings(page: Path) -> set[str]:
    """Return the names by which a link finds a page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_given(page: Path) -> None:
    """Each line with the program's name has a command, and options, that there are."""
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"^(?: {4})?qkv (.*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        assert words[0] in COMMANDS, f"{page.name}: qkv {line}"
        build_parser(words[0]).parse_args(words)  # argparse ends the program where it cannot


def test_recipes_are_short() -> None:
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    blocks = [code for language, code in FENCE.findall(recipes) if language == "python"]
    assert len(blocks) >= 12
    assert max(len(code.splitlines()) for code in blocks) <= 20


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 30


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.stem not in JUDGED_APART], ids=lambda path: path.stem)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_is_an_example_of_each_kind() -> None:
    assert {path.stem for path in EXAMPLES} >= {"self_attention", "cross_attention", "grouped_query", "masks"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_is_what_the_script_draws(theme: str) -> None:
    place = ROOT / "docs" / "pictures"
    spec = importlib.util.spec_from_file_location("draw", place / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    assert draw.masks(theme) == (place / f"masks-{theme}.svg").read_text(encoding="utf-8")
    drawn = draw.picture(theme)
    assert f">softmax({draw.SCALE:g} q·k)</text>" in drawn, "the label is what the numbers are"
    shown = torch.softmax(
        draw.SCALE * torch.tensor([key for _, key, _ in draw.ENTRIES]) @ torch.tensor(draw.QUERY[1]), 0
    )
    assert draw.lookup()[0] == pytest.approx(shown.tolist(), abs=1e-6)
    assert drawn == (place / f"lookup-{theme}.svg").read_text(encoding="utf-8")
    weights, out = draw.lookup()
    assert sum(weights) == pytest.approx(1.0, abs=1e-6)
    assert weights[0] == max(weights)
    assert all(f">{weight:.2f}</text>" in drawn for weight in weights)
    mixed = [sum(w * value[i] for w, (_, _, value) in zip(weights, draw.ENTRIES, strict=True)) for i in range(3)]
    assert out == pytest.approx(mixed, rel=1e-5)
