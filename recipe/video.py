# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Stage 6 trains the encoder to use earlier frames. Stage 7 trains projection and Gemma on clips."""

from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from theworld.encoder_theworld import TheWorldEncoder
from theworld.evaluation.clips import FRAMES_PER_LATENT, make_clip
from theworld.evaluation.scenes import SPLITS, draw_scene

from . import align
from .align import Trainee
from .trainer import train


BATCH_SIZE = 8
# Weight of the distance between a clip's latents and those of its single frames, against the reconstruction error.
DRIFT_WEIGHT = 0.1
SCENE_SHARE = 0.4  # of the batches of the last stage


def frames_of(seeds: range) -> torch.Tensor:
    """Clips as float32 [B, T, 3, 64, 64] in [-1, 1], equal to the processor's pixel values."""
    frames = np.stack([np.stack([np.asarray(frame) for frame in make_clip(seed).frames]) for seed in seeds])
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3) / 127.5 - 1


class PastSlices(nn.Module):
    """Parametrizes a temporal convolution by its slices for past frames; the slice of the present is fixed."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("present", weight[:, :, -1:].detach().clone())

    def forward(self, past: torch.Tensor) -> torch.Tensor:
        return torch.cat([past, self.present], dim=2)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[:, :, :-1]


@torch.no_grad()
def inflate(encoder: TheWorldEncoder) -> list[WanCausalConv3d]:
    """
    Turns an image encoder into a video encoder in which a latent frame equals the latent of its last frame.

    Returns:
        The temporal convolutions, whose slices for past frames are zero.
    """
    convs = [
        module for module in encoder.modules() if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1
    ]
    for conv in convs:
        conv.weight[:, :, :-1] = 0
        if conv.kernel_size == (3, 1, 1):  # a `time_conv`, which images do not use
            conv.weight[:, :, -1] = torch.eye(conv.out_channels)[..., None, None]
            conv.bias.zero_()
    return convs


class Playback(nn.Module):
    """An encoder on clips, with a small head that reconstructs the frames of each latent frame."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        z_dim = model.config.world_config.z_dim
        self.conv_1 = nn.Conv2d(z_dim, 96, 3, padding=1)
        self.conv_2 = nn.Conv2d(96, FRAMES_PER_LATENT * 3 * 16, 3, padding=1)

    def forward(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        latents = self.model.get_world_latents(frames)[:, 1:].flatten(0, 1)
        moments = frames[:, 1:].unflatten(1, (-1, FRAMES_PER_LATENT)).flatten(0, 1)
        with torch.no_grad():
            as_images = self.model.get_world_latents(moments[:, -1])
        played = F.pixel_shuffle(self.conv_2(F.silu(self.conv_1(latents))), 4)  # at half the size
        l1 = F.l1_loss(played, F.avg_pool2d(moments.flatten(1, 2), 2))
        drift = F.mse_loss(latents, as_images)
        return {"loss": l1 + DRIFT_WEIGHT * drift, "l1": l1, "drift": drift}


def see_motion(checkpoint: Path, run: Path, steps: int) -> tuple:
    """Trains an image encoder's use of earlier frames; its latents of images do not change."""
    trainee = Trainee(checkpoint)
    model = trainee.model.model.requires_grad_(False)
    torch.manual_seed(0)
    playback = Playback(model)
    convs = inflate(model.world_encoder)
    for conv in convs:
        parametrize.register_parametrization(conv, "weight", PastSlices(conv.weight))
        conv.parametrizations.weight.original.requires_grad_(True)

    def make_batch(step: int) -> dict[str, torch.Tensor]:
        return {"frames": frames_of(SPLITS["train"][step * BATCH_SIZE : (step + 1) * BATCH_SIZE])}

    train(playback, make_batch, steps, align.LEARNING_RATE, run)
    for conv in convs:
        parametrize.remove_parametrizations(conv, "weight")
    return trainee.model, trainee.processor


def watch(checkpoint: Path, scene_cache: Path, clip_cache: Path, run: Path, steps: int) -> tuple:
    """Trains projection and Gemma on cached latents of clips, mixed with scenes so that those are not forgotten."""
    trainee = Trainee(checkpoint)
    trainee.model.model.world_encoder.requires_grad_(False)
    scene_latents, clip_latents = (load_file(cache)["latents"] for cache in (scene_cache, clip_cache))

    def make_batch(step: int) -> dict[str, torch.Tensor]:
        random = Random(step)
        if random.random() < SCENE_SHARE:
            seeds = random.sample(range(len(scene_latents)), BATCH_SIZE)
            rows = trainee.rows.batch([draw_scene(seed) for seed in seeds], random)
            return {**rows, "world_latents": scene_latents[seeds]}
        seeds = random.sample(range(len(clip_latents)), BATCH_SIZE)
        rows = trainee.rows.batch([make_clip(seed) for seed in seeds], random)
        return {**rows, "world_latents_videos": clip_latents[seeds]}

    return trainee.train(make_batch, steps, align.LEARNING_RATE / 3, run)
