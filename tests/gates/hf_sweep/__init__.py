"""Every model type of the installed transformers, small, with random weights, `eager` against `qkv`: `make models`."""
