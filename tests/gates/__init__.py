"""Programs that judge qkv at length: random configurations, mutants, stories of caches, other people's tests."""
