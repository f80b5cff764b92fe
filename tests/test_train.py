"""`qkv train`: the split, the decoder, the loop, checkpoints, ablations, and the command from end to end.

Judges: attention and decoder row by row in float64 NumPy, written here from the formulas; entropies known by
construction; and bits, where a promise is about bits.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import qkv
from qkv.cli.continuation import continue_prompt
from qkv.cli.decoder import KINDS, PLAIN, Config, Decoder, attention_layer
from qkv.cli.main import main
from qkv.cli.training import checkpoint, loop
from qkv.cli.training.ablations import ABLATIONS, AblatedAttention, Ablation
from qkv.cli.training.comparison import SdpaAttention, step_times
from qkv.cli.training.data import Corpus, read_corpus
from qkv.errors import ArgumentError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:qkv:UserWarning")]

Array = NDArray[np.float64]
TINY: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "context": 32, "window": 8}
SETTINGS = loop.Settings(steps=8, batch=4, warmup=2)


def corpus(data: bytes, held: bytes | None = None) -> Corpus:
    cut = len(data) - len(data) // 10
    train, held = (data, held) if held is not None else (data[:cut], data[cut:])
    first, last = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, held))
    return Corpus("test", first, last, "0" * 64)


def letters(count: int, seed: int = 0, symbols: int = 16) -> bytes:
    return bytes(np.random.default_rng(seed).integers(97, 97 + symbols, count, dtype=np.uint8))


# ---- the text


def test_the_reference_is_split_into_parts_that_share_no_paragraph() -> None:
    found = read_corpus(None, 256)
    train, held = (bytes(part.tolist()).decode() for part in (found.train, found.held))
    pieces = [{" ".join(p.split()) for p in re.split(r"\n\s*\n", part) if p.strip()} for part in (train, held)]
    assert min(map(len, pieces)) > 50
    assert not pieces[0] & pieces[1]
    assert 0.08 < len(held) / (len(train) + len(held)) <= 0.1
    assert "\n   " in train  # the text itself, not its words
    assert found.sha256 == read_corpus(None, 16).sha256


def test_a_file_is_cut_once_at_a_blank_line_and_nothing_is_lost(tmp_path: Path) -> None:
    data = b"".join(b"%d %s\n\n" % (n, letters(n % 50, n)) for n in range(200))
    path = tmp_path / "text"
    path.write_bytes(data)
    found = read_corpus(str(path), 32)
    train, held = (bytes(part.tolist()) for part in (found.train, found.held))
    assert train + held == data
    assert train.endswith(b"\n\n")
    assert 0 <= len(data) // 10 - len(held) < 60
    assert found.train.untyped_storage().data_ptr() != found.held.untyped_storage().data_ptr()
    path.write_bytes(bytes(range(256)) * 4)  # neither text nor blank lines
    assert len(read_corpus(str(path), 32).held) == 102


def test_batches_come_from_the_training_part_only_and_from_all_of_it() -> None:
    found = corpus(bytes(range(100)), b"\xff" * 50)
    batches = found.batches(16, 8, torch.Generator().manual_seed(0))
    seen: set[int] = set()
    for _ in range(40):
        inputs, targets = next(batches)
        assert torch.equal(inputs + 1, targets)
        seen |= set(inputs.flatten().tolist()) | set(targets.flatten().tolist())
    assert seen == set(range(100))


@pytest.mark.parametrize("length", [2, 8, 9, 16, 17, 50])
def test_each_held_out_byte_but_the_first_is_asked_once(length: int) -> None:
    found = corpus(b"x" * 100, bytes(range(length)))
    pairs = list(found.held_out(2, 8))
    assert torch.cat([inputs.flatten() for inputs, _ in pairs]).tolist() == list(range(length - 1))
    assert torch.cat([targets.flatten() for _, targets in pairs]).tolist() == list(range(1, length))
    assert max(inputs.shape[1] for inputs, _ in pairs) <= 8


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"x" * 2000)
    for path, words in ((tmp_path / "none", "no such file"), (tmp_path, "a directory"), (short, "2,000 bytes")):
        with pytest.raises(ArgumentError, match=words):
            read_corpus(str(path), 256)


# ---- attention with one thing changed, against its definition


def rotated(x: Array, dim: int) -> Array:
    """Turn the pair (i, i + dim/2) of row p by p * 10000^(-2i/dim)."""
    out: Array = x.copy()
    for p in range(len(x)):
        for i in range(dim // 2):
            angle = p * 10000.0 ** (-2 * i / dim)
            a, b = x[p, i], x[p, i + dim // 2]
            out[p, i] = a * math.cos(angle) - b * math.sin(angle)
            out[p, i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def judged(x: Array, weights: dict[str, Array], heads: int, name: str) -> Array:
    """One (L, dim) row of the batch, by the words of the ablation's name; "mha" changes nothing."""
    length, dim = x.shape
    heads = 1 if name == "one-head" else heads
    size = dim // heads
    outs = []
    for h in range(heads):
        mine = slice(h * size, (h + 1) * size)
        if name == "folded-qk":
            q, k = rotated(x @ weights["q_proj.weight"][h * dim : (h + 1) * dim].T, dim), rotated(x, dim)
        else:
            w_k = weights["q_proj.weight" if name.startswith("shared-qk") else "k_proj.weight"]
            q, k = rotated(x @ weights["q_proj.weight"][mine].T, size), rotated(x @ w_k[mine].T, size)
        v = x if name == "v-is-x-whole" else x[:, mine]
        if "v_proj.weight" in weights:
            v = x @ weights["v_proj.weight"][mine].T
        scale = {"scale-1": 1.0, "scale-1/d": 1 / size}.get(name, 1 / math.sqrt(q.shape[1]))
        out = np.zeros((length, v.shape[1]))
        for p in range(length):
            seen = [j for j in range(p + 1) if not (name == "shared-qk-no-self" and j == p)]
            if seen:
                scores = scale * (k[seen] @ q[p])
                weight = np.exp(scores - scores.max())
                out[p] = weight @ v[seen] / weight.sum()
        outs.append(out)
    joined: Array = np.concatenate(outs, axis=1) @ weights["o_proj.weight"].T
    return joined


