# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Stage 4 trains projection and Gemma on latents of a frozen encoder. Stage 5 trains the encoder too."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from theworld import TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.evaluation.scenes import SIZE, SPLITS, Scene, draw_scene

from .gemma import matrices_of
from .sequences import AnswerLoss, RowMaker
from .trainer import train


BATCH_SIZE = 16
LEARNING_RATE = 3e-3


class Trainee:
    """A checkpoint to train: the model, its processor, and a `RowMaker`."""

    def __init__(self, checkpoint: Path):
        self.model = TheWorldForConditionalGeneration.from_pretrained(checkpoint)
        self.processor = TheWorldProcessor.from_pretrained(checkpoint)
        self.rows = RowMaker(self.processor.tokenizer, (SIZE // self.processor.patch_size) ** 2)

    def pixel_values(self, scenes: list[Scene]) -> torch.Tensor:
        return self.processor.image_processor([scene.image for scene in scenes], return_tensors="pt").pixel_values

    def train(self, make_batch: Callable[[int], dict], steps: int, learning_rate: float, run: Path) -> tuple:
        train(AnswerLoss(self.model), make_batch, steps, learning_rate, run, matrices_of(self.model))
        return self.model, self.processor


def cache_latents(checkpoint: Path, pixels_of: Callable[[range], torch.Tensor], number: int, file: Path) -> None:
    """
    Writes the projection's input for `number` training scenes or clips, float32 [number, .., 16, 8, 8].

    `pixels_of` returns the pixel values of scenes or clips for a range of seeds.
    """
    model = Trainee(checkpoint).model
    latents = []
    for start in tqdm(range(0, number, 20), desc=file.stem, unit="20"):
        with torch.no_grad():
            latents.append(model.get_world_latents(pixels_of(SPLITS["train"][start : min(start + 20, number)])))
    save_file({"latents": torch.cat(latents).contiguous()}, unfinished := file.with_suffix(".unfinished"))
    unfinished.rename(file)


def align(checkpoint: Path, cache: Path, run: Path, steps: int) -> tuple:
    """Trains projection and Gemma of a converted checkpoint on cached latents; `run` is the folder for checkpoints."""
    trainee = Trainee(checkpoint)
    trainee.model.model.world_encoder.requires_grad_(False)
    latents = load_file(cache)["latents"]

    def make_batch(step: int) -> dict[str, torch.Tensor]:
        random = Random(step)
        seeds = random.sample(range(len(latents)), BATCH_SIZE)
        return {**trainee.rows.batch([draw_scene(seed) for seed in seeds], random), "world_latents": latents[seeds]}

    return trainee.train(make_batch, steps, LEARNING_RATE, run)


def fine_tune(checkpoint: Path, first_scene: int, run: Path, steps: int) -> tuple:
    """Trains an aligned checkpoint and its encoder, through the latent mode, on scenes from `first_scene` on."""
    trainee = Trainee(checkpoint)
    seeds = SPLITS["train"][first_scene:]

    def make_batch(step: int) -> dict[str, torch.Tensor]:
        scenes = [draw_scene(seed) for seed in seeds[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]]
        return {**trainee.rows.batch(scenes, Random(step)), "pixel_values": trainee.pixel_values(scenes)}

    return trainee.train(make_batch, steps, LEARNING_RATE / 4, run)
