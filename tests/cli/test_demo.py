"""`qkv demo`: what it finds, what it shows, and what it does with files that are no use."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import qkv
from qkv.cli import demo
from qkv.cli.demo import REFERENCE_QUESTION, measure
from qkv.cli.demo.features import Features
from qkv.cli.demo.lookup import Lookup
from qkv.cli.demo.passages import LONG, Passage, Text, cut
from qkv.cli.demo.reading import read_file, read_reference
from qkv.cli.demo.serving import BATCH, PAGES, PROMPTS, SYSTEM, serve
from qkv.cli.demo.words import count, stem
from qkv.cli.main import main
from qkv.insight.terminal import cells
from qkv.lm import serving
from qkv.lm.generation import continue_prompt, load

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")

TEXT = """\
Keeping bees
============

A hive holds one queen, some hundred drones and up to fifty thousand workers. The queen lays all the eggs and may live
for five years, while a worker born in summer lives about six weeks.

Honey is nectar that the workers have carried home, thickened by fanning it with their wings, and sealed under wax. A
strong hive makes about thirty kilograms of honey in a good year, of which it needs half for the winter.

Swarming
--------

In late spring a crowded hive may swarm: the old queen leaves with half of the workers, and a new queen hatches in her
place. A keeper who does not want to lose the swarm gives the bees more room before May.