@pytest.mark.parametrize("name", ["mha", *ABLATIONS])
def test_an_ablation_is_what_its_name_says(name: str) -> None:
    torch.manual_seed(3)
    ablation = ABLATIONS.get(name, Ablation("nothing"))
    layer = AblatedAttention(24, 2, ablation).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # scores of several units: a wrong scale or mask shows
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    got = layer(x, mask=qkv.causal()).detach().numpy()
    weights = {key: value.numpy() for key, value in layer.state_dict().items()}
    want = np.stack([judged(row.numpy(), weights, 2, name) for row in x])
    # float64 throughout: a few hundred roundings of numbers up to |want|
    assert abs(got - want).max() < 1e-12 * (1 + abs(want).max())
    if name == "shared-qk-no-self":
        assert not got[:, 0].any()


def test_with_nothing_changed_it_is_the_layer_of_the_library() -> None:
    torch.manual_seed(4)
    plain = AblatedAttention(32, 4, Ablation("nothing")).double()
    layer = qkv.nn.Attention(32, 4, rotary=qkv.rotary.Rotary(8)).double()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    assert torch.allclose(plain(x, mask=qkv.causal()), layer(x, mask=qkv.causal()), rtol=0, atol=1e-13)


# ---- the decoder


@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_is_its_formula(tied: bool) -> None:
    config = Config(tied=tied, **TINY)
    model = Decoder(config, seed=5).double()
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    tokens = np.frombuffer(letters(13, 5), dtype=np.uint8)

    def norm(x: Array, name: str) -> Array:
        eps = np.finfo(np.float64).eps
        return np.asarray(x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * weights[f"{name}.weight"])

    x = weights["embedding.weight"][tokens] * math.sqrt(32)
    for n in range(2):
        own = {key[len(f"blocks.{n}.attention.") :]: w for key, w in weights.items() if f"blocks.{n}.attention." in key}
        x = x + judged(norm(x, f"blocks.{n}.before_attention"), own, 2, "mha") / 2
        into = norm(x, f"blocks.{n}.before_mlp") @ weights[f"blocks.{n}.mlp.into.weight"].T
        gate, up = np.split(into, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"blocks.{n}.mlp.down.weight"].T / 2
    x = norm(x, "norm") / (math.sqrt(32) if tied else 1)
    want = x @ weights["embedding.weight" if tied else "head.weight"].T
    got = model(torch.from_numpy(tokens.astype(np.int64))[None])[0].detach().numpy()
    assert abs(got - want).max() < 1e-11 * abs(want).max()
    # and the bits of a text are the mean of -log2 p over its bytes after the first
    logp = want - np.log(np.exp(want).sum(1, keepdims=True))
    bits = -logp[np.arange(12), tokens[1:]].mean() / math.log(2)
    found = corpus(b"x" * 99, bytes(tokens))
    assert abs(loop.held_out_bits(model, found.held_out(4, 32)) - bits) < 1e-10


