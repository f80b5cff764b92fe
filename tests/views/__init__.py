"""qkv.attention on a cache's view."""
