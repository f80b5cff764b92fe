"""Malformed calls of every public function."""
