"""The benchmark: that its comparisons are fair, and what it prints."""
