"""Programs that judge qkv at length: random configurations, mutants, operations on caches, other people's tests."""
