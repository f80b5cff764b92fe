"""Backends: interchangeable ways to compute one call. See `base` for the protocol."""
