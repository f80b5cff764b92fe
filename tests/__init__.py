"""The tests of qkv, importable so that `python -m tests.gates.gate` and `python -m tests.gates.mutants` run."""
