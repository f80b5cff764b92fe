"""The benchmark: that it is honest, and what it prints."""
