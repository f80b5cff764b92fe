"""The page of a trace as text: what it may load (nothing), its size, its numbers, and what hostile tokens become."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import qkv
from qkv.insight import Trace
from qkv.insight.page import document, framed
from qkv.insight.page.maps import pooled
from qkv.insight.page.source import Source
from qkv.insight.page.text import digits, visible
from tests.insight import pages
from tests.insight.pages import HOSTILE, Reader

MADE = {"small": pages.small, "long": pages.long, "paged": pages.paged, "hostile": pages.hostile}
SECTIONS = ["verdict", "shapes", "mask", "heads", "map", "query", "flash", "reproduce"]


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Trace, str]]:
    found = {}
    for name, make in MADE.items():
        trace = make()
        found[name] = trace, document(trace, [5] if name == "small" else [])
    return found


@pytest.fixture(params=MADE)
def page(request: pytest.FixtureRequest, made: dict[str, tuple[Trace, str]]) -> str:
    return made[request.param][1]


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert not re.search("[<>&\u2028\u2029]", text)
    return json.loads(text)


def unpacked(text: str, kind: str) -> list[float]:
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw))


def test_it_may_load_nothing_and_asks_for_nothing(page: str) -> None:
    reader = Reader(page)
    (policy,) = (a["content"] for t, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["base-uri"] == rules["form-action"] == "'none'"
    assert set(rules) == {"default-src", "style-src", "script-src", "base-uri", "form-action"}
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        inner = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inner]
        assert rules[rule] == " ".join(f"'sha256-{digest}'" for digest in digests)
        assert len(digests) == 1
    names = {tag for tag, _ in reader.elements}
    assert not names & {"img", "link", "iframe", "object", "embed", "audio", "video", "base", "form", "use", "image"}
    for tag, found in reader.elements:
        assert not {"src", "srcset", "action", "style", "xlink:href"} & set(found), (tag, found)
        assert not [name for name in found if name.startswith("on")], (tag, found)
        assert found.get("href", "#").startswith("#")  # type: ignore[union-attr]
    code = re.sub(r'"http://www\.w3\.org/2000/svg"', "", page)
    assert not re.search(
        r"https?://|fetch\(|XMLHttp|import\(|WebSocket|@import|url\(", code.replace("createObjectURL(", "")
    )


@pytest.mark.parametrize("name", MADE)
def test_it_has_every_section_in_order(made: dict[str, tuple[Trace, str]], name: str) -> None:
    trace, page = made[name]
    ids = [found["id"] for tag, found in Reader(page).elements if tag in ("section", "header")]
    wanted = [*SECTIONS]
    if trace.pages is not None:
        wanted.insert(6, "pages")
    assert ids == wanted
    assert len(re.findall(r'\bid="', page)) == len(Reader(page).ids), "an id stands twice"


@pytest.mark.parametrize("name", MADE)
def test_it_is_the_same_each_time_and_the_notebook_s_frame_holds_it(
    made: dict[str, tuple[Trace, str]], name: str, tmp_path: Path
) -> None:
    trace, page = made[name]
    if name != "small":
        trace.html(tmp_path / "page.html")
        assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
        assert document(MADE[name]()) == page
    frame = framed(trace)
    assert trace._repr_html_() == frame
    ((tag, found),) = Reader(frame).elements
    assert (tag, found["sandbox"]) == ("iframe", "allow-scripts allow-downloads")
    assert str(found["srcdoc"]).startswith("<!doctype html>\n<html")
    assert Reader(str(found["srcdoc"])).ids == Reader(page).ids
    assert len(frame) < 1_500_000


def test_hostile_tokens_are_texts(made: dict[str, tuple[Trace, str]]) -> None:
    plain, hostile = Reader(document(qkv.see(*pages.tensors(L=len(HOSTILE))))), Reader(made["hostile"][1])

    def shape(reader: Reader) -> list[str]:
        return [tag for tag, _ in reader.elements if tag not in ("bdi", "span")]

    assert shape(hostile) == shape(plain)
    assert len(made["hostile"][1].encode()) < 2_000_000
    shown = data_of(made["hostile"][1])["tokens"]["k"]
    assert [shown[str(j)] for j in range(len(HOSTILE))] == [visible(token) for token in HOSTILE]
    forbidden = re.compile("[\x00-\x1f\x7f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")
    for text in shown.values():
        assert not forbidden.search(text), ascii(text)
        assert len(text) < 28 * 10 + 40
    assert shown[str(len(HOSTILE) - 1)].endswith("… (1,000,000 characters)")
    assert not forbidden.search(made["hostile"][1].replace("\n", ""))


@pytest.mark.parametrize("name", ["small", "long"])
def test_one_query_is_that_of_float64(made: dict[str, tuple[Trace, str]], name: str) -> None:
    trace, page = made[name]
    L = trace.shapes.Lq
    q, k, v = (x.double() for x in pages.tensors(L=L))
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    if name == "long":
        mask &= mask.triu(-599) | (torch.arange(L) < 4)
    for lane, rows in enumerate(data_of(page)["rows"]):
        assert {row["i"] for row in rows} >= {0, L - 1, *([5] if name == "small" else [])}
        for row in rows[:6]:
            i = row["i"]
            dots = k[0, lane // 2] @ q[0, lane, i]
            weights = (dots / 4).masked_fill(~mask[i], -math.inf).softmax(-1)
            out = weights @ v[0, lane // 2]
            keys = torch.tensor(unpacked(row["keys"], "i"))
            norms = v[0, lane // 2].norm(dim=-1)
            for field, truth in (("dot", dots), ("weight", weights), ("norm", norms)):
                got = torch.tensor(unpacked(row[field], "f"), dtype=torch.float64)
                torch.testing.assert_close(got, truth[keys], rtol=2e-6, atol=2e-6)
            for place, j in enumerate(keys.tolist()):  # what the output would be without the key
                left = weights.clone()
                left[j] = 0
                left = left / left.sum() if float(left.sum()) > 1e-9 else left
                moved = float((left @ v[0, lane // 2] - out).norm() / out.norm())
                if mask[i, j]:
                    assert unpacked(row["effect"], "f")[place] == pytest.approx(moved, rel=1e-4, abs=1e-7)
            count, rest, seen = row["rest"]
            assert count == L - len(keys)
            assert rest == pytest.approx(1 - float(weights[keys].sum()), abs=1e-6)
            assert seen + int(mask[i][keys].sum()) == row["seen"] == int(mask[i].sum())
            steps, outs = row["tiles"]["steps"], unpacked(row["tiles"]["outs"], "f")
            m, l = steps[-1][1], steps[-1][3]
            assert m == pytest.approx(float((dots / 4)[mask[i]].max()), abs=1e-9)
            assert m + math.log(l) == pytest.approx(float((dots / 4)[mask[i]].logsumexp(0)), abs=1e-9)
            last = outs[-8:]
            torch.testing.assert_close(torch.tensor(last).double(), out[:8], rtol=1e-6, atol=1e-6)
            assert [digits(x, 3) for x in last] == [digits(x, 3) for x in row["kernel"]] or row["off"] < 1e-5


def test_every_tile_is_the_softmax_of_the_keys_so_far(made: dict[str, tuple[Trace, str]]) -> None:
    _, page = made["long"]
    q, k, v = (x.double() for x in pages.tensors(L=1500))
    row = data_of(page)["rows"][1][0]
    i, width = row["i"], row["tiles"]["width"]
    scores = (k[0, 0] @ q[0, 1, i] / 4)[: i + 1]
    scores[4 : max(4, i - 599)] = -math.inf
    outs = unpacked(row["tiles"]["outs"], "f")
    largest = -math.inf
    for n, (highest, m, factor, l) in enumerate(row["tiles"]["steps"]):
        part, so_far = scores[n * width : (n + 1) * width], scores[: (n + 1) * width]
        assert (highest if highest is not None else -math.inf) == pytest.approx(float(part.max()))
        assert m == pytest.approx(float(so_far.max()))
        assert factor == pytest.approx(math.exp(largest - m))
        assert l == pytest.approx(float((so_far - m).exp().sum()))
        truth = so_far.softmax(0) @ v[0, 0, : len(so_far)]
        assert outs[8 * n : 8 * n + 8] == pytest.approx(truth[:8].tolist(), abs=1e-6)
        largest = m


def test_maps_and_windows_are_the_weights(made: dict[str, tuple[Trace, str]]) -> None:
    trace, page = made["long"]
    data, L = data_of(page), 1500
    q, k, _ = (x.double() for x in pages.tensors(L=L))
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    mask &= mask.triu(-599) | (torch.arange(L) < 4)
    for lane in range(4):
        p = (q[0, lane] @ k[0, lane // 2].T / 4).masked_fill(~mask, -math.inf).softmax(-1)
        map_ = data["map"]["values"][lane]
        rows, columns = map_["rows"], map_["columns"]
        to_row, to_column = (torch.arange(L) * n // L for n in (rows, columns))
        sums = torch.zeros(rows, L, dtype=torch.float64).index_add_(0, to_row, p)
        sums = torch.zeros(rows, columns, dtype=torch.float64).index_add_(1, to_column, sums)
        means = sums / torch.bincount(to_row)[:, None]
        assert data["map"]["kind"] == "f16"
        got = torch.tensor(unpacked(map_["values"], "e")).double().view(rows, columns) / 1024
        torch.testing.assert_close(got, means, rtol=1e-3, atol=1e-6)
        assert len(data["windows"][lane]) >= 2
        for window in data["windows"][lane]:
            (a, b), (c, d) = window["q"], window["k"]
            got = torch.tensor(unpacked(window["values"], "e")).double().view(b - a, d - c) / 1024
            torch.testing.assert_close(got, p[a:b, c:d], rtol=1e-3, atol=1e-6)
        first = data["windows"][lane][0]
        assert first["q"][1] == first["k"][1] == L
    assert trace.statistics.map is not None


@pytest.mark.parametrize(
    ("rows", "columns", "budget"),
    [(40, 40, 3000), (150, 130, 3000), (256, 256, 60_000), (7, 256, 9000), (200, 100, 500)],
)
def test_maps_that_are_pooled_further_are_exact(rows: int, columns: int, budget: int) -> None:
    Lq, Lk = (n if n < 256 else 611 for n in (rows, columns))
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, Lq, 8, generator=rng), torch.randn(1, 2, Lk, 8, generator=rng)
    trace = qkv.see(q, k, k)
    maps = pooled(Source(trace), budget)
    assert maps is not None
    for h, one in enumerate(maps.values):
        if one is None:
            continue
        p = (q[0, h].double() @ k[0, h].double().T / 8**0.5).softmax(-1)
        to_row, to_column = torch.arange(Lq) * one.shape[0] // Lq, torch.arange(Lk) * one.shape[1] // Lk
        sums = torch.zeros(one.shape[0], Lk, dtype=torch.float64).index_add_(0, to_row, p)
        sums = torch.zeros(one.shape, dtype=torch.float64).index_add_(1, to_column, sums)
        torch.testing.assert_close(one, sums / torch.bincount(to_row)[:, None], rtol=1e-5, atol=1e-7)
    assert any(one is not None for one in maps.values)


def test_the_table_of_heads_has_the_trace_s_numbers(made: dict[str, tuple[Trace, str]]) -> None:
    trace, page = made["small"]
    (body,) = re.findall(r'id="heads-table".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    assert len(rows) == len(trace.heads)
    for head, row in zip(trace.table[0], rows, strict=True):
        numbers = [float(x) for x in re.findall(r'<td class="n" data-v="(.*?)"', row)]
        wanted = [head.effective, head.entropy, head.largest, head.sharp, head.first, head.distance]
        assert numbers == pytest.approx(wanted, rel=1e-8)
        assert digits(head.effective, 3) in row


def test_the_strip_never_invents(made: dict[str, tuple[Trace, str]]) -> None:
    text = Reader(made["small"][1]).texts["shapes"]
    for shape in ("(1, 4, 40, 16)", "(1, 2, 40, 16)", "(1, 4, 40, 40)", "(1, 40, E)", "(E, 4 · 16)", "(E, 2 · 16)"):
        assert shape in text
    assert "10.0 KiB" in text  # q: 4 heads of 40 tokens of 16 numbers of 4 bytes
    assert text.count("not seen") >= 4
    assert "25.0 KiB, not stored" in text


def test_pages_tell_the_cache_s_tables(made: dict[str, tuple[Trace, str]]) -> None:
    trace, page = made["paged"]
    assert trace.pages is not None
    text = Reader(page).texts["pages"]
    assert "2 sequences of 82 tokens on 7 pages of 8 slots" in text
    assert "4 pages are shared" in text
    mass = trace.statistics.mass
    assert mass is not None
    share = float(mass[0, :, :8].sum(-1).mean()) / 3
    assert f"{100 * share:.{0 if share > 0.0995 else 1}f} %" in text


def test_a_trace_without_tensors_says_what_its_page_lacks(tmp_path: Path) -> None:
    trace = pages.small()
    trace.save(tmp_path / "trace.json")
    page = document(Trace.load(tmp_path / "trace.json"))
    assert data_of(page)["rows"] == []
    texts = Reader(page).texts
    assert "was read from a file" in texts["query"]
    assert "was read from a file" in texts["flash"]
    with_tensors = Reader(document(trace)).texts
    for same in ("verdict", "shapes", "mask", "heads", "map"):
        assert texts[same] == with_tensors[same]


def test_tensors_that_were_changed_and_rows_that_are_not_there_raise(tmp_path: Path) -> None:
    q, k, v = pages.tensors()
    trace = qkv.see(q, k, v)
    with pytest.raises(qkv.ArgumentError, match="rows"):
        trace.html(tmp_path / "page.html", rows=[40])
    k += 1
    with pytest.raises(qkv.ArgumentError, match=r"k must not be changed in place .* Trace\.html\(\)"):
        trace.html(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_every_kind_of_call_has_a_page() -> None:
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    q, k, v = randn(2, 4, 9, 8), randn(2, 2, 23, 8), randn(2, 2, 23, 5)
    nan = q.clone()
    nan[0, 1, 3, 2] = torch.nan
    for name, trace in {
        "cross": qkv.see(q, k, v),
        "bias": qkv.see(q, k, v, bias=randn(4, 9, 23), softcap=3.0),
        "alibi": qkv.see(q, k, v, mask=qkv.causal(), positions="end", bias=qkv.alibi(torch.rand(4, generator=rng))),
        "sinks": qkv.see(q, k, v, sinks=randn(4)),
        "dead": qkv.see(q, k, v, mask=qkv.causal(), positions=-5),
        "nan": qkv.see(nan, k, v),
        "heads": qkv.see(q, k, v, heads=[3, 1]),
        "bfloat16": qkv.see(*(x.bfloat16() for x in (q, k, v))),
        "float64": qkv.see(*(x.double() for x in (q, k, v))),
        "no statistics": qkv.see(q, k, v, top=0, bins=0, mass=False),
        "one": qkv.see(q[:, :, :1], k[:, :, :1], v[:, :, :1]),
        "no key": qkv.see(q, k[:, :, :0], v[:, :, :0]),
        "no query": qkv.see(q[:, :, :0], k, v),
        "nothing": qkv.see(q[:0], k[:0], v[:0]),
    }.items():
        reader = Reader(document(trace))
        assert {"verdict", "query", "reproduce"} <= reader.ids, name
        data_of(document(trace))


def test_sinks_and_bias_stand_in_the_numbers() -> None:
    q, k, v = pages.tensors()
    sinks, bias = (
        torch.tensor([1.0, 2.0, 0.5, -1.0]),
        torch.randn(4, 40, 40, generator=torch.Generator().manual_seed(3)),
    )
    trace = qkv.see(q, k, v, sinks=sinks, bias=bias, softcap=5.0, mask=qkv.causal())
    row = data_of(document(trace))["rows"][2][0]
    i = row["i"]
    dots = k[0, 1].double() @ q[0, 2, i].double()
    scores = (5 * torch.tanh(dots / 4 / 5) + bias[2, i].double())[: i + 1]
    truth = torch.cat((scores, torch.tensor([0.5]))).softmax(0)[:-1]
    got = torch.tensor(unpacked(row["weight"], "f")).double()
    torch.testing.assert_close(got[: i + 1], truth, rtol=1e-5, atol=1e-6)
    assert unpacked(row["bias"], "f")[: i + 1] == pytest.approx(bias[2, i, : i + 1].tolist(), abs=1e-5)
    outs = torch.tensor(unpacked(row["tiles"]["outs"], "f")[-8:])
    torch.testing.assert_close(outs.double(), (truth @ v[0, 1, : i + 1].double())[:8], rtol=1e-5, atol=1e-6)
    assert "nothing" in Reader(document(trace)).texts["heads-table"]


def test_many_heads_stay_under_five_megabytes() -> None:
    rng = torch.Generator().manual_seed(0)
    for B, Hq, Hkv, L in ((1, 32, 8, 640), (4, 80, 8, 300)):
        q, k = torch.randn(B, Hq, L, 8, generator=rng), torch.randn(B, Hkv, L, 8, generator=rng)
        trace = qkv.see(q, k, k, mask=qkv.causal(), tokens=["\u202e<&>" * 40] * L)
        page = document(trace, range(0, L, 10))
        assert len(page.encode()) < 5_000_000, (B, Hq, L)
        assert len(data_of(page)["lanes"]) == min(256, B * Hq)
