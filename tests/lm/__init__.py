"""The little language model: decoder, training, checkpoints, generation, serving."""
