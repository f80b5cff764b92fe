"""The page in a real browser: with hostile texts, by keyboard, without scripts, and in a notebook's frame."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkv.insight import Trace
from qkv.insight.page import document, framed
from qkv.insight.page.text import digits, visible
from tests.insight import pages
from tests.kit.chromium import Browser, Page

pytestmark = pytest.mark.xdist_group("chromium")
MADE = {"small": pages.small, "long": pages.long, "paged": pages.paged, "hostile": pages.hostile}
TABLES = ("heads-table", "bins-table", "query-table", "tiles-table")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    return {name: make() for name, make in MADE.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, traces: dict[str, Trace]) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for name, trace in traces.items():
        found[name] = folder / f"{name}.html"
        trace.html(found[name])
    frame = framed(traces["hostile"])
    found["notebook"] = folder / "notebook.html"
    found["notebook"].write_text(f"<!doctype html><title>notebook</title>{frame}{frame}", encoding="utf-8")
    return found


def texts(page: Page) -> dict[str, str]:
    """What the tables and sentences of the page say."""
    return page.run(f"""Object.fromEntries([...{json.dumps(TABLES)}.map(id => id + " tbody"), "query-who", "query-says",
        "query-rest", "query-unique", "flash-end"].map(id => {{
            const [name, inner] = id.split(" "), found = document.getElementById(name);
            return [id, (inner && found ? found.querySelector(inner) : found)?.textContent ?? null]; }}))""")


@pytest.mark.parametrize("name", MADE)
def test_it_opens_from_disk_asks_for_nothing_and_complains_of_nothing(
    browser: Browser, files: dict[str, Path], name: str
) -> None:
    page = Page(browser, files[name])
    assert page.run("document.documentElement.classList.contains('js')")
    assert page.requests == []
    assert page.complaints == []
    assert page.run("document.title") == "qkv: what this attention did"
    page.close()


@pytest.mark.parametrize("name", ["small", "long", "hostile"])
def test_the_script_writes_what_the_server_wrote(browser: Browser, files: dict[str, Path], name: str) -> None:
    plain, live = Page(browser, files[name], scripts=False), Page(browser, files[name])
    # The protocol evaluates in a page whose own scripts are off.
    assert not plain.run("document.documentElement.classList.contains('js')")
    assert texts(plain) == texts(live)
    shown = "[...document.querySelectorAll('.js-only')].filter(e => e.getClientRects().length).length"
    assert plain.run(shown) == 0
    assert plain.run("document.querySelectorAll('figure svg').length") >= 3
    plain.close()
    live.close()


def test_hostile_texts_do_nothing(browser: Browser, files: dict[str, Path]) -> None:
    page = Page(browser, files["hostile"])
    for lane in range(4):
        page.run(f"document.querySelectorAll('#heads-table .pick')[{lane}].click()")
        for row in range(page.run("document.querySelectorAll('#query-picker button').length")):
            page.run(f"document.querySelectorAll('#query-picker button')[{row}].click()")
    wanted = {*map(visible, pages.HOSTILE)}
    found = set(page.run("[...document.querySelectorAll('#query-table bdi')].map(e => e.textContent)"))
    assert found == wanted
    assert page.run("document.querySelectorAll('img, iframe, h1 h1, [onclick], [onerror], [onload]').length") == 0
    counts = "[document.scripts.length, document.styleSheets.length, document.querySelectorAll('h1').length]"
    assert page.run(counts) == [2, 1, 1]
    assert page.run("[...document.querySelectorAll('bdi')].every(e => e.children.length === 0)")
    assert page.run("[...document.querySelectorAll('bdi')].every(e => getComputedStyle(e).unicodeBidi === 'isolate')")
    assert page.run("document.title") == "qkv: what this attention did"
    assert page.events("Page.javascriptDialogOpening") == []
    assert page.requests == page.complaints == []
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "a token makes the page wide"
    page.close()


def test_what_the_policy_forbids_does_not_run(browser: Browser, files: dict[str, Path]) -> None:
    page = Page(browser, files["small"])
    page.run("""(() => { const s = document.createElement('script');
        s.textContent = 'window.ran = 1'; document.body.append(s);
        const d = document.createElement('div'); d.innerHTML = '<img src="data:," onerror="window.ran = 2">';
        document.body.append(d); })()""")
    assert page.run("fetch('file:///etc/hostname').then(() => 'read', () => 'refused')") == "refused"
    assert page.run("window.ran ?? 'nothing'") == "nothing"
    page.close()


def test_every_control_is_reached_by_keyboard(browser: Browser, files: dict[str, Path]) -> None:
    page = Page(browser, files["paged"])
    controls = """[...document.querySelectorAll('a, button, select, input, summary, [tabindex="0"]')]
        .filter(e => e.getClientRects().length && e.checkVisibility() && !e.disabled)"""
    page.run(f"window.left = new Set({controls})")
    count = page.run("window.left.size")
    assert count > 40
    for _ in range(count + 5):
        page.press("Tab")
        page.run("window.left.delete(document.activeElement)")
    assert page.run("[...window.left].map(e => e.outerHTML.slice(0, 120))") == []
    assert page.run(f"{controls}.filter(e => !(e.textContent.trim() || e.ariaLabel)).length") == 0
    page.close()


def test_the_map_is_read_by_keyboard(browser: Browser, files: dict[str, Path], traces: dict[str, Trace]) -> None:
    page = Page(browser, files["small"])
    page.run("document.querySelector('#map-live canvas').focus()")
    page.press("Home")
    for _ in range(6):
        page.press("PageUp")
    page.press("ArrowDown", shift=True)
    page.press("ArrowRight")
    said = page.run("document.getElementById('map-says').innerText")
    weight = traces["small"].weights(q=slice(8, 9), k=slice(1, 2))
    assert "query 8 ␣it" in said.replace("\u00a0", " ")
    assert "key 1 ␣The" in said
    assert digits(float(weight), 3) in said
    page.press("Enter")
    assert page.run("document.getElementById('query-who').textContent").startswith("Query 8 ")
    page.close()


def test_the_map_is_read_by_pointer_and_zoomed(
    browser: Browser, files: dict[str, Path], traces: dict[str, Trace]
) -> None:
    page = Page(browser, files["long"])
    page.run("document.querySelector('#map-live canvas').scrollIntoView()")
    box = page.run(
        "(r => [r.left, r.top, r.width])(document.querySelector('#map-live canvas').getBoundingClientRect())"
    )
    for event in ("mouseMoved", "mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=event, x=box[0] + 60, y=box[1] + 300, button="left", clickCount=1)
    assert "queries" in page.run("document.getElementById('map-says').innerText")
    tabs = page.run("[...document.querySelectorAll('#zoom-tabs button')].map(b => b.textContent)")
    assert tabs[0] == "the last queries and the last keys"
    page.run("document.querySelectorAll('#zoom-tabs button')[0].click()")
    page.run("document.querySelector('#zoom-live canvas').focus()")
    for key in ("End", *["PageDown"] * 8):
        page.press(key)
    said = page.run("document.getElementById('zoom-says').innerText")
    assert "query 1,499" in said
    assert "key 1,499" in said
    weight = traces["long"].weights(q=slice(1499, 1500), k=slice(1499, 1500))
    assert digits(float(weight), 3) in said
    page.close()


def test_the_last_tile_is_the_output(browser: Browser, files: dict[str, Path], traces: dict[str, Trace]) -> None:
    page, trace = Page(browser, files["long"]), traces["long"]
    assert trace.held is not None
    page.run("document.getElementById('player').focus()")
    assert page.run("document.querySelector('#player .at').textContent") == "Tile 1 of 12"
    for _ in range(20):
        page.press("ArrowRight")
    assert page.run("document.querySelector('#player .at').textContent") == "Tile 12 of 12"
    cells = page.run("[...document.querySelector('#tiles-table tr.now').cells].map(c => c.textContent)")
    out = trace.held.out[0, 0, -1]
    assert cells[-1].split() == [digits(float(x)) for x in out[:4].double()]
    assert float(cells[3]) > 0
    page.press("ArrowLeft")
    assert page.run("document.querySelector('#player .at').textContent") == "Tile 11 of 12"
    page.close()


def test_heads_are_sorted_and_opened(browser: Browser, files: dict[str, Path]) -> None:
    page = Page(browser, files["small"])
    column = "[...document.querySelector('#heads-table').tBodies[0].rows].map(r => Number(r.cells[1].dataset.v))"
    before = page.run(column)
    page.run("document.querySelectorAll('#heads-table .sort')[1].click()")
    assert page.run(column) == sorted(before, reverse=True)
    assert page.run("document.querySelectorAll('#heads-table th')[1].ariaSort") == "descending"
    page.run("document.querySelectorAll('#heads-table .sort')[1].click()")
    assert page.run(column) == sorted(before)
    page.run("document.querySelector('#heads-table .pick[data-lane=\"2\"]').click()")
    assert page.run("[document.getElementById('lane').value, document.querySelector('#query-who b').textContent]") == [
        "2", "head 2",
    ]  # fmt: skip
    assert page.run("document.querySelectorAll('#heads-table tr.on').length") == 1
    page.close()


def test_both_themes_can_be_read(browser: Browser, files: dict[str, Path]) -> None:
    """Text against its ground: at least 4.5 to 1, by the formula of WCAG 2."""
    contrast = """(() => {
        const lum = c => c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
            .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
            .reduce((sum, x, n) => sum + x * [0.2126, 0.7152, 0.0722][n], 0);
        const ground = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c) && c !== 'transparent') return c; } };
        const bad = [];
        for (const e of document.querySelectorAll('p, li, td, th, dd, dt, h1, h2, h3, button, caption, code, bdi')) {
            if (!e.getClientRects().length || e.disabled || e.closest('.hidden, .saves')) continue;
            const [a, b] = [lum(getComputedStyle(e).color), lum(ground(e))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(e.outerHTML.slice(0, 80) + ground(e));
        }
        return bad; })()"""
    page = Page(browser, files["small"])
    grounds = []
    for theme in ("light", "dark"):
        page.look(theme)
        assert page.run(contrast) == []
        grounds.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]
    page.run("document.getElementById('theme').click()")  # auto, here dark, to light
    assert page.run("getComputedStyle(document.body).backgroundColor") == grounds[0]
    page.run("document.getElementById('theme').click()")
    page.look("light")
    assert page.run("getComputedStyle(document.body).backgroundColor") == grounds[1]
    page.close()


def test_no_width_makes_the_page_scroll_sideways(browser: Browser, files: dict[str, Path]) -> None:
    for name in ("paged", "long"):
        page = Page(browser, files[name])
        for width in (1600, 1000, 820, 540, 360):
            page.resize(width, 900)
            assert page.run("document.documentElement.scrollWidth") <= width
        page.close()


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_pictures_are_saved(browser: Browser, files: dict[str, Path], kind: str) -> None:
    page = Page(browser, files["long"], dark=True)
    page.run("""(() => { window.saved = []; const make = URL.createObjectURL;
        URL.createObjectURL = blob => { window.saved.push(blob); return make.call(URL, blob); };
        window.names = [];
        HTMLAnchorElement.prototype.click = function () { window.names.push(this.download); }; })()""")
    page.run(f"document.querySelectorAll('.save[data-kind={kind}]').forEach(b => b.click())")
    wanted = ["shapes", "mask", "map", "zoom", "flash"]
    ended = (
        f"(async () => {{ while (window.saved.length < {len(wanted)}) await new Promise(r => setTimeout(r, 20)); }})()"
    )
    page.run(ended)
    assert sorted(page.run("window.names")) == sorted(f"qkv-{name}.{kind}" for name in wanted)
    heads = page.run(
        "Promise.all(window.saved.map(async b => [...new Uint8Array(await b.arrayBuffer())].slice(0, 24)))"
    )
    for head in map(bytes, heads):
        if kind == "png":
            width, height = struct.unpack(">II", head[16:24])
            assert head[:8] == b"\x89PNG\r\n\x1a\n"
            assert 400 < width < 4000
            assert 200 < height < 4000
        else:
            assert head.startswith(b"<svg ")
    if kind == "svg":
        page.run("Promise.all(window.saved.map(b => b.text())).then(t => { window.texts = t; })")
        check = "t => new DOMParser().parseFromString(t, 'image/svg+xml')"
        assert page.run(
            f"window.texts.every(t => !({check})(t).querySelector('parsererror') && !/class=|var\\(/.test(t))"
        )
    else:  # no picture is one colour
        drawn = """Promise.all(window.saved.map(async blob => { const image = await createImageBitmap(blob);
            const canvas = document.createElement('canvas'); canvas.width = image.width; canvas.height = image.height;
            const ctx = canvas.getContext('2d'); ctx.drawImage(image, 0, 0);
            const all = new Uint32Array(ctx.getImageData(0, 0, image.width, image.height).data.buffer);
            return new Set(all).size; }))"""
        assert min(page.run(drawn)) > 8
    assert page.complaints == []
    page.close()


def test_a_notebook_shows_many_and_none_reaches_it(browser: Browser, files: dict[str, Path]) -> None:
    page = Page(browser, files["notebook"])
    assert page.run("document.title") == "notebook"
    tall = "[...document.querySelectorAll('iframe')].map(f => f.clientHeight > 600 && f.contentDocument === null)"
    assert page.run(tall) == [True, True]
    assert page.requests == [url for url in page.requests if url.startswith("about:srcdoc")]
    assert page.complaints == []
    page.close()


def test_the_page_of_a_file_works_without_tensors(browser: Browser, tmp_path: Path, traces: dict[str, Trace]) -> None:
    file = tmp_path / "page.html"
    file.write_text(document(traces["long"].without_tensors()), encoding="utf-8")
    page = Page(browser, file)
    page.run("document.querySelectorAll('#heads-table .pick')[1].click()")
    assert page.run("document.getElementById('lane').value") == "1"
    assert page.complaints == page.requests == []
    page.close()
