"""Training by several processes, each with some sequences of a batch (data) or some rows of a sequence (context)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from qkv.distributed import shards
from qkv.distributed.context import Context
from qkv.errors import ArgumentError, QKVError, RankError, UnsupportedError
from qkv.lm import checkpoint, parts
from qkv.lm.data import Corpus
from qkv.lm.decoder import KINDS, Config, Decoder
from qkv.lm.training import CLIP, Run, Settings, configured

T = TypeVar("T")
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = "torchrun --nproc-per-node 4 -m qkv.cli train ..."


@dataclass(frozen=True)
class Ranks:
    """The processes that train together: rank r has data rank r // context and context rank r % context."""

    every: DeviceMesh
    window: DeviceMesh | None  # those that hold a window together with this one; None: each holds its own

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks."""
        return self.every.get_local_rank() == 0

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.every.size())

    @property
    def context(self) -> int:
        """How many ranks hold a window together."""
        return 1 if self.window is None else int(self.window.size())

    @property
    def data(self) -> tuple[int, int]:
        """How many parts a batch has, and which is this rank's."""
        return self.count // self.context, self.every.get_local_rank() // self.context

    @property
    def group(self) -> dist.ProcessGroup:
        """The group of them all."""
        return self.every.get_group()

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in float64."""
        found = x.detach().double().clone()
        dist.all_reduce(found, group=self.group)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here; where it raises one of our errors on some rank, all ranks raise one.

        Without that the others would wait for it in their next exchange until the group's timeout.
        """
        found, error = None, None
        try:
            found = work()
        except QKVError as raised:
            error = raised
        failed = torch.tensor(
            self.count if error is None else self.every.get_local_rank(), dtype=torch.int64, device="cpu"
        )
        dist.all_reduce(failed, op=dist.ReduceOp.MIN, group=self.group)
        if error is not None:
            raise error
        if int(failed) < self.count:
            rule, fix = "all ranks must be able to go on", "See what that rank says"
            raise RankError.of("qkv train", rule, f"rank {int(failed)}, which cannot", fix)
        return found  # type: ignore[return-value]

    def begin(self, config: Config, settings: Settings, corpus: Callable[[int], Corpus]) -> ParallelRun:
        """A new run; `corpus` reads the text for a context.

        Raises
        ------
        ArgumentError, UnsupportedError
            Settings that so many ranks cannot divide, or ranks with different texts or settings.
        RankError
            Where another rank cannot begin.
        """
        text = self.together(lambda: corpus(config.context))
        self.same("text", int(text.sha256[:15], 16))
        told = hashlib.sha256(repr((config, settings)).encode()).hexdigest()
        self.same("settings", int(told[:15], 16))
        return ParallelRun(config, settings, text, self)

    def resume(self, path: Path, corpus: Callable[[int], Corpus]) -> ParallelRun:
        """The run of a checkpoint, a file or in parts, with the settings that it was begun with.

        Raises
        ------
        ArgumentError, UnsupportedError
            For what is no checkpoint, or one of another text; on all ranks.
        RankError
            Where that is so on another rank only.
        """

        def read() -> tuple[checkpoint.Saved, Config, Settings]:
            saved = checkpoint.Saved(path, {}, parts.notes_of(path)) if path.is_dir() else checkpoint.load(path)
            return saved, *configured(saved)

        saved, config, settings = self.together(read)
        run = self.begin(config, settings, corpus)
        if path.is_dir():
            run.resume_parts(path)
        else:
            self.together(lambda: run.resume(saved))
        return run

    def same(self, what: str, number: int) -> None:
        """An error, on all ranks, unless all of them have the same number below 2**62."""
        pair = torch.tensor([number, -number], dtype=torch.int64, device="cpu")
        dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=self.group)
        if int(pair[0]) != -int(pair[1]):
            fix = "Give all ranks the same files and the same command"
            raise ArgumentError.of("qkv train", f"all ranks must have the same {what}", "different ones", fix)


@contextmanager
def joined(context: int | None) -> Iterator[Ranks | None]:
    """`join` for a block, and what is lost in an exchange inside of it as RankError.

    A rank that leaves the block by an error does not wait for the others: its process ends, which they notice.
    """
    ranks = join(context)
    if ranks is None:
        yield None
        return
    with exchanges():
        yield ranks
    dist.destroy_process_group()


@contextmanager
def exchanges() -> Iterator[None]:
    """Errors of an exchange between ranks as RankError."""
    try:
        yield
    except QKVError:
        raise
    except RuntimeError as error:  # of gloo; those of torch.distributed are among them
        told = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        if not re.search("onnection|imed out|imeout|gloo|process group", told):
            raise
        fix = "See what another rank says; a run goes on from its last checkpoint with --resume"
        raise RankError.of("qkv train", "all ranks must stay to the end", told[:300], fix) from error