A smoker calms the bees, because smoke makes them fill up on honey, and a full bee is slow to sting. Pine needles and
dry grass burn well in it.
"""

QUESTION = "How long does a worker bee live in summer?"


@pytest.fixture
def bees(tmp_path: Path) -> Path:
    file = tmp_path / "bees.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 2)


def _demo(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], str]:
    assert main(["demo", *arguments]) == 0
    shown = capsys.readouterr()
    return shown.out.splitlines(), shown.err


def test_the_first_screen_fits_24_lines_of_80(bees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, progress = _demo(capsys, str(bees), "--ask", QUESTION)
    assert len(lines) <= 24
    assert max(map(cells, lines)) <= 80
    text = "\n".join(lines)
    assert lines[0].startswith("qkv demo · bees.txt, 4 passages")
    assert lines[1] == f"? {QUESTION}"
    assert "lives about six weeks" in " ".join(text.split())
    for name in ("hard: a dictionary", "soft: attention", "mean: scale = 0"):
        assert sum(line.startswith(name) for line in lines) == 1
    assert re.search(r"x W_Q \(1, 1024\) · k = x W_K \(4, 1024\) · v = x W_V \(4, 512\)", text)
    assert "scores (1, 4) → softmax (1, 4) · v = out (1, 512)" in text
    assert re.search(r"\d backends? agrees? with float64 to \d\.\de-\d\d \(reference, tiled, .*\)", text)
    for dtype in ("bfloat16", "float32"):
        assert re.search(rf"decode over 4,096 keys, 32/8 heads, {dtype}: +PyTorch [\d.]+, qkv [\d.]+ ms, [\d.]+×", text)
    assert len(re.findall(r"qkv (why|demo|doctor|mask|bench)", lines[-1])) == 3
    assert "word counts, nothing trained" in text
    assert "qkv demo: reading the text" in progress
    assert "timing decode" in progress


def test_weights_bars_and_order(bees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = _demo(capsys, str(bees), "--ask", QUESTION)
    rows = [re.match(r"(\d\.\d{3}) ([█▏▎▍▌▋▊▉ ]{8}) line (\d+) ", line) for line in lines]
    weights = [float(row[1]) for row in rows if row]
    drawn = [row[2].count("█") for row in rows if row]
    assert len(weights) == 4  # all there are
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(1.0, abs=0.003)
    assert drawn == [int(weight * 8 + 1e-9) for weight in weights]
    assert "that is the whole text" in "\n".join(lines)


def test_the_numbers_are_attention(bees: Path) -> None:
    """Weights, out and the three ways, recomputed in NumPy from q, k and v."""
    found = Lookup(read_file(str(bees))).ask(QUESTION)
    q, k, v = (t.double().numpy()[0, 0] for t in (found.q, found.features.k, found.features.v))
    scores = (q @ k.T)[0] / math.sqrt(q.shape[1])
    p = np.exp(scores - scores.max())
    p /= p.sum()
    assert found.weights.flatten().tolist() == pytest.approx(p.tolist(), abs=1e-5)
    assert found.out.flatten().numpy() == pytest.approx(p @ v, abs=1e-4)
    assert [hit.weight for hit in found.hits] == pytest.approx(sorted(p, reverse=True), abs=1e-5)
    hard, soft, mean = found.ways
    assert (hard.largest, hard.passages) == (1.0, 1.0)
    assert soft.largest == pytest.approx(p.max(), abs=1e-5)
    assert soft.passages == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert mean.largest == pytest.approx(1 / len(p))
    assert mean.passages == pytest.approx(len(p))
    assert "six" in hard.words or "summer" in hard.words or "worker" in hard.words


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (REFERENCE_QUESTION, 'skipping the optional "else" clause if the loop has one'),
        (
            "Is a default parameter value evaluated once, or at each call?",
            "evaluated from left to right when the function definition is executed",
        ),
        ("Can comparisons be chained arbitrarily?", "Comparisons can be chained arbitrarily"),
        ("How do I format a number with a thousands separator?", "thousands separator"),
        ("Which operators bind most tightly?", "binds more tightly than unary operators"),
    ],
)
def test_the_reference_answers(reference: Lookup, question: str, answer: str) -> None:
    """The best passage says it. Every Python from 3.10 on carries these sentences."""
    found = reference.ask(question)
    assert answer in " ".join(found.hits[0].passage.text.split())
    assert found.hits[0].weight > 5 / len(reference.text.passages)
    assert len(found.hits) == 5


@pytest.fixture(scope="module")
def reference() -> Lookup:
    return Lookup(read_reference())


def test_the_default_screen_fits_too(capsys: pytest.CaptureFixture[str]) -> None:
    """The lookup first, on a screen of its own; then what is served, on another; nothing is wider than 80."""
    every, progress = _demo(capsys)
    assert max(map(cells, every)) <= 80
    cut = next(n for n, line in enumerate(every) if "after one system prompt" in line)
    lines, serving = every[:cut], every[cut:]
    assert len(lines) <= 24
    assert len(serving) <= 24
    assert REFERENCE_QUESTION in lines[1]
    assert "language reference" in lines[0]
    assert 'skipping the optional "else" clause if the loop has one' in " ".join(" ".join(lines[2:5]).split())
    assert lines.pop() == ""
    spoken = " ".join(lines[-2:])
    assert spoken.startswith("a model of 1.2 M weights, trained on this text by qkv train: “The break statement” ")
    assert "no model" not in spoken
    assert len(re.findall(r"qkv (why|demo|doctor|mask|bench)", every[-1])) == 3
    assert "one by one" in progress
    _served(serving)


def _served(lines: list[str]) -> None:
    """A line a sequence, its row of pages, the counts, and that each is what it is alone."""
    assert lines[0] == f"{len(PROMPTS)} prompts after one system prompt of {len(SYSTEM)} bytes, on one paged cache:"
    names = "ABCDEF"
    for name, (prompt, length), line, row in zip(names, PROMPTS, lines[1:7], lines[8:14], strict=True):
        assert line.startswith(f"{name} {prompt}")
        assert len(line) > 2 + len(prompt) + length // 2
        assert re.match(rf"{name} +(\d+ ( +\d+[ *▏▎▍▌▋▊▉█]?)+|-  (has left|waits))$", row), row
    full = len(SYSTEM) // 16
    assert sum("".join(f"{page:>4}*" for page in range(full)) in row for row in lines[8:14]) == BATCH
    parts = r"(\d+) used, (\d+) of them shared \*, (\d+) cached, (\d+) free"
    counts = re.match(rf"{PAGES} pages of 16 bytes: {parts}$", lines[14])
    assert counts is not None
    used, shared, kept, free = map(int, counts.groups())
    assert (used + kept + free, shared) == (PAGES, full)
    last = max(length for _, length in PROMPTS)
    told = re.match(rf"6 sequences, (\d+) steps, {full} pages shared, waste ([\d.]+)%, [\d,]+ tokens/s$", lines[15])
    assert told is not None
    assert last < int(told[1]) < sum(length for _, length in PROMPTS)
    assert 0 < float(told[2]) < 100 * BATCH / used
    assert lines[16].startswith("equal to one-by-one: yes (")


def test_a_question_is_answered_and_nothing_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = _demo(capsys, "--ask", QUESTION)
    assert len(lines) <= 24
    assert "system prompt" not in "\n".join(lines)
    assert len(re.findall(r"qkv (why|demo|doctor|mask|bench)", lines[-1])) == 3


def test_what_is_missing_is_said_whole_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No safetensors: no model and no pages. No kernels: slow. A line each, and the screen still fits."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "safetensors" else find_spec(name))
    monkeypatch.setattr(measure, "BACKENDS", ("reference", "tiled", "sdpa"))
    lines, _ = _demo(capsys)
    assert len(lines) <= 24
    assert max(map(cells, lines)) <= 80
    assert "no model and no pages here: safetensors is missing (pip install safetensors)" in lines
    assert "no native kernels here, so qkv is slow: qkv doctor says how to get them" in lines
    assert "system prompt" not in "\n".join(lines)


def test_an_installation_without_the_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qkv.lm.generation.SHIPPED", tmp_path / "reference.safetensors")
    lines, _ = _demo(capsys)
    (told,) = [line for line in lines if line.startswith("no model and no pages here: ")]
    assert told.endswith("Train one with qkv train, and pass its path.")


def test_an_answer_that_differs_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The comparison is made: where one by one says something else for two of them, the summary says which."""
    written: dict[serving.Request, bytes] = {}
    run = serving.Server.run

    def running(self: serving.Server, watch: Callable[[], object]) -> None:
        run(self, watch)
        written.update({job.request: job.written for job in self.jobs})

    def otherwise(model: object, request: serving.Request) -> bytes:
        return written[request][:-1] + (b"~" if request.length in (56, 40) else written[request][-1:])

    monkeypatch.setattr(serving.Server, "run", running)
    monkeypatch.setattr("qkv.cli.demo.serving.alone", otherwise)
    serve()
    assert "\nequal to one-by-one: no, B, F differ (" in capsys.readouterr().out


