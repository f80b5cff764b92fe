"""The parts of `qkv bench`: what is measured (cases, rows), against whom (peers), how (runner), how told (report)."""
