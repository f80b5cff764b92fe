"""The little language model: a decoder over bytes on qkv's layers, trained, saved, continued and served.

    data         a text as bytes to train on and bytes held out
    decoder      the model and its configuration
    variants     attention with one thing changed, and PyTorch's in its place, to compare with
    training     the loop, checkpoints that continue bit for bit
    comparison   training steps of several decoders, timed in turn
    checkpoint   safetensors files and what they say of themselves
    generation   what a trained model writes after a prompt
    serving      many requests at once on one paged cache
    model/       the weights that ship with the package, and their card

`qkv train` and `qkv demo` are its commands.
"""

from __future__ import annotations

from qkv.lm.decoder import Config, Decoder
from qkv.lm.generation import continue_prompt, load
from qkv.lm.serving import Request, Server

__all__ = ["Config", "Decoder", "Request", "Server", "continue_prompt", "load"]
