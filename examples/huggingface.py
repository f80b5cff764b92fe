"""A Hugging Face model on qkv: one word turns it on; the tokens are the same, and no Lq x Lk mask is ever made."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, MistralConfig

from qkv.integrations.transformers import GrowingCache, cache_keyword  # importing it makes "qkv" known

torch.manual_seed(0)
config = MistralConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, sliding_window=7, initializer_range=0.1,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="qkv").eval()  # or from_pretrained(...)

prompts = torch.randint(2, 96, (3, 19))
real = torch.ones_like(prompts)
real[1, :8] = real[2, :11] = 0  # shorter prompts, padded on the left
options = {"attention_mask": real, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
growing = {cache_keyword(model): GrowingCache(config=config)}  # cache=..., or past_key_values=... before 5.24
tokens = model.generate(prompts, **growing, **options)

model.set_attn_implementation("eager")
assert torch.equal(model.generate(prompts, **options), tokens)
print("24 tokens for each of three prompts, the same as eager's:")
print(tokens[:, 19:])
