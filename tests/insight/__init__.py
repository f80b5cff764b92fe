"""qkv.why: the experiments."""
