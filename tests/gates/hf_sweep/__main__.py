"""`python -m tests.gates.hf_sweep`: every model type of the installed transformers, `eager` against `qkv`.

Each type runs in a process of its own, forked from one that has imported torch and transformers, with limits of time
and memory. A line of JSON a type is kept under `build/models/`, so that a sweep that was stopped goes on where it was.
The exit code is 1 where a type differs in silence, and where a whole sweep built fewer than expected.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

EXPECTED = {"5.24": 400}  # types that must be built, or failing builds hide faults
_PATIENCE = 10  # times the limit of CPU time, where a machine is shared
_ROOT = Path(__file__).resolve().parents[3]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gates.hf_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all of them if none is given")
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU time of a type (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB a type may allocate (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="forget what an earlier sweep found")
    parser.add_argument("--retry", action="store_true", help="run those again that were not built or not finished")
    parser.add_argument("--table", action="store_true", help="print the table of what was found, and run nothing")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

    import torch
    import transformers

    from tests.gates.hf_sweep import build, table

    torch.set_num_threads(1)
    build.quiet()
    path = _ROOT / "build" / "models" / f"transformers-{transformers.__version__}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    every = build.types()
    if unknown := set(args.types) - set(every):
        parser.error(f"no model type of transformers {transformers.__version__}: {', '.join(sorted(unknown))}")
    kept = {} if args.again and not args.table else read(path)
    if args.again and not args.table:
        path.unlink(missing_ok=True)
    wanted = args.types or every
    if not args.table:
        open_ = ("unbuilt", "unfinished") if args.retry else ()
        todo = [name for name in wanted if args.types or name not in kept or kept[name]["class"] in open_]
        sweep(todo, path, args.seconds, args.memory)
    kept = read(path)
    print(table.summary(list(kept.values()), len(every), transformers.__version__))
    if args.types:
        return int(any(kept[name]["class"] == "WRONG" for name in args.types if name in kept))
    least = EXPECTED.get(".".join(transformers.__version__.split(".")[:2]), 0)
    return table.verdict(list(kept.values()), whole=len(kept) >= len(every), least=least)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What was found before, by type; a later line counts."""
    if not path.exists():
        return {}
    return {record["type"]: record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def sweep(names: list[str], path: Path, seconds: float, memory: float) -> None:
    import qkv.integrations.transformers
    from tests.gates.hf_sweep import judge

    assert qkv.integrations.transformers.NAME == "qkv"
    for n, name in enumerate(names):
        record = in_a_process(lambda name=name: judge.judge(name), name, seconds, memory)  # type: ignore[misc]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        why = f": {record['why']}" if record.get("why") and record["class"] != "unbuilt" else ""
        print(f"{n + 1}/{len(names)} {name}: {record['class']}{why}", file=sys.stderr, flush=True)


def in_a_process(run: Any, name: str, seconds: float, memory: float) -> dict[str, Any]:
    """What `run` returns in a child with limits; what became of the child where it returns nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            limit = int(memory * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            with os.fdopen(writing, "w", encoding="utf-8") as file:
                json.dump(run(), file)
            code = 0
        except MemoryError:
            code = 3
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(writing)
    until, text = time.monotonic() + _PATIENCE * seconds, b""
    while time.monotonic() < until:
        ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            break
        piece = os.read(reading, 65536)
        if not piece:
            break
        text += piece
    else:
        ready = []
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0 and text:
        found: dict[str, Any] = json.loads(text)
        return found
    late = not ready or status == -signal.SIGXCPU
    why = f"more than {seconds:.0f} s of CPU time, or {_PATIENCE} times that" if late else f"exit code {status}"
    return {"type": name, "class": "unfinished", "why": why}


if __name__ == "__main__":
    sys.exit(main())
