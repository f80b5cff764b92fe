"""Masks and scores: algebra, values, intervals, programs and errors."""
