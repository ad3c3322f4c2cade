# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Times prompts with world tokens in Gemma 3 270M (real config, random weights, float32), and the share of Gemma."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from transformers import DynamicCache, Gemma3TextConfig

from theworld import TheWorldConfig, TheWorldEncoderConfig
from theworld.modeling_theworld import TheWorldForConditionalGeneration

from .measure import REPEATS, Row, timed


# Fields of google/gemma-3-270m's config.json that differ from the defaults.
GEMMA = Gemma3TextConfig(
    vocab_size=262_144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=512,
)
SIDE = 512
NUM_TEXT_TOKENS = 32
NUM_ANSWER_TOKENS = 16
WORLD, START, END = 6, 7, 8  # token ids that the text does not use


def make_model(latent_merge_size: int) -> TheWorldForConditionalGeneration:
    torch.manual_seed(0)
    config = TheWorldConfig(
        text_config=GEMMA,
        world_config=TheWorldEncoderConfig(),
        image_token_id=WORLD,
        start_of_world_token_id=START,
        end_of_world_token_id=END,
        latent_merge_size=latent_merge_size,
    )
    return TheWorldForConditionalGeneration(config).eval()


class Prompt:
    """An image and a question in single steps, with clocks on the part of Gemma."""

    def __init__(self, model: TheWorldForConditionalGeneration):
        self.model = model
        self.num_world_tokens = (SIDE // model.config.patch_size) ** 2
        self.pixel_values = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
        self.question = torch.randint(100, 1000, (1, NUM_TEXT_TOKENS))
        image = torch.tensor([[2, START] + [WORLD] * self.num_world_tokens + [END]])
        self.input_ids = torch.cat([image, self.question], dim=1)
        self.in_gemma = 0.0
        for part in (model.model.language_model, model.lm_head):
            part.register_forward_pre_hook(lambda *_: self.add_to_gemma(-perf_counter()))
            part.register_forward_hook(lambda *_: self.add_to_gemma(perf_counter()))

    def add_to_gemma(self, seconds: float) -> None:
        self.in_gemma += seconds

    def timed(self, call: Callable) -> tuple[float, float]:
        """Seconds of a call, and the part of them in Gemma."""
        self.in_gemma = 0.0
        return timed(call), self.in_gemma

    def encode(self) -> None:
        self.latents = self.model.get_world_latents(self.pixel_values)

    def prefill(self) -> None:
        self.cache = DynamicCache(config=GEMMA)
        self.model(self.input_ids, world_latents=self.latents, cache=self.cache, logits_to_keep=1)

    def decode(self) -> None:
        for _ in range(NUM_ANSWER_TOKENS):
            self.model(torch.tensor([[500]]), cache=self.cache)

    def ask_again(self) -> None:
        self.model(self.question, cache=self.cache, logits_to_keep=1)

    @property
    def cache_megabytes(self) -> float:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers) / 1e6


Stages = dict[str, dict[str, float]]


@torch.no_grad()
def measure_language() -> tuple[list[Row], Stages]:
    """The rows, and the seconds of each stage of an answer, by the number of world tokens."""
    stages, prompts, prefills = {}, {}, {}
    rows = []
    for merge in (1, 2):
        prompt = prompts[merge] = Prompt(make_model(merge))
        encodings = [timed(prompt.encode) for _ in range(REPEATS)]
        prefills[merge], in_gemma = zip(*(prompt.timed(prompt.prefill) for _ in range(REPEATS)), strict=True)
        decodings, decodings_in_gemma = zip(*(prompt.timed(prompt.decode) for _ in range(REPEATS)), strict=True)
        tokens = f"{prompt.num_world_tokens} world tokens"
        peer = "Gemma's part of it"
        rows.append(Row(f"prefill of {tokens}", peer, prefills[merge], in_gemma, goal=1.02))
        rows.append(Row(f"decoding after {tokens}", peer, decodings, decodings_in_gemma, goal=1.02))
        stages[tokens] = {
            "encode": median(encodings),
            "prefill": median(prefills[merge]),
            f"decode {NUM_ANSWER_TOKENS} tokens": median(decodings),
        }
        if merge == 1:
            again = [timed(prompt.ask_again) for _ in range(REPEATS)]
            from_nothing = [sum(pair) for pair in zip(encodings, prefills[merge], strict=True)]
            for kept, seconds in (("latents", prefills[merge]), ("KV cache", again)):
                rows.append(Row(f"second question, {kept} kept", "nothing kept", seconds, from_nothing, faster=True))
    megabytes = " and ".join(f"{prompt.cache_megabytes:.0f}" for prompt in prompts.values())
    note = f"KV caches of {megabytes} MB"
    what = "prefill with `latent_merge_size=2`"
    rows.append(Row(what, "without", prefills[2], prefills[1], faster=True, note=note))
    return rows, stages
