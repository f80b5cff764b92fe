"""The caches: what they keep, refuse, survive and count."""