EVERY_KIND = [(kind, "qkv") for kind in (*KINDS, *ABLATIONS)] + [(kind, "sdpa") for kind in PLAIN]


@pytest.mark.parametrize(("kind", "op"), EVERY_KIND)
def test_a_later_byte_changes_no_bit_before_it(kind: str, op: str) -> None:
    model = Decoder(Config(attention=kind, op=op, **TINY), seed=1)
    tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(2))
    for at in (0, 1, 17, 29):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % 256
        with torch.no_grad():
            before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :at], after[:, :at])
        assert (before[:, at] != after[:, at]).any()
        if at == 0 and kind not in ("window",):  # and what may be seen is: attention is not dead
            assert (before[:, 7] != after[:, 7]).any()


@pytest.mark.parametrize("op", ["qkv", "sdpa"])
def test_a_window_of_8_sees_7_bytes_back(op: str) -> None:
    model = Decoder(Config(attention="window", op=op, **{**TINY, "layers": 1}), seed=1)
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 256
    with torch.no_grad():
        differs = (model(tokens) != model(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(3, 3 + 8))


@pytest.mark.parametrize("kind", [*KINDS, *ABLATIONS])
def test_cached_numbers_are_those_of_the_layers(kind: str) -> None:
    config = Config(attention=kind, **TINY)
    layer: Any = attention_layer(config)
    x = torch.zeros(1, 1, 32)
    if kind == "mla":
        kept = layer.latent(x).shape[-1]
    elif kind in PLAIN:
        kept = sum(t.numel() for t in layer.project(x)[1:])
    else:  # keys of all heads (one of width dim where they are folded) and values (x itself where there is no W_V)
        kept = 32 + 32
    assert config.cached_numbers() == config.layers * kept


@pytest.mark.parametrize(
    "given",
    [
        {"attention": "mhq"},
        {"op": "flash"},
        {"op": "sdpa", "attention": "mla"},
        {"layers": 0},
        {"dim": 36, "heads": 4},
        {"attention": "gqa", "heads": 1},
        {"context": 1.5},
    ],
    ids=str,
)
def test_configurations_that_do_not_fit(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"^qkv train: .*\. Got .*\. "):
        Config(**{**TINY, **given})


# ---- the loop


def repeated(blocks: int, seed: int) -> bytes:
    """Eight letters of 16, drawn anew for each block and said eight times: only the byte eight back tells the next."""
    return b"".join(letters(8, seed * 100_000 + n) * 8 for n in range(blocks))


LEARN = loop.Settings(steps=150, batch=8, warmup=10, rate=1e-2, seed=1)
SMALL: dict[str, Any] = {"dim": 32, "layers": 1, "heads": 2, "context": 64}


def learned(config: Config, text: Corpus) -> float:
    run = loop.Run(config, LEARN, text)
    run.go(LEARN.steps, LEARN.steps, lambda _: None)
    return run.record.held[-1][1]


def test_attention_learns_what_only_attention_can(monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus(repeated(300, 1), repeated(30, 2))
    # Unpredictable are 8 of 64 bytes, and those that a window's start hides: 4 bits each. Blind to other places, every
    # byte takes close to 4 bits.
    assert learned(Config(**SMALL), text) < 2.0
    monkeypatch.setattr(qkv.nn.Attention, "forward", lambda self, x, **_: torch.zeros_like(x))
    assert learned(Config(**SMALL), text) > 3.5


def test_noise_stays_noise_unless_the_mask_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus(letters(30_000, 1), letters(3_000, 2))
    assert learned(Config(**SMALL), text) > 3.98  # 16 letters by chance: no model that is blind to them goes below 4
    monkeypatch.setattr(Config, "mask", property(lambda self: None))
    assert learned(Config(**SMALL), text) < 3.5


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    settings = loop.Settings(steps=1000, rate=0.5, warmup=100)
    rates = [settings.rate_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.005)
    assert rates[49] == pytest.approx(0.25)
    assert max(rates) == pytest.approx(0.5) == rates[100]
    assert rates[550] == pytest.approx(0.05 + 0.45 / 2)  # half way down
    assert rates[999] == pytest.approx(0.05, abs=1e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert loop.Settings(steps=1).rate_at(0) == loop.Settings().rate


def test_a_step_has_its_own_rate_and_a_gradient_of_norm_1_at_most() -> None:
    settings = loop.Settings(steps=40, batch=4, warmup=4, rate=2e-3)
    run = loop.Run(Config(**TINY), settings, corpus(letters(2000)))
    run.rng.set_state(torch.Generator().manual_seed(7).get_state())
    inputs, targets = next(corpus(letters(2000)).batches(4, 32, torch.Generator().manual_seed(7)))
    twin = Decoder(Config(**TINY), settings.seed)
    torch.nn.functional.cross_entropy(twin(inputs).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.advance()
    raw, clipped = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) for model in (twin, run.model)
    )
    assert raw.norm() > 1.01  # else nothing would be clipped
    assert torch.allclose(clipped, raw / raw.norm(), rtol=1e-4, atol=1e-7)
    # Adam's first step has the size of the rate in every weight, here a quarter of the peak.
    moved = (run.model.norm.weight.detach() - before["norm.weight"]).abs()
    assert torch.allclose(moved, torch.full_like(moved, 5e-4), rtol=1e-2)


def test_settings_that_do_not_fit() -> None:
    for given in ({"steps": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"seed": -1}, {"warmup": 1.5}):
        with pytest.raises(ArgumentError, match="Got"):
            loop.Settings(**given)  # type: ignore[arg-type]


def test_a_seed_decides_and_another_decides_otherwise() -> None:
    text = corpus(letters(2000))
    losses = []
    for seed in (1, 1, 2):
        run = loop.Run(Config(**TINY), loop.Settings(steps=3, batch=2, seed=seed), text)
        torch.rand(seed)  # the global generator has no say
        losses.append([run.advance() for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_with_pytorchs_attention_the_losses_are_the_same_but_for_rounding() -> None:
    text = corpus(letters(2000))
    for kind in PLAIN:
        curves = []
        for op in ("qkv", "sdpa"):
            run = loop.Run(Config(attention=kind, op=op, **TINY), SETTINGS, text)
            assert any(isinstance(module, SdpaAttention) for module in run.model.modules()) == (op == "sdpa")
            curves.append([run.advance() for _ in range(4)])
        # Adam's first steps have the size of the rate whatever the gradient: they can double a rounding, not hide a
        # wrong gradient, which moves the loss by hundredths within these steps.
        assert np.allclose(curves[0], curves[1], rtol=0, atol=2e-4), (kind, curves)


def test_steps_are_timed_in_turn() -> None:
    found = step_times({op: Config(op=op, **TINY) for op in ("qkv", "sdpa")}, 2, rounds=3)
    assert {op: len(times) for op, times in found.items()} == {"qkv": 3, "sdpa": 3}
    assert all(t > 0 for times in found.values() for t in times)


# ---- checkpoints


def trained(path: Path, kind: str = "mha") -> loop.Run:
    run = loop.Run(Config(attention=kind, **TINY), SETTINGS, corpus(letters(2000)))
    run.go(5, 2, lambda _: None, save=path)
    return run


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_a_run_that_was_stopped_continues_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    whole = loop.Run(Config(attention=kind, **TINY), SETTINGS, corpus(letters(2000)))
    whole.go(8, 2, lambda _: None)
    trained(tmp_path / "a", kind)
    again = loop.resumed(checkpoint.load(tmp_path / "a"), corpus(letters(2000)))
    assert again.step == 5
    again.go(8, 2, lambda _: None, save=tmp_path / "b")
    assert again.record.losses == whole.record.losses
    assert dict(again.record.held).items() >= dict(whole.record.held).items()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    whole.save(tmp_path / "c")
    saved = [checkpoint.load(tmp_path / name) for name in "bc"]
    assert saved[0].tensors.keys() == saved[1].tensors.keys()
    for name, tensor in saved[0].tensors.items():
        assert torch.equal(tensor, saved[1].tensors[name]), name


def test_a_checkpoint_holds_weights_moments_and_generator_and_nothing_else(tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    saved = checkpoint.load(tmp_path / "a")
    parameters = dict(run.model.named_parameters())
    want = {"rng.batches"} | {f"model.{name}" for name in parameters}
    want |= {f"optimizer.{kind}.{name}" for name in parameters for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert set(saved.tensors) == want
    assert saved.notes["config"] == {**TINY, "attention": "mha", "tied": False, "op": "qkv"}
    assert saved.notes["step"] == 5
    assert not list(tmp_path.glob("*.part"))


class Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"model": Touch(str(trap))}, tmp_path / "torch")
    (tmp_path / "plain").write_bytes(pickle.dumps(Touch(str(trap))))
    for name in ("torch", "plain"):
        with pytest.raises(ArgumentError, match="pickles are never read"):
            checkpoint.load(tmp_path / name)
    assert not trap.exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty").write_bytes(b"")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    save_file({"x": torch.zeros(2)}, tmp_path / "notes", metadata={"format": checkpoint.FORMAT, "notes": "[1]"})
    save_file({"x": torch.zeros(2)}, tmp_path / "json", metadata={"format": checkpoint.FORMAT, "notes": "{"})
    for name in ("cut", "empty", "foreign", "notes", "json", "none"):
        with pytest.raises(ArgumentError, match="Name a file that qkv train wrote"):
            checkpoint.load(tmp_path / name)
    save_file({"x": torch.zeros(2)}, tmp_path / "bare", metadata={"format": checkpoint.FORMAT, "notes": "{}"})
    with pytest.raises(ArgumentError, match="config and settings"):
        loop.configured(checkpoint.load(tmp_path / "bare"))


def test_tensors_that_do_not_fit_are_refused_and_copy_nothing(tmp_path: Path) -> None:
    trained(tmp_path / "a")
    saved = checkpoint.load(tmp_path / "a")
    name = "model.blocks.1.attention.q_proj.weight"
    whole = saved.tensors[name]
    wrong: dict[str, dict[str, torch.Tensor]] = {
        r"must be \(32, 32\) torch.float32": {name: whole[:, :16]},
        "torch.int32": {name: whole.int()},
        "torch.float64": {name: whole.double()},
        "unknown ..blocks.9.x": {"model.blocks.9.x": whole},
    }
    for words, change in wrong.items():
        model = Decoder(Config(**TINY), seed=9)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        bad = checkpoint.Saved(saved.path, {**saved.tensors, **change}, saved.notes)
        with pytest.raises(ArgumentError, match=words):
            checkpoint.copy_exactly(bad, "model", model.state_dict())
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for missing in (name, "rng.batches", f"optimizer.exp_avg.{name[6:]}"):
        bad = checkpoint.Saved(saved.path, {k: v for k, v in saved.tensors.items() if k != missing}, saved.notes)
        with pytest.raises(ArgumentError, match="exactly"):
            loop.resumed(bad, corpus(letters(2000)))
    other = Corpus("other", *(torch.zeros(500, dtype=torch.uint8),) * 2, "1" * 64)
    with pytest.raises(ArgumentError, match="the text it began with"):
        loop.resumed(saved, other)


# ---- the command

SIZES = {"dim": 32, "layers": 1, "heads": 2, "context": 32, "steps": 12, "batch": 2, "threads": 1, "every": 4}
OPTIONS = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]


def test_the_command_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, whole, parts, alone = (tmp_path / name for name in ("t.txt", "whole", "parts", "alone"))
    text.write_bytes(b"\n\n".join(letters(60, n) for n in range(100)))
    assert main(["train", str(text), *OPTIONS, "--out", str(whole), "--export", str(alone)]) == 0
    out, err = capsys.readouterr()
    bits = re.search(r"bits per byte, held out +(\d\.\d{4}) after 12 steps", out)
    assert bits
    assert "key/value bytes a token      128 in bfloat16, over 1 layers" in out
    assert re.search(r"time a step +\d+ ms, median, 1 threads", out)
    assert "held out (the last tenth, from the next blank line on)" in err
    assert "step 12 of 12" in err

    assert main(["train", str(text), *OPTIONS, "--out", str(parts), "--stop", "5"]) == 0
    assert "after 5 steps" in capsys.readouterr().out
    assert main(["train", str(text), "--resume", str(parts), "--threads", "1"]) == 0
    assert bits[0] in capsys.readouterr().out
    a, b = checkpoint.load(whole), checkpoint.load(parts)
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())

    exported = checkpoint.load(alone)
    assert {t.dtype for t in exported.tensors.values()} == {torch.bfloat16}
    assert alone.stat().st_size < 2 * sum(t.numel() for t in exported.tensors.values()) + 8000
    for path in (whole, alone):
        said = continue_prompt("abcabc", 20, seed=3, path=path)
        assert said == continue_prompt("abcabc", 20, seed=3, path=path)
        assert len(said.text.encode(errors="replace")) >= 20
        assert 0 < said.bits < 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "a", "--steps", "3"], "Leave out --steps"),
        (["--resume", "none"], "no such checkpoint"),
        (["--out", "a"], "not overwritten"),
        (["--out", "no/where"], "cannot be written"),
        (["--attention", "mhq"], "attention is one of mha, gqa, mqa, window, mla, shared-qk"),
        (["--every", "0"], "--every is >= 1"),
        (["--context", "5000"], "longer than the context of 5,000 bytes"),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_bytes(letters(3000))
    if "a" in arguments:
        trained(tmp_path / "a")
    assert main(["train", "t", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == (["a", "t"] if "a" in arguments else ["t"])


@pytest.mark.parametrize("given", [("", 5, 1.0), ("x", -1, 1.0), ("x", 5, -1.0), ("x", 5, float("nan"))])
def test_prompts_that_cannot_be_continued(given: tuple[str, int, float]) -> None:
    with pytest.raises(ArgumentError, match="a prompt has at least one byte"):
        continue_prompt(given[0], given[1], temperature=given[2])


def test_a_continuation_takes_the_likeliest_byte_at_temperature_0(tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    tokens = list(b"abcdefgh" * 6)  # longer than the context of 32
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(run.model(torch.tensor([tokens[-32:]]))[0, -1].argmax()))
    said = continue_prompt("abcdefgh" * 6, 6, temperature=0, path=tmp_path / "a")
    assert said.text == bytes(tokens[48:]).decode(errors="replace")


# ---- the tables


def test_the_tables_are_made_in_pieces_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = Path(__file__).parent.parent / "benchmarks" / "train_tables.py"
    spec = importlib.util.spec_from_file_location("train_tables", where)
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    monkeypatch.setattr(tables, "SIZES", {"dim": 16, "layers": 1, "heads": 2, "context": 16})
    monkeypatch.setattr(tables, "EVERY", 1)
    monkeypatch.setattr(tables, "read_corpus", lambda path, context: corpus(letters(600)))

    def command(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["train_tables.py", *arguments, "--results", str(tmp_path / "r")])
        tables.main()

    for part in ("1/2", "2/2", "1/1"):
        command("variants", "play.txt", "--seeds", "0", "1", "--steps", "2", "--part", part)
    made = capsys.readouterr().err
    assert made.count("play.mha.qkv.0.json") == 1  # the third call found all of them made
    assert len(list((tmp_path / "r").iterdir())) == 2 * len(tables.VARIANTS)
    command("ablations", "--seeds", "0", "--steps", "2")
    command("report", "--json", str(tmp_path / "all.json"))
    printed = capsys.readouterr().out
    assert "| mla | " in printed
    assert "from one seed 0.00" in printed
    assert all(rule in printed for rule in tables.RULES.values())
    trained(tmp_path / "a").export(tmp_path / "b")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "b")
    command("card", str(tmp_path / "a"))
    told = capsys.readouterr().out
    assert "| size | 2 layers of 32, 2 heads, context 32 bytes" in told
    assert re.search(r"\*\*\d\.\d{3} bits per byte\*\* .* float32, \d\.\d{3} as stored", told)
    runs = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert len(runs) == 2 * len(tables.VARIANTS) + len(tables.RULES)