def test_without_a_model_nothing_is_served(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("qkv.lm.generation.SHIPPED", Path("nowhere"))
    serve()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_continuation_is_that_of_whole_passes(temperature: float) -> None:
    """With a cache up to the model's context, and past it on a window that moves."""
    model = load()
    prompt, count = "The break statement " * 12 + "and ", 20
    said = continue_prompt(prompt, count, temperature=temperature, seed=2).text
    tokens, rng = list(prompt.encode()), torch.Generator().manual_seed(2)
    start = len(tokens)
    assert start < model.config.context < start + count
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([tokens[-model.config.context :]]))[0, -1]
            tokens.append(serving.pick(logits, temperature, rng))
    assert said == bytes(tokens[start:]).decode(errors="replace")


def test_projection_is_close_to_exact_word_matching(reference: Lookup) -> None:
    """q·k/√D through random directions stays close to the sum over shared features that it stands for."""
    f = reference.features
    gram = (f.w_k[:200] / f.rarity[:200]) @ (f.w_k[:200] / f.rarity[:200]).T
    off = gram - torch.diag(gram.diagonal())
    assert gram.diagonal().numpy() == pytest.approx(np.ones(200), abs=0.25)
    assert off.std().item() == pytest.approx(1 / math.sqrt(f.w_k.shape[1]), rel=0.1)


def test_full_adds_the_details(bees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = _demo(capsys, str(bees), "--ask", QUESTION, "--full")
    text = "\n".join(lines)
    for title in ("The passages found", "How q, k and v are made", "Shapes and bytes", "The plan of the lookup"):
        assert title in text
    assert "the old queen leaves with half of the workers" in " ".join(text.split())  # a passage whole
    assert re.search(r"^k +\(1, 1, 4, 1024\) +float32 +16,384 bytes$", text, re.MULTILINE)
    assert "refused" in text
    assert re.search(r"^qkv bfloat16 +[\d.]+ +[\d.]+ +[\d.]+ +2 +\S+$", text, re.MULTILINE)


def test_without_a_question_it_asks_about_telling_words(bees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = _demo(capsys, str(bees))
    assert re.fullmatch(r"\? What does it say about (\w+) and (\w+)\?", lines[1])
    words = lines[1].rstrip("?").split()
    assert words[-1] in TEXT.lower()
    assert words[-3] in TEXT.lower()


def test_unknown_words_are_admitted(bees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = _demo(capsys, str(bees), "--ask", "zzyzx?")
    assert "no word of the question occurs in the text" in "\n".join(lines)
    assert sum(line.startswith("0.250 ") for line in lines) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file has no words in it"),
        (b" \n\t\n ... \n", "the file has no words in it"),
        (b"\x7fELF\x02\x01\x01\0\0\0\0", "the file is not text"),
        (bytes(range(1, 256)) * 20, "the file is not text"),
    ],
    ids=["empty", "blank", "binary", "noise"],
)
def test_useless_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    assert main(["demo", str(file)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"qkv: qkv demo: {message}" in shown.err
    assert "Traceback" not in shown.err


def test_missing_files_and_directories_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "nowhere.txt")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["demo", str(tmp_path)]) == 2
    assert "this is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["", "  ", "?!"])
def test_a_question_has_words(question: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--ask", question]) == 2
    assert "the question has no words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encode", "expected"),
    [
        (lambda t: t.encode("utf-8-sig"), "Käse"),
        (lambda t: t.encode("utf-16"), "Käse"),
        (lambda t: t.encode("latin-1"), "Käse"),
        (lambda t: t.replace("\n", "\r\n").encode(), "Käse"),
    ],
    ids=["bom", "utf-16", "latin-1", "crlf"],
)
def test_encodings(tmp_path: Path, encode: Callable[[str], bytes], expected: str) -> None:
    file = tmp_path / "text"
    file.write_bytes(encode("Der Käse liegt auf dem Tisch.\n\nDie Katze weiß es.\n"))
    assert expected in read_file(str(file)).passages[0].text


