"""Gradients of qkv.attention: first and second, and what of them a pass keeps."""
