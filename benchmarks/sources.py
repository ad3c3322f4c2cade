# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Writes sources for a conversion at real size: random weights, and a tokenizer as large as Gemma's."""

import itertools
import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoModelForCausalLM, GemmaTokenizer, PreTrainedConfig

from theworld import TheWorldProcessor


ROOT = Path(__file__).parents[1]


def fill_with_noise(module: torch.nn.Module) -> torch.nn.Module:
    """Fills a module on the meta device with repeated bfloat16 noise, which is much faster than new noise."""
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for tensor in module.parameters():
        repeats = -(-tensor.numel() // len(noise))
        tensor.data.copy_(noise.repeat(repeats)[: tensor.numel()].view(tensor.shape))
    return module


def make_large_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer of Gemma 2's size: 256,000 entries, 480,000 merges, a tokenizer.json of 30 MB."""
    bundled = json.loads((ROOT / "tokenizer.json").read_text())["model"]["vocab"]
    unused = {token: f"<unused{number}>" for number, token in enumerate(TheWorldProcessor.world_tokens)}
    letters = string.ascii_letters + string.digits
    words = ["".join(word) for length in (2, 3) for word in itertools.product(letters, repeat=length)]
    tokens = dict.fromkeys([*(unused.get(token, token) for token in bundled), *letters, *words])
    vocabulary = {token: index for index, token in enumerate(itertools.islice(tokens, 256_000))}
    merges = [(word[:cut], word[cut:]) for word in words if word in vocabulary for cut in range(1, len(word))]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    tokenizer.add_tokens(list(unused.values()))
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    return tokenizer


def make_sources(folder: Path, text_config: PreTrainedConfig) -> None:
    """Writes `vae` in diffusers' format, and `gemma` in transformers' format with files of up to 2 GB."""
    with torch.device("meta"):
        vae, gemma = AutoencoderKLWan(), AutoModelForCausalLM.from_config(text_config)
    fill_with_noise(vae).save_pretrained(folder / "vae")
    gemma = fill_with_noise(gemma)
    gemma.tie_weights()
    gemma.save_pretrained(folder / "gemma", max_shard_size="2GB")
    make_large_tokenizer().save_pretrained(folder / "gemma")
