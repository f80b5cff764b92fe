"""qkv.attention as an operator of PyTorch: compiled, exported, mapped, with users' functions."""
