"""The command line: what each command prints, refuses and returns, and the drawing it is made of."""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import qkv
from qkv.cli import doctor
from qkv.cli.expression import CONSTRUCTORS, parse
from qkv.cli.main import COMMANDS, main
from qkv.insight import terminal
from qkv.insight.topics import GROUPS, TOPICS

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qkv.cli", *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


# ---- what every command shares


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert name in shown
        assert summary in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: qkv {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["explode"], ["why", "--seed", "x"], ["mask"]])
def test_requests_that_cannot_be_read_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: qkv" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"qkv {qkv.__version__}"


def test_only_the_chosen_command_is_imported() -> None:
    code = (
        "import sys; from qkv.cli.main import main; main(['why']); "
        "print(sorted(m for m in sys.modules if m.startswith(('qkv.cli', 'qkv.insight.exp'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == ["qkv.cli", "qkv.cli.main", "qkv.cli.why"]


def test_a_program_run_as_a_module_writes_no_colour_into_a_pipe() -> None:
    done = _run("why", "names")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[1] == "names: Which one is Q, which is K, which is V? (seed 0)"
    assert max(map(terminal.cells, done.stdout.splitlines())) <= 80


def test_a_console_without_unicode_is_served() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qkv.cli", "mask", "causal()"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0
    assert b"causal()" in done.stdout


def test_a_reader_that_stops_is_no_error() -> None:
    command = f'"{sys.executable}" -m qkv.cli why scale | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8", check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_interruption_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("qkv.cli.why.run", interrupt)
    assert main(["why"]) == 130
    assert capsys.readouterr().err == "qkv: stopped\n"


# ---- why


def test_why_alone_lists_the_topics(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(TOPICS)
    assert [line for line in lines[1:] if not line.startswith("  ")] == list(GROUPS)
    assert max(map(terminal.cells, lines)) <= 80


def test_why_prints_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "lookup", "--seed", "3"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == str(qkv.why("lookup", seed=3))


def test_why_prints_every_number_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "lookup", "--seed", "3", "--full"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == qkv.why("lookup", seed=3).full()
    assert main(["why", "lookup", "--seed", "3", "--json"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == qkv.why("lookup", seed=3).json()


def test_why_refuses_an_unknown_topic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "tie"]) == 2
    assert 'Use one of "lookup"' in capsys.readouterr().err


# ---- mask


@pytest.mark.parametrize(
    ("expression", "mask"),
    [
        ("causal()", qkv.causal()),
        ("qkv.causal()", qkv.causal()),
        (" causal() & sliding_window(4) ", qkv.causal() & qkv.sliding_window(4)),
        ("causal() & (prefix(2) | sliding_window(n=3))", qkv.causal() & (qkv.prefix(2) | qkv.sliding_window(3))),
        ("~chunked(4)", ~qkv.chunked(4)),
        ("window(None, 2)", qkv.window(None, 2)),
        ("documents([3, 5]) & causal()", qkv.documents([3, 5]) & qkv.causal()),
        ("documents(segment_ids=[0, 0, 1, -1])", qkv.documents(segment_ids=[0, 0, 1, -1])),
        ("padding([3, 8], side='left')", qkv.padding([3, 8], side="left")),
        ("strided(2, offset=-1)", qkv.strided(2, offset=-1)),
        ("dilated(2, 3)", qkv.dilated(2, 3)),
        ("global_tokens((0, 5))", qkv.global_tokens([0, 5])),
        ("random_blocks(1, 2, 7)", qkv.random_blocks(1, 2, 7)),
        ("blocks([[1, 0], [1, 1]], 4)", qkv.blocks(torch.tensor([[True, False], [True, True]]), 4)),
        ("per_head([causal(), ~causal()])", qkv.per_head([qkv.causal(), ~qkv.causal()])),
        ("bigbird(2)", qkv.bigbird(2)),
        ("longformer(2, [0])", qkv.longformer(2, [0])),
    ],
)
def test_expressions_are_read(expression: str, mask: qkv.Mask) -> None:
    assert parse(expression) == mask


def test_lists_are_read_as_integers() -> None:
    found = parse("selected_blocks([[[[0, 2], [1, -1]]]], 2)")
    lists = torch.tensor([[0, 2], [1, -1]])[None, None]
    assert torch.equal(found.tensor(2, 6), qkv.selected_blocks(lists, 2).tensor(2, 6))


def test_every_constructor_but_mask_mod_can_be_written() -> None:
    made = {name for name in vars(qkv.masks.constructors) if not name.startswith("_")}
    assert set(CONSTRUCTORS) == made - {"mask_mod"}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "this is not an expression"),
        ("causal(", "this is not an expression"),
        ("causal() & ", "this is not an expression"),
        ("causal", "a mask is made by a call"),
        ("causal() and prefix(2)", "masks combine with & | ~"),
        ("not causal()", "masks combine with & | ~"),
        ("causal() + causal()", "constructors, literals and & | ~ only"),
        ("5", "constructors, literals and & | ~ only"),
        ("[causal()]", "constructors, literals and & | ~ only"),
        ("causal()()", "no such mask"),
        ("mask_mod(print)", "mask_mod takes a function"),
        ("__import__('os').system('true')", "no such mask"),
        ("print(1)", "no such mask"),
        ("torch.load('x')", "no such mask"),
        ("qkv.masks.causal()", "no such mask"),
        ("causal().tensor(3, 3)", "no such mask"),
        ("(lambda: causal())()", "no such mask"),
        ("prefix(open('/etc/passwd'))", "an argument is a literal"),
        ("prefix([n for n in (1, 2)])", "an argument is a literal"),
        ("prefix(1 + 1 + n)", "an argument is a literal"),
        ("prefix(*[1])", "arguments are written out"),
        ("prefix(**{'n': 1})", "arguments are written out"),
        ("prefix()", "do not fit the constructor"),
        ("prefix(1, 2, 3)", "do not fit the constructor"),
        ("causal(1)", "do not fit the constructor"),
        ("blocks('x', 2)", "nested list"),
        ("blocks([[1], [1, 0]], 2)", "nested list"),
        ("per_head(causal())", "per_head takes a list"),
        ("x" * 3000, "at most 2000 letters"),
        ("~" * 1500 + "causal()", ""),
    ],
)
def test_everything_else_is_refused(expression: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if message:
        with pytest.raises(qkv.ArgumentError, match=message.replace("|", r"\|")):
            parse(expression)
    assert main(["mask", expression, "--q", "4"]) in ((2,) if message else (0, 2))
    assert "Traceback" not in capsys.readouterr().err


def test_a_constructor_s_own_error_comes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(qkv.ArgumentError, match="sliding_window"):
        parse("sliding_window(0)")
    assert main(["mask", "sliding_window(0)"]) == 2
    assert "sliding_window" in capsys.readouterr().err


def test_mask_draws(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", "causal() & sliding_window(4)", "--q", "8", "--k", "8"]) == 0
    mask = qkv.causal() & qkv.sliding_window(4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "causal() & sliding_window(4)"
    assert "\n".join(lines[1:10]) == mask.picture(8, 8)
    assert lines[10] == "26 of 64 pairs visible (40.6%)"


def test_mask_says_what_a_call_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """At a million tokens: the picture, pairs, tiles, FLOPs, bytes, time, and those of a dense call."""
    arguments = ["causal() & (prefix(4) | sliding_window(4096))", "--q", "1000000", "--dtype", "bfloat16"]
    assert main(["mask", *arguments]) == 0
    shown = capsys.readouterr().out
    q = torch.zeros((), dtype=torch.bfloat16).expand(1, 1, 1_000_000, 64)
    found = qkv.plan(q, q, q, qkv.causal() & (qkv.prefix(4) | qkv.sliding_window(4096)))
    assert "one cell: 20,834 x 20,834 (queries x keys)" in shown
    assert "4,091,597,050 of 1,000,000,000,000 pairs visible (0.4%)" in shown
    assert "\n".join(found.costs()) in shown
    assert "the mask as a tensor would take 931 GiB" in shown
    assert "; dense 256 TFLOP" in shown
    assert main(["mask", *arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["pairs"]["visible_at_least"] == data["pairs"]["visible_at_most"] == 4_091_597_050
    assert data["dense"]["pairs"] == 10**12
    assert data["picture"][-1].startswith("one cell")
    assert (data["seconds"] is None) == (found.seconds is None)
    assert main(["mask", "causal()", "--d", "0"]) == 2


@pytest.mark.parametrize("positions", ["start", "end", "3", "-1"])
def test_mask_positions(positions: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", "causal()", "--q", "2", "--k", "6", f"--positions={positions}"]) == 0
    value = int(positions) if positions.lstrip("-").isdigit() else positions
    assert qkv.causal().picture(2, 6, positions=value) in capsys.readouterr().out


def test_mask_asks_where_the_queries_stand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", "causal()", "--q", "2", "--k", "6"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert 'positions="start"' in shown.err
    assert 'positions="end"' in shown.err
    assert main(["mask", "causal()", "--positions", "middle"]) == 2
    assert "must be start, end or an integer" in capsys.readouterr().err


def test_mask_tells_of_queries_that_see_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", "causal() & ~sliding_window(1)", "--q", "3"]) == 0
    assert "\n3 of 9 pairs visible (33.3%); 1 query sees no key: out 0, lse -inf\n" in capsys.readouterr().out


def test_mask_draws_a_batch_row_and_a_head(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", "padding([2, 5])", "--q", "2", "--k", "5", "--batch", "2", "--b", "1"]) == 0
    assert "10 of 10 pairs visible" in capsys.readouterr().out
    assert main(["mask", "per_head([causal(), ~causal()])", "--q", "4", "--heads", "2", "--h", "1"]) == 0
    assert "6 of 16 pairs visible" in capsys.readouterr().out


# ---- doctor


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert f"{torch.get_num_threads()} threads" in shown
    assert doctor.cpu_name() in shown
    q = torch.zeros(1, 32, 1, 128)
    k = torch.zeros(1, 8, 4096, 128)
    row = next(line for line in shown.splitlines() if line.startswith("decode"))
    assert row.split()[3] == qkv.plan(q, k, k).backend


def test_doctor_says_in_one_whole_line_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However long the reason is; both where the backend cannot be loaded and where it says that it is not built."""
    monkeypatch.setattr("qkv.backends.registry.load", _without_native(qkv.backends.registry.load))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    (native,) = [line for line in shown.splitlines() if line.startswith("native")]
    assert "not installed (no compiler was found); attention runs in plain PyTorch" in native
    assert native.endswith("pip install --force-reinstall --no-deps .")
    assert "C++20 compiler" in native
    assert "why not the native kernel" in shown
    assert "…" not in shown

    reason = "the native extension was not built (No module named 'qkv._native' in a very long list of places)"
    monkeypatch.setattr("qkv.backends.registry.load", lambda name: argparse.Namespace(missing=reason))
    assert doctor._native() == f"not usable: {reason}; {doctor.CURE}"


def test_doctor_says_what_the_transformers_that_is_here_has(monkeypatch: pytest.MonkeyPatch) -> None:

    found = {"masking_utils.mask (masks)": True, "cache_utils.Cache (caches)": True}
    monkeypatch.setattr("qkv.integrations.features.features", lambda: found)
    version = metadata.version("transformers")
    assert doctor._transformers() == f"{version}, has what attn_implementation='qkv' needs"
    found["cache_utils.Cache (caches)"] = False
    assert doctor._transformers() == f"{version}, lacks cache_utils.Cache (caches)"

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert doctor._transformers().startswith("not installed: pip install transformers")


def _without_native(load: object) -> object:
    def replaced(name: str) -> object:
        if name.startswith("cpu"):
            raise ImportError("no compiler was found")
        return load(name)  # type: ignore[operator]

    return replaced


def test_doctor_knows_the_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "flags : fpu avx2 fma f16c avx512f avx512bw avx512vl avx512dq"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: f"model name : Test CPU\n{flags}\n")
    assert doctor.instruction_sets() == ["avx512", "avx2"]
    assert doctor.cpu_name() == "Test CPU"


# ---- drawing


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.paint("x", "bold", _Screen()) == "\x1b[1mx\x1b[0m"
    assert terminal.paint("x", "bold", io.StringIO()) == "x"
    monkeypatch.setenv("TERM", "dumb")
    assert terminal.paint("x", "bold", _Screen()) == "x"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.paint("x", "bold", _Screen()) == "x"


def test_width_is_80_off_a_terminal_and_bounded_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal.columns(io.StringIO()) == 80
    for given, expected in ((20, 40), (100, 100), (300, 120)):
        monkeypatch.setenv("COLUMNS", str(given))
        assert terminal.columns(_Screen()) == expected


@pytest.mark.parametrize("width", [1, 7, 40])
def test_bars_have_their_width_and_grow(width: int) -> None:
    lengths = []
    for value in (0.0, 1e-9, 0.1, 0.5, 0.99, 1.0, 7.0):
        drawn = terminal.bar(value, width)
        assert terminal.cells(drawn) == width
        lengths.append(sum(" ▏▎▍▌▋▊▉█".index(letter) for letter in drawn))
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[1] == 1
    assert lengths[-2:] == [8 * width, 8 * width]


@pytest.mark.parametrize("text", ["plain", "注意力机制", "e\u0301tude", "", "a注b意"])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_fit_never_exceeds_its_width(text: str, width: int) -> None:
    cut = terminal.fit(text, width)
    assert terminal.cells(cut) <= width
    assert cut == text if terminal.cells(text) <= width else cut.endswith("…")


def test_heatmaps_shade_by_weight() -> None:
    assert terminal.heatmap([[0.3, 0.5, 0.8, 1.0, float("nan")], [0.0] * 5]).splitlines()[0] == "  ░░ ▒▒ ▓▓ ██ ??"


def test_tables_line_up() -> None:
    drawn = terminal.table([["注意", "1"], ["b", "22"], ["long name", "3"]], "<>").splitlines()
    assert {terminal.cells(line) for line in drawn} == {terminal.cells(drawn[0])}
