"""qkv.attention on tensors: what it computes, refuses, keeps and plans."""