def join(context: int | None) -> Ranks | None:
    """The ranks that torchrun has started, of which so many hold a sequence together; None for a process alone.

    Raises
    ------
    ArgumentError, UnsupportedError
        An environment that torchrun did not make, or ranks that are no multiple of `context`.
    RankError
        If the ranks do not find each other.
    """
    given = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    context = 1 if context is None else context
    if "RANK" not in given and "WORLD_SIZE" not in given:
        if context > 1:
            fix = f"Start it as {_TORCHRUN}"
            rule = "several ranks hold a sequence together, and torchrun starts them"
            raise ArgumentError.of("qkv train", rule, f"--context-parallel {context} in one process", fix)
        return None
    if len(given) < len(_ENVIRONMENT) or not (given["RANK"].isdecimal() and given["WORLD_SIZE"].isdecimal()):
        fix = f"Start it as {_TORCHRUN}; or unset them, for one process"
        rule = f"a rank needs {', '.join(_ENVIRONMENT)} in its environment"
        raise ArgumentError.of("qkv train", rule, ", ".join(f"{k}={v}" for k, v in given.items()), fix)
    count = int(given["WORLD_SIZE"])
    if count % context or count < 1:
        fits = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        rule, fix = "the ranks must be a multiple of --context-parallel", f"Use --context-parallel in {{{fits}}}"
        raise ArgumentError.of("qkv train", rule, f"{count} ranks and --context-parallel {context}", fix)
    if count == 1:
        return None
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        rule, told = "the ranks must find each other", f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise RankError.of("qkv train", rule, told, f"Start it as {_TORCHRUN}") from error
    both = init_device_mesh("cpu", (count // context, context), mesh_dim_names=("data", "context"))
    return Ranks(init_device_mesh("cpu", (count,)), both["context"] if context > 1 else None)


class ParallelRun(Run):
    """A run of several ranks, which gives what one process gives but for the order in which gradients are added.

    Weights, gradients and the optimizer's moments are divided among all ranks (FSDP2). The loss is a mean over the
    bytes of the whole batch, so a rank's loss is its sum over its own bytes divided by all bytes, and a gradient is the
    sum over all ranks, of data and of context alike. FSDP takes the mean over ranks: the loss is multiplied by them.
    """

    def __init__(self, config: Config, settings: Settings, corpus: Corpus, ranks: Ranks) -> None:
        parts_of, own = ranks.data
        if settings.batch % parts_of:
            rule, given = "a batch is divided among data ranks", f"--batch {settings.batch} and {parts_of} of them"
            raise ArgumentError.of("qkv train", rule, given, f"Use a --batch that is a multiple of {parts_of}")
        if config.context < ranks.context:
            rule, given = "each rank holds some bytes of a window", f"--context {config.context}, {ranks.context} ranks"
            raise ArgumentError.of("qkv train", rule, given, "Use a smaller --context-parallel")
        if ranks.context > 1 and not config.caches:
            given = f"attention={config.attention!r}, op={config.op!r} and --context-parallel {ranks.context}"
            fix = f"Use op='qkv' and one of {', '.join(KINDS)}, or --context-parallel 1"
            raise UnsupportedError.of("qkv train", "layers for comparison take whole sequences", given, fix)
        self.ranks, self.contexts = ranks, dict[int, Context]()
        self.sequences = slice(own, None, parts_of)
        super().__init__(config, settings, corpus)

    def _decoder(self) -> Decoder:
        model = super()._decoder()
        for block in model.blocks:
            fully_shard(block, mesh=self.ranks.every)
        fully_shard(model, mesh=self.ranks.every)
        return model

    def _own(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's sequences of a batch."""
        return inputs[self.sequences], targets[self.sequences]

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of this rank's bytes of its sequences, in nats."""
        across = self._across(inputs.shape[1])
        if across is not None:
            inputs, targets = across.shard(inputs), across.shard(targets)
        logits = self.model(inputs, across=across)
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def _across(self, length: int) -> Context | None:
        mesh = self.ranks.window
        if mesh is None:
            return None
        if length not in self.contexts:
            self.contexts[length] = Context(mesh, shards(length, mesh, self.config.mask))
        return self.contexts[length]

    def _gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self._losses(*self._own(inputs, targets)) / targets.numel()
        (loss * self.ranks.count).backward()  # type: ignore[no-untyped-call]
        return self.ranks.total(loss)

    def _clip(self) -> None:
        # The norm is made whole first: torch 2.9 adds clip_grad_norm_'s epsilon to each rank's part of it.
        parameters = list(self.model.parameters())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        clip_grads_with_norm_(parameters, CLIP, norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _held_out_bits(self, windows: Iterator[tuple[Tensor, Tensor]]) -> float:
        total, count = torch.zeros((), dtype=torch.float64, device="cpu"), 0
        self.model.eval()
        with torch.no_grad():
            for inputs, targets in windows:
                count += targets.numel()
                if len(inputs) > self.ranks.data[1]:
                    total += self._losses(*self._own(inputs, targets))
                else:  # fewer windows than data ranks: this one computes one for nothing, since all ranks exchange
                    self._losses(inputs[:1], targets[:1])
        return float(self.ranks.total(total)) / count / log(2)

    def save(self, path: Path) -> None:
        """Write a checkpoint in parts, of all ranks together."""
        ranks = self.ranks
        parts.save(path, self.state(), self.notes(), group=ranks.group, first=ranks.first, together=ranks.together)

    def export(self, path: Path) -> None:
        """Write the weights alone, in bfloat16, by the first rank; all of them have to call it."""
        weights = {name: t.full_tensor() for name, t in self.model.state_dict().items()}
        self.ranks.together(lambda: self._export(path, weights) if self.ranks.first else None)

    def resume_parts(self, path: Path) -> None:
        """Continue a checkpoint in parts, which any number of ranks have written.

        Raises
        ------
        ArgumentError
            For a checkpoint of another text, or one whose tensors do not fit.
        """
        step, record = self.ranks.together(lambda: self._noted(path, parts.notes_of(path)))
        self._begin_moments()
        state = self.state()
        parts.fill(path, state, group=self.ranks.group, together=self.ranks.together)
        self.rng.set_state(state["rng.batches"])
        self.step, self.record = step, record
