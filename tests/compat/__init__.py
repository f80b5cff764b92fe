"""qkv.compat: PyTorch's function, and PyTorch's code with qkv in its place."""
