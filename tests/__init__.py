"""The tests of qkv, importable so that `python -m tests.gate` and `python -m tests.mutants` run."""
