# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Stage 1 trains a small `AutoencoderKLWan` to reconstruct scenes, and saves it in diffusers' format."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn import functional as F

from theworld.evaluation.scenes import SPLITS, draw_scene
from theworld.wan_blocks_theworld import use_frame_modules

from .trainer import train


BATCH_SIZE = 16
# Weight of the KL divergence per latent element, against the reconstruction error per pixel value.
KL_WEIGHT = 1e-3
NUM_SCENES_FOR_STATISTICS = 2000


def pixels_of(seeds: range) -> torch.Tensor:
    """Scenes as float32 [B, 3, 64, 64] in [-1, 1], equal to the processor's pixel values."""
    images = np.stack([np.asarray(draw_scene(seed).image) for seed in seeds])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


class FrameAutoencoder(nn.Module):
    """`AutoencoderKLWan` on single frames, and its losses."""

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.vae = use_frame_modules(vae)

    def posterior(self, pixel_values: torch.Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(self.vae.quant_conv(self.vae.encoder(pixel_values.unsqueeze(2))))

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = self.posterior(pixel_values)
        reconstruction = self.vae.decoder(self.vae.post_quant_conv(posterior.sample())).squeeze(2)
        l1 = F.l1_loss(reconstruction, pixel_values)
        mse = F.mse_loss(reconstruction, pixel_values)
        kl = posterior.kl().sum() / posterior.mean.numel()
        return {"loss": l1 + mse + KL_WEIGHT * kl, "l1": l1, "kl": kl}


def train_vae(run: Path, steps: int) -> tuple[AutoencoderKLWan]:
    """Trains the VAE, and writes latent statistics to its config; `run` is the folder for checkpoints."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    # A single frame does not use the temporal convolutions.
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_("time_conv" not in name)
    autoencoder = FrameAutoencoder(vae)

    def make_batch(step: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels_of(SPLITS["train"][step * BATCH_SIZE : (step + 1) * BATCH_SIZE])}

    train(autoencoder, make_batch, steps, 2e-3, run)

    seeds = SPLITS["train"][:NUM_SCENES_FOR_STATISTICS]
    with torch.no_grad():
        batches = (pixels_of(seeds[start : start + 100]).to(vae.device) for start in range(0, len(seeds), 100))
        latents = torch.cat([autoencoder.posterior(pixel_values).mode() for pixel_values in batches])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (vae,)