def test_wide_letters_keep_the_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "注意.txt"
    file.write_text(
        "注意力机制 attention 是一种加权平均。" * 30 + "\n\n" + "另一段文字 memory。" * 40, encoding="utf-8"
    )
    lines, _ = _demo(capsys, str(file), "--ask", "attention")
    assert len(lines) <= 24
    assert max(map(cells, lines)) <= 80


def test_a_large_file_is_read_in_part_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkv.cli.demo.reading.LARGEST", 2**20)
    file = tmp_path / "large.txt"
    file.write_text("ein kleines ä " * 90_000, encoding="utf-8")
    assert read_file(str(file)).note == "only the first 1 MB of the file were read"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@pytest.mark.parametrize("name", ["bees", "reference", "one line", "no spaces", "lines"])
def test_cutting_loses_no_word(name: str) -> None:
    """The passages and headings hold every word of the text, in order."""
    from pydoc_data import topics

    text = {
        "bees": TEXT,
        "reference": topics.topics["compound"],
        "one line": "word and more " * 2000,
        "no spaces": "x" * 5000,
        "lines": "\n".join(f"line {n} of a poem" for n in range(500)),
    }[name]
    passages = list(cut(text))
    told: list[str] = []
    heading = ""
    for passage in passages:
        if passage.heading != heading:
            heading = passage.heading
            told += _words(heading)
        told += _words(passage.text)
    rest = list(_words(text))
    lost = [word for word in rest if word not in set(told)]
    assert not lost
    if name != "reference":  # which has headings with nothing below them
        assert told == rest
    assert max(len(_words(passage.text)) for passage in passages) <= 2 * LONG


def test_headings_and_lines_are_known() -> None:
    passages = list(cut(TEXT))
    assert [passage.heading for passage in passages] == ["Keeping bees", "Keeping bees", "Swarming", "Swarming"]
    lines = TEXT.splitlines()
    for passage in passages:
        assert lines[int(passage.where.removeprefix("line ")) - 1] == passage.text.splitlines()[0]


def test_features_are_what_they_say() -> None:
    assert stem("evaluated") == stem("evaluates") == stem("evaluating")
    assert count("the of and") == {}
    passages = [Passage("1", "red apples"), Passage("2", "green apples"), Passage("3", "a blue sky")]
    features = Features(passages)
    assert features.occurs["appl"] == 2
    assert features.k.shape == (1, 1, 3, 1024)
    rare, common = features.weight("sky"), features.weight("appl")
    assert rare > common > 0
    assert features.weight("absent") == 0
    again = Features(passages)
    assert torch.equal(features.k, again.k)
    assert torch.equal(features.v, again.v)
    assert not torch.equal(features.k, Features(passages, seed=1).k)


def test_one_passage_is_enough(tmp_path: Path) -> None:
    found = Lookup(Text("one", 9, (Passage("line 1", "only this"),))).ask("only this?")
    assert found.weights.item() == pytest.approx(1.0)
    assert len(found.hits) == 1


def test_agreement_tells_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reported error is that of the worst backend, and one that cannot run is reported, not counted."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 20, 64), torch.randn(1, 1, 20, 32)

    def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        if options["backend"] == "cpu":
            raise qkv.UnsupportedError("not here")
        out = qkv.attention(q, k, v, mask=options.get("mask"), backend="reference")
        return out * 1.5 if options["backend"] == "tiled" else out

    monkeypatch.setattr(measure, "attention", broken)
    agreed = measure.agreement(q, k, v, lambda step: None)
    assert set(agreed.errors) == {"reference", "tiled", "sdpa"}
    assert agreed.refused == {"cpu": "not here"}
    assert agreed.worst == pytest.approx(0.5, rel=1e-3)
    assert agreed.errors["reference"]["the lookup"] < 1e-6
