"""The training loop: AdamW, warm-up and cosine, clipped gradients, checkpoints that continue bit for bit."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qkv.errors import ArgumentError
from qkv.lm import checkpoint, parts
from qkv.lm.data import Corpus
from qkv.lm.decoder import Config, Decoder

BETAS, DECAY, CLIP, FLOOR = (0.9, 0.95), 0.1, 1.0, 0.1  # the rate ends at FLOOR of its peak
HELD_BYTES = 8192  # bytes of a held-out forward pass, whatever the batch


@dataclass(frozen=True)
class Settings:
    """How a decoder is trained; with the text, the configuration and the thread count it decides every bit."""

    steps: int = 1200
    batch: int = 8
    rate: float = 2e-3
    warmup: int = 100  # steps, at most a tenth of all
    seed: int = 0

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) for n in (self.steps, self.batch, self.warmup, self.seed))
        if not whole or min(self.steps, self.batch) < 1 or min(self.warmup, self.seed) < 0 or not 0 < self.rate < 1:
            given = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
            rule, fix = "steps and batch are >= 1, warmup and seed >= 0, 0 < rate < 1", "Leave one out for its default"
            raise ArgumentError.of("qkv train", rule, given, fix)

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = min(self.warmup, self.steps // 10)
        if step < warmup:
            return self.rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Record:
    """What a run has measured so far."""

    losses: list[float] = field(default_factory=list)  # bits per byte of each step's batch
    held: list[tuple[int, float]] = field(default_factory=list)  # (step, bits per held-out byte)
    milliseconds: list[float] = field(default_factory=list)  # of each step since this process began

    def step_time(self) -> float:
        """Return the median milliseconds of a step; the first few, which set things up, do not count."""
        times = self.milliseconds[3:] or self.milliseconds
        return statistics.median(times) if times else math.nan


class Run:
    """A decoder being trained on a corpus."""

    def __init__(self, config: Config, settings: Settings, corpus: Corpus) -> None:
        self.config, self.settings, self.corpus = config, settings, corpus
        self.model = self._decoder()
        self.names = dict(self.model.named_parameters())
        matrices = [p for p in self.names.values() if p.dim() > 1]
        vectors = [p for p in self.names.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.rate, betas=BETAS)
        self.rng = torch.Generator().manual_seed(settings.seed + 1)  # of the batches; the weights have their own
        self.batches = corpus.batches(settings.batch, config.context, self.rng)
        self.step, self.record = 0, Record()

    def _decoder(self) -> Decoder:
        return Decoder(self.config, self.settings.seed)

    def advance(self) -> float:
        """Make one step and return its loss in bits per byte."""
        start = time.perf_counter()
        inputs, targets = next(self.batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(inputs, targets)
        self._clip()
        self.optimizer.step()
        bits = loss.item() / math.log(2)
        if not math.isfinite(bits):
            given = f"a loss of {bits} at step {self.step + 1} with {self.config} and {self.settings}"
            raise ArgumentError.of("qkv train", "the loss must stay finite", given, "Use a smaller --rate")
        self.step += 1
        self.record.losses.append(bits)
        self.record.milliseconds.append((time.perf_counter() - start) * 1e3)
        return bits

    def _gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Give every parameter the gradient of the mean loss of a batch, in nats, and return that loss."""
        loss = cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def _clip(self) -> None:
        """Scale the gradients down to a norm of `CLIP`, if theirs is larger."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)

    def evaluate(self) -> float:
        """Return the bits per byte on the held-out text, and record them."""
        context = self.config.context
        bits = self._held_out_bits(self.corpus.held_out(max(1, HELD_BYTES // context), context))
        self.record.held.append((self.step, bits))
        return bits

    def _held_out_bits(self, windows: Iterator[tuple[Tensor, Tensor]]) -> float:
        return held_out_bits(self.model, windows)

    def go(self, until: int, every: int, say: Callable[[Run], None], save: Path | None = None) -> None:
        """Train up to step `until`; every so many steps and at the end, evaluate and save. `say`: called each step."""
        while self.step < until:
            self.advance()
            if self.step % every == 0 or self.step == until:
                self.evaluate()
                if save is not None:
                    self.save(save)
            say(self)

    def save(self, path: Path) -> None:
        """Write all that continuing needs: weights, optimizer, generator, and the record as metadata.

        A file; or into the directory of a checkpoint that several ranks began.
        """
        write = parts.save if path.is_dir() else checkpoint.save
        write(path, self.state(), self.notes())

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that continuing needs."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in self._moments().items()}
        return tensors | {"rng.batches": self.rng.get_state()}

    def export(self, path: Path) -> None:
        """Write the weights alone, in bfloat16: a model to use, not to continue."""
        self._export(path, self.model.state_dict())

    def _export(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        tensors = {f"model.{name}": t.to(torch.bfloat16) for name, t in weights.items()}
        notes = self.notes()
        notes["record"]["losses"] = []  # of thousands of steps: nothing that using the model needs
        checkpoint.save(path, tensors, notes)

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint says of itself."""
        made = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
        sizes = {"trained": len(self.corpus.train), "held_out": len(self.corpus.held)}
        text = {"name": self.corpus.name, "sha256": self.corpus.sha256} | sizes
        record = {"losses": list(self.record.losses), "held": self.record.held, "step_ms": self.record.step_time()}
        numbers = {"step": self.step, "record": record, "text": text, "made_with": made}
        return {"config": asdict(self.config), "settings": asdict(self.settings), **numbers}

    def resume(self, saved: checkpoint.Saved) -> None:
        """Continue where a checkpoint of the same run stopped.

        Raises
        ------
        ArgumentError
            For a checkpoint of another text, or one whose tensors do not fit.
        """
        step, record = self._noted(saved.path, saved.notes)
        state = self.rng.get_state()
        checkpoint.copy_exactly(saved, "model", self.model.state_dict())
        checkpoint.copy_exactly(saved, "rng", {"batches": state})
        self._begin_moments()
        checkpoint.copy_exactly(saved, "optimizer", self._moments())
        self.rng.set_state(state)
        self.step, self.record = step, record

    def _noted(self, path: Path, notes: Mapping[str, Any]) -> tuple[int, Record]:
        """The step and the record of a checkpoint's notes; an error for one of another text."""
        try:
            text, step, noted = notes["text"], int(notes["step"]), notes["record"]
            record = Record([float(b) for b in noted["losses"]], [(int(s), float(b)) for s, b in noted["held"]])
            same = text["sha256"] == self.corpus.sha256
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(path, "text, step and record", error) from None
        if not same:
            rule, fix = "a run continues on the text it began with", "Name the same, unchanged file"
            raise ArgumentError.of("qkv train", rule, f"{self.corpus.name} and a checkpoint of {text.get('name')}", fix)
        return step, record

    def _begin_moments(self) -> None:
        """Give the optimizer the tensors that a checkpoint fills."""
        for parameter in self.names.values():
            made = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
            self.optimizer.state[parameter] = made | {"exp_avg_sq": torch.zeros_like(parameter)}

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}": value
            for name, parameter in self.names.items()
            for kind, value in self.optimizer.state[parameter].items()
        }


