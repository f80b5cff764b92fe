"""The course's pictures are what their code draws, in both themes, legible where a phone shows them."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qkv.insight.topics import TOPICS

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "docs" / "pictures"
PHONE, LETTER = 340, 8.5  # pixels: the width of a phone's column, and the smallest letter that can be read there
THEMES = ("light", "dark")
NAMES = [
    "self", "cross", "multi-head", "multi-query", "grouped-query", "latent", "masked", "sparse", "flash", "paged",
]  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")


@pytest.fixture(scope="module")
def course() -> Iterator[ModuleType]:
    """The module that draws; it and those beside it are forgotten again."""
    names = {path.stem for path in PLACE.glob("*.py")}
    sys.path.insert(0, str(PLACE))
    try:
        yield importlib.import_module("course")
    finally:
        sys.path.remove(str(PLACE))
        for name in names:
            sys.modules.pop(name, None)


def _file(name: str, theme: str) -> Path:
    return PLACE / "course" / f"{name}-{theme}.svg"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_what_the_code_draws(course: ModuleType, name: str, theme: str) -> None:
    assert course.PICTURES[name](theme) == _file(name, theme).read_text(encoding="utf-8")


def test_every_picture_is_drawn_and_none_is_left_over(course: ModuleType) -> None:
    assert list(course.PICTURES)[: len(NAMES)] == NAMES
    drawn = {f"{name}-{theme}.svg" for name in course.PICTURES for theme in THEMES}
    assert {path.name for path in (PLACE / "course").iterdir()} == drawn


def _svgs() -> list[Path]:
    return [*sorted((PLACE / "course").glob("*.svg")), *sorted(PLACE.glob("lookup-*.svg"))]


@pytest.mark.parametrize("path", _svgs(), ids=lambda path: path.stem)
def test_letters_can_be_read_on_a_phone_and_stay_inside(path: Path) -> None:
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    assert root.find(f"{SVG}title") is not None, "what a screen reader says"
    for text in root.iter(f"{SVG}text"):
        size, x, y = (float(text.attrib[name]) for name in ("font-size", "x", "y"))
        words = "".join(text.itertext())
        assert size * PHONE / width >= LETTER, words
        long = 0.52 * size * len(words)  # a sans-serif's letter is about that wide
        left = x - {"start": 0.0, "middle": long / 2, "end": long}[text.get("text-anchor", "start")]
        assert left >= -1, words
        assert left + long <= width + 8, words
        assert 0 < y <= height, words


@pytest.mark.parametrize("name", NAMES)
def test_themes_differ_in_colours_alone(name: str) -> None:
    light, dark = (_file(name, theme).read_text(encoding="utf-8") for theme in THEMES)
    assert light != dark
    plain = [re.sub(r'(fill|stroke)="[^"]*"', "", svg) for svg in (light, dark)]
    assert plain[0] == plain[1]


def _words(name: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", _file(name, "light").read_text(encoding="utf-8"))


def _page(name: str) -> str:
    return (ROOT / "docs" / "intuition" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["multi-query", "grouped-query", "latent", "sparse", "flash"])
def test_what_a_picture_counts_its_page_prints(name: str) -> None:
    """Drawn by one code and printed by another: the same numbers."""
    shown = {number for words in _words(name) for number in re.findall(r"\d+(?:[.,]\d+)+%?|\d+%", words)}
    page = _page(name).replace(",", "")
    assert shown
    assert [number for number in shown if number.replace(",", "") not in page] == []


@pytest.mark.parametrize(("name", "tensors"), [("self", ("scores", "p", "out")), ("cross", ("p",)), ("masked", ("p",))])
def test_the_weights_in_a_picture_are_those_of_its_page(name: str, tensors: tuple[str, ...]) -> None:
    first = re.search(r"^```python\n(.*?)^```$", _page(name), re.DOTALL | re.MULTILINE)
    assert first is not None
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(first[1], scope)
    drawn = Counter(words for words in _words(name) if re.fullmatch(r"\d\.\d\d", words))
    found = Counter(f"{n:.2f}" for tensor in tensors for n in scope[tensor].flatten().tolist() if n or name == "self")
    if name == "masked":  # the picture has the scores, too
        scores = (scope["q"] @ scope["k"].mT)[0, 0]
        found += Counter(f"{n:.2f}" for n in scores[scope["may"]].tolist())
    assert drawn == found


def test_the_pages_in_a_picture_are_those_of_its_page() -> None:
    table = re.findall(r"^ +#\d +(\d+)  (\[.*)$", _page("paged"), re.MULTILINE)
    words = _words("paged")
    at = words.index("the pool: 14 pages of 4 tokens")
    expected: list[str] = []
    for n, (tokens, pages) in enumerate(table):
        expected += [f"chat {n}", f"{tokens} tokens", *re.findall(r"\[ *(\d+)", pages)]
    assert words[1:at] == expected
    used = re.search(r"^used (\d+) \((\d+) shared", _page("paged"), re.MULTILINE)
    assert used is not None
    assert any(line.startswith(f"{used[1]} pages used, {used[2]} of them shared") for line in words)


def test_lines_lead_from_query_heads_to_what_they_read() -> None:
    svg = ET.fromstring(_file("grouped-query", "light").read_text(encoding="utf-8"))
    ends = [float(line.attrib["x2"]) for line in svg.iter(f"{SVG}line")]
    reads = [int((x - 8) / (464 / 8)) for x in ends]
    assert reads == [*(h // 4 for h in range(32)), *(h % 8 for h in range(32))], "as it is, and as it is not"


def test_the_two_readings_of_causal_are_not_exchanged() -> None:
    words = _words("masked")
    start, end = words.index('positions="start"'), words.index('positions="end"')
    seen = [[word for word in part if "key" in word][:2] for part in (words[start:end], words[end:])]
    assert seen == [["1 key", "2 keys"], ["4 keys", "5 keys"]]


@pytest.mark.parametrize("name", NAMES)
def test_each_page_shows_its_picture_and_leads_on(name: str) -> None:
    page = (ROOT / "docs" / "intuition" / f"{name}.md").read_text(encoding="utf-8")
    assert all(f"../pictures/course/{name}-{theme}.svg" in page for theme in THEMES)
    at = NAMES.index(name)
    before = NAMES[at - 1] if at else "../intuition"
    after = NAMES[at + 1] if at + 1 < len(NAMES) else "../intuition"
    for lead in (page[:400], page[-400:]):
        assert f"]({before}.md)" in lead
        assert f"]({after}.md" in lead
    for part in ("**The question it answers:", "## What it costs, what it saves", "## Exercises", "onfusion"):
        assert part in page, part
    assert 2 <= page.count("<details><summary>Answer</summary>") <= 3
    answers = re.findall(r"<details>.*?</details>", page, re.DOTALL)
    assert all("```python" in answer for answer in answers), "an answer is checked by code"


def test_the_course_is_in_the_readmes_order() -> None:
    table = (ROOT / "docs" / "intuition.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(intuition/([\w-]+)\.md\)", table) == NAMES
    said = {
        "self": "self-attention", "cross": "cross-attention", "multi-head": "multi-head (MHA)",
        "multi-query": "multi-query", "grouped-query": "grouped-query", "latent": "multi-head latent",
        "masked": "masked", "sparse": "sparse", "flash": "Flash", "paged": "paged",
    }  # fmt: skip
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| ") and "arxiv.org" in line]
    for name, row in zip(NAMES, rows, strict=True):
        assert row.startswith(f"| [{said[name]}"), row
        assert f"](docs/intuition/{name}.md)" in row, row


def test_topics_of_why_are_named_where_they_belong() -> None:
    """None that does not exist, and nearly all: a new one finds its page in time."""
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "intuition").glob("*.md")]
    named = {topic for page in pages for topic in re.findall(r'qkv\.why\("([\w-]+)"', page.read_text(encoding="utf-8"))}
    assert named <= set(TOPICS)
    assert len(named) >= 0.9 * len(TOPICS)
