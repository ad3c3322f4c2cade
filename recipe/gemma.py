# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Stage 2 trains a small Gemma 3 and its tokenizer on the language of the questions, without pictures."""

import json
import math
import re
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer, GenerationConfig

from theworld.evaluation.scenes import SPLITS, draw_scene

from .sequences import AnswerLoss, RowMaker
from .trainer import train


BATCH_SIZE = 16
NUM_SCENES_FOR_TOKENIZER = 2000
NUM_LAYERS = 6
HEAD_DIM = 32  # the minimum of serving engines
WORLD_TOKENS_PER_ROW = 8
ROLES = ("user", "model") * NUM_SCENES_FOR_TOKENIZER  # words in every turn
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'-"


def train_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer: special tokens and bytes of Gemma's, and merges for the words of the questions."""
    scenes = [draw_scene(seed) for seed in SPLITS["train"][:NUM_SCENES_FOR_TOKENIZER]]
    texts = [text for scene in scenes for question in scene.questions for text in (question.text, question.answer)]
    bpe = Tokenizer(BPE())
    # Word by word, so that no merge spans two words.
    words = (word.replace(" ", "▁") for text in (*texts, *ROLES) for word in re.findall(r" ?\w+|\W", text))
    bpe.train_from_iterator(words, BpeTrainer(vocab_size=512, show_progress=False))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]

    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<unused{n}>" for n in range(4))]
    vocabulary += ["<start_of_turn>", "<end_of_turn>", "\n"]
    vocabulary += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary += ["▁", *ALPHABET, *("".join(pair) for pair in merges)]
    tokenizer = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges, add_bos_token=True
    )
    # Gemma's tokenizer.json lists these as added tokens too, so that no merge splits them.
    tokenizer.add_tokens([*(f"<unused{n}>" for n in range(4)), "\n"])
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    return tokenizer


def make_gemma(tokenizer: GemmaTokenizer) -> Gemma3ForCausalLM:
    # The second rotary frequency, theta^(-2 / head_dim), has the period of a row, so that a column has one phase.
    rope_theta = (WORLD_TOKENS_PER_ROW / (2 * math.pi)) ** (HEAD_DIM / 2)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        max_position_embeddings=4096,
        layer_types=["full_attention"] * NUM_LAYERS,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": rope_theta}},
    )
    gemma = Gemma3ForCausalLM(config)
    gemma.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=20,
    )
    return gemma


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of Gemma's layers, for Muon."""
    return [parameter for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim == 2]


def train_gemma(run: Path, steps: int) -> tuple[Gemma3ForCausalLM, GemmaTokenizer]:
    """Trains Gemma on questions and answers without the scenes; `run` is the folder for checkpoints."""
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    gemma = make_gemma(tokenizer)
    rows = RowMaker(tokenizer, num_world_tokens=0)

    def make_batch(step: int) -> dict[str, torch.Tensor]:
        seeds = SPLITS["train"][step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        return rows.batch([draw_scene(seed) for seed in seeds], Random(step))

    train(AnswerLoss(gemma), make_batch, steps, 2e-3, run, matrices_of(gemma))
    return gemma, tokenizer