def decoder(saved: checkpoint.Saved) -> Decoder:
    """Return the trained decoder of a checkpoint or an export, ready to use."""
    model = Decoder(configured(saved)[0])
    checkpoint.copy_exactly(saved, "model", model.state_dict())
    return model.eval()


def resumed(saved: checkpoint.Saved, corpus: Corpus) -> Run:
    """Return the run of a checkpoint, with the settings that it was begun with."""
    config, settings = configured(saved)
    run = Run(config, settings, corpus)
    run.resume(saved)
    return run


def configured(saved: checkpoint.Saved) -> tuple[Config, Settings]:
    """Read a checkpoint's configuration and settings.

    Raises
    ------
    ArgumentError
        If they are missing or hold something else.
    """
    try:
        return Config(**saved.notes["config"]), Settings(**saved.notes["settings"])
    except (KeyError, TypeError) as error:
        raise _unreadable(saved.path, "config and settings", error) from None


def _unreadable(path: Path, what: str, error: Exception) -> ArgumentError:
    rule, given = f"a checkpoint's notes must hold its {what}", f"{path} ({type(error).__name__}: {error})"
    return ArgumentError.of("qkv train", rule, given, "Name a file that qkv train wrote")


def held_out_bits(model: Decoder, windows: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Return the mean bits per byte over windows of (inputs, targets)."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for inputs, targets in windows:
            total += cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += targets.numel()
    return total / count / math.log(2)
