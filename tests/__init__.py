"""The tests of qkv, importable so that `python -m tests.gates.gate` and `python -m tests.gates.mutants` run."""

from __future__ import annotations

import os

# Two processes with two threads each share two cores: a thread that waits has to sleep, not to spin. OpenMP reads it
# once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What was measured on this machine decides nothing here: tests that want a recording name its file.
os.environ["QKV_TUNE"] = ""
