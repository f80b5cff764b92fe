"""qkv.see and its Trace: what it holds, looks up, prints, saves and compares."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import qkv
from qkv.backends import places
from qkv.insight import Trace
from qkv.insight.words import in_words


def inputs(Lq: int = 40, Lk: int = 40, Hq: int = 4, Hkv: int = 2, D: int = 16, seed: int = 0, B: int = 1):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, h, n, D, generator=rng) for h, n in ((Hq, Lq), (Hkv, Lk), (Hkv, Lk)))


def dense(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Probabilities in float64, of plain calls."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.double() @ k.mT / math.sqrt(q.shape[3])
    return (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("heads", [None, 3, [3, 0]])
def test_rectangles_and_rows_are_exact(heads: int | list[int] | None) -> None:
    q, k, v = inputs(50, 70)
    mask = torch.rand(50, 70, generator=torch.Generator().manual_seed(1)) < 0.7
    truth = dense(q, k, mask)
    t = qkv.see(q, k, v, mask=mask, heads=heads)
    for h in t.heads:
        got = t.weights(q=slice(7, 31), k=slice(11, 64), head=h)
        torch.testing.assert_close(got, truth[0, h, 7:31, 11:64], rtol=0, atol=1e-6)
        row = t.row(-1, head=h)
        whole = torch.zeros(70, dtype=torch.float64).index_put_((row.keys,), row.weights)
        torch.testing.assert_close(whole, truth[0, h, -1], rtol=0, atol=1e-6)
        torch.testing.assert_close(row.value_norms, v[0, h // 2, row.keys].double().norm(dim=-1), rtol=1e-6, atol=0)
        assert (row.weights[:-1] >= row.weights[1:]).all()
        assert row.hidden == 70 - len(row.keys)


def test_heads_chosen_are_those_of_the_whole_call() -> None:
    q, k, v = inputs()
    whole, some = qkv.see(q, k, v, mask=qkv.causal()), qkv.see(q, k, v, mask=qkv.causal(), heads=[3, 1])
    for name in ("lse", "entropy", "mass", "map", "top_keys"):
        a, b = getattr(whole.statistics, name)[:, [3, 1]], getattr(some.statistics, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_large_scores_keep_their_weights() -> None:
    """lse in float32 would lose the weights of scores near 1e6: their rows are found anew."""
    q, k, v = inputs(8, 30, 1, 1)
    t = qkv.see(q * 1e3, k * 1e3, v)
    torch.testing.assert_close(t.weights(), dense(q * 1e3, k * 1e3)[0, 0], rtol=0, atol=1e-9)


def test_hidden_bytes_are_not_looked_at() -> None:
    q, k, v = inputs(10, 10, 1, 1)
    clean = qkv.see(q, k.clone(), v.clone(), mask=qkv.padding([7]))
    k[:, :, 7:], v[:, :, 7:] = torch.nan, torch.inf
    t = qkv.see(q, k, v, mask=qkv.padding([7]))
    assert torch.equal(t.weights(), clean.weights())
    assert (t.weights(k=slice(7, 10)) == 0).all()
    assert t.row(3).keys.max() < 7
    assert t.warnings == clean.warnings


@pytest.mark.parametrize("ending", ["json", "npz"])
def test_a_file_gives_back_every_bit(tmp_path: Path, ending: str) -> None:
    q, k, v = inputs()
    q[0, 1, 5] = torch.nan
    hostile = ["</script>", "\u202e", "\ud800", "\0", '"'] * 8
    t = qkv.see(q, k, v, mask=qkv.causal(), tokens=hostile, sinks=torch.zeros(4))
    t.save(tmp_path / f"t.{ending}")
    again = Trace.load(tmp_path / f"t.{ending}")
    assert again.equals(t)
    assert again.tokens == tuple(hostile)
    assert str(again) == str(t)
    with pytest.raises(qkv.ArgumentError, match="attach"):
        again.row(0)
    with pytest.raises(qkv.ArgumentError, match="attach"):
        again.weights()
    attached = again.attach(q, k, v, mask=qkv.causal(), sinks=torch.zeros(4))
    assert torch.equal(attached.weights(), t.weights())
    for wrong in (dict(mask=None), dict(mask=qkv.causal(), scale=1.0)):
        with pytest.raises(qkv.ArgumentError, match="those of the trace's call"):
            again.attach(q, k, v, sinks=torch.zeros(4), **wrong)


def test_numpy_and_json_read_the_files(tmp_path: Path) -> None:
    """Judges that we did not write."""
    q, k, v = inputs()
    t = qkv.see(q, k, v)
    t.save(tmp_path / "t.npz")
    t.save(tmp_path / "t.json")
    arrays = np.load(tmp_path / "t.npz")
    assert np.array_equal(arrays["statistics.entropy"], t.statistics.entropy.numpy())
    assert np.array_equal(arrays["statistics.top_keys"], t.statistics.top_keys.numpy())  # type: ignore[union-attr]
    document = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert [h["head"] for h in document["heads_at_a_glance"][0]] == [0, 1, 2, 3]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x00", b'{"format": "qkv trace", "version": 99}'])
@pytest.mark.parametrize("ending", ["json", "npz"])
def test_files_that_are_no_traces(tmp_path: Path, content: bytes, ending: str) -> None:
    (tmp_path / f"t.{ending}").write_bytes(content)
    with pytest.raises(qkv.ArgumentError):
        Trace.load(tmp_path / f"t.{ending}")


def test_tensors_changed_in_place_are_refused() -> None:
    q, k, v = inputs()
    t = qkv.see(q, k, v)
    k[0, 0, 0, 0] += 1
    with pytest.raises(qkv.ArgumentError, match="k must not be changed in place"):
        t.row(0)
    with pytest.raises(qkv.ArgumentError, match=r"changed \d time"):
        t.weights()
    mask = torch.ones(40, 40, dtype=torch.bool)
    t = qkv.see(*inputs(), mask=mask)
    mask[0, 0] = False
    with pytest.raises(qkv.ArgumentError, match="changed"):
        t.weights()


def test_a_trace_without_tensors_keeps_none_alive() -> None:
    q, k, v = inputs()
    t = qkv.see(q, k, v, mask=qkv.causal())
    alive = weakref.ref(k)
    del q, k, v
    gc.collect()
    assert alive() is not None
    t = t.without_tensors()
    gc.collect()
    assert alive() is None
    assert t.statistics.lse.shape == (1, 4, 40)


def test_what_goes_wrong_says_how_to_go_on() -> None:
    q, k, v = inputs()
    t = qkv.see(q, k, v)
    for call, words in (
        (lambda: qkv.see(q, k, v, top=65), "top"),
        (lambda: qkv.see(q, k, v, tokens=["a"]), "40 texts"),
        (lambda: qkv.see(q, k, v, tokens="a" * 40), "list of str"),
        (lambda: qkv.see(q, k, v, heads=[4]), "distinct heads"),
        (lambda: qkv.see(q, k, v, heads=[1, 1]), "distinct heads"),
        (lambda: qkv.see(q, k, v, heads=1, bias=qkv.alibi(torch.ones(4))), "bias"),
        (lambda: qkv.see(q, k, v, mass=1), "True or False"),
        (lambda: qkv.see(q, k, v, is_causal=True), "causal"),
        (lambda: t.row(40), "i"),
        (lambda: t.row(0, head=9), "heads="),
        (lambda: t.row(0, batch=1), "batch"),
        (lambda: t.weights(q=slice(0, 8, 2)), "consecutive"),
        (lambda: t.weights(q="all"), "slice"),
        (lambda: t.save("t.txt"), "json"),
        (lambda: t.compare(qkv.see(q[:, :, :9], k, v)), "same sizes"),
    ):
        with pytest.raises(qkv.QKVError, match=words):
            call()
    long = torch.zeros(1, 1, 5000, 4)
    with pytest.raises(qkv.ArgumentError, match=r"0\.2 GB"):
        qkv.see(long, long, long, top=0, bins=0, mass=False).weights()


def test_comparing_finds_the_place() -> None:
    q, k, v = inputs()
    here = qkv.see(q, k, v)
    assert here.compare(qkv.see(q, k, v)).same
    moved = k.clone()
    moved[0, 1, 7] += 3
    found = {d.name: d for d in here.compare(qkv.see(q, moved, v)).differences}
    assert dict(found["mass"].where)["key"] == 7
    assert dict(found["mass"].where)["head"] in (2, 3)
    q[0, 2, 9] = torch.nan
    worst = {d.name: d for d in here.compare(qkv.see(q, k, v)).differences}["lse"]
    assert worst.largest == math.inf
    assert worst.where == (("batch", 0), ("head", 2), ("query", 9))


def test_warnings_name_planted_faults_and_no_others() -> None:
    q, k, v = inputs(64, 64)
    assert qkv.see(q, k, v, mask=qkv.causal()).warnings == ()
    spoiled = q.clone()
    spoiled[0, 2, 9:12] = torch.nan
    (told,) = qkv.see(spoiled, k, v, mask=qkv.causal()).warnings
    assert "head 2" in told
    assert "row 9" in told
    (told,) = qkv.see(q, k, v, mask=qkv.causal(), positions=-5).warnings
    assert "5 rows" in told
    copied = q.clone()
    copied[:, 1] = copied[:, 0]
    (told,) = qkv.see(copied, k, v, mask=qkv.causal()).warnings
    assert "head 1 does what" in told
    sharp = q.clone()
    sharp[:, 3] *= 10_000
    (told,) = qkv.see(sharp, k, v).warnings
    assert "head 3 looks at one key" in told
    flat = q.clone()
    flat[:, 0] *= 1e-3
    (told,) = qkv.see(flat, k, v, mask=qkv.causal()).warnings
    assert "head 0 looks at every key alike" in told
    sink = k.clone()
    sink[:, :, 0] = 4 * q[:, ::2].mean(2) / q[:, ::2].mean(2).norm(dim=-1, keepdim=True) * 4
    assert qkv.see(q + 2 * sink[:, :1, :1], sink, v).table[0][0].first > 0.3


@pytest.mark.parametrize("ascii", [False, True])
def test_the_text_fits_a_terminal(ascii: bool) -> None:
    from qkv.insight.terminal import cells

    q, k, v = inputs(100, 100)
    q[0, 0, 3] = torch.nan
    t = qkv.see(q, k, v, mask=qkv.causal() & (qkv.prefix(4) | qkv.sliding_window(16)), tokens=["注意力\n"] * 100)
    for text in (t.text(width=80, ascii=ascii), t.row(50, head=1).text(ascii=ascii)):
        assert max(map(cells, text.split("\n"))) <= 80, text
        assert "\x1b" not in text
        assert not ascii or text.isascii()
    assert "the last 16 keys" in t.text().replace("\n         ", " ")


def test_shapes_that_hold_nothing() -> None:
    for Lq, Lk in ((0, 5), (5, 0), (0, 0)):
        t = qkv.see(*inputs(Lq, Lk))
        assert "none of the" in str(t)
        assert t.weights().shape == (Lq, Lk)


def test_a_view_is_seen_as_plain_tensors_are() -> None:
    q, k, v = inputs(3, 50)
    cache = qkv.cache.PagedCache(pages=20, page_size=8, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    long, short = cache.add(), cache.add()
    cache.append([long], k, v)
    cache.append([short], k[:, :, :20], v[:, :, :20])
    view = cache.view([long, short])
    t = qkv.see(q.expand(2, -1, -1, -1), view, mask=qkv.causal())
    assert t.lengths == ((3, 50), (3, 20))
    assert t.pages is not None
    assert t.pages.size == 8
    assert len(t.pages.tables[0]) == 7
    plain = qkv.see(q, k[:, :, :20], v[:, :, :20], mask=qkv.causal(), positions="end")
    torch.testing.assert_close(t.statistics.entropy[1], plain.statistics.entropy[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(t.weights(batch=1, head=2), plain.weights(head=2), rtol=1e-6, atol=1e-6)
    mass = t.statistics.mass
    assert mass is not None
    assert (mass[1, :, 20:] == 0).all()


def test_masks_in_words() -> None:
    for mask, words in (
        (None, "every key"),
        (qkv.causal(), "itself and the keys before it"),
        (qkv.sliding_window(1), "itself alone"),
        (qkv.window(2, 3), "2 before to 3 after"),
        (~qkv.causal(), "every key but itself and the keys before it"),
        (qkv.strided(3), "every 3rd key"),
        (qkv.padding([3]), "no padding"),
        (qkv.documents([3, 2]) & qkv.causal(), "own document and of those only itself"),
        (qkv.per_head([qkv.causal(), qkv.causal()]), "head"),
        (qkv.mask_mod(lambda b, h, p, j: p >= j), "a function"),
        (qkv.bigbird(8), "drawn at random"),
    ):
        assert words in in_words(mask)


@pytest.mark.parametrize("backend", [None, "tiled"])
def test_long_looks_tell_how_far_they_are(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is found is the same."""
    monkeypatch.setattr(places, "_SECONDS", 0.001)
    q, k, v = inputs(6000, 6000, 1, 1)
    told: list[float] = []
    t = qkv.see(q, k, v, mask=qkv.causal(), backend=backend, progress=told.append)
    assert t.equals(qkv.see(q, k, v, mask=qkv.causal(), backend=backend))
    assert told == sorted(told)
    assert all(0 <= part <= 1 for part in told)
    assert told
