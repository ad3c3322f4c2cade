# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""The encoder of the Wan VAE: images to latents."""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanEncoder3d
from torch import nn
from transformers.utils import torch_compilable_check

from .configuration_theworld import TheWorldEncoderConfig
from .frames_theworld import use_frame_modules


# Images are encoded together up to so many pixels, which bounds memory: one of 256 x 256 on a CPU, where more at once
# are slower, and eight of 512 x 512 elsewhere.
PIXELS_AT_ONCE = {"cpu": 2**16, "accelerator": 2**21}


class TheWorldEncoder(nn.Module):
    """
    The encoder of a Wan VAE, built from diffusers' own modules, for images.

    It holds the parameters of `AutoencoderKLWan.encoder` and `.quant_conv` under their diffusers names, and keeps
    nothing between calls, so threads may share it.
    """

    def __init__(self, config: TheWorldEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = WanEncoder3d(
            in_channels=config.in_channels,
            dim=config.base_dim,
            z_dim=config.z_dim * 2,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temperal_downsample),
            dropout=config.dropout,
        )
        self.quant_conv = WanCausalConv3d(config.z_dim * 2, config.z_dim * 2, 1)
        use_frame_modules(self)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Encodes images to the mode of their latent distribution: deterministic and differentiable.

        Args:
            pixel_values: [B, 3, H, W], floating point, in [-1, 1], H and W multiples of 8.

        Returns:
            Latents [B, z, H / 8, W / 8] in the encoder's dtype, not normalised; what
            `AutoencoderKLWan.encode(pixel_values[:, :, None]).latent_dist.mode()[:, :, 0]` returns.

        Raises:
            TypeError: If `pixel_values` is not floating point.
            ValueError: If its shape or its range is another.
        """
        channels, ratio = self.config.in_channels, self.config.spatial_compression_ratio
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"`pixel_values` must be floating point in [-1, 1], got {pixel_values.dtype}. "
                "TheWorldProcessor converts images; by hand it is `image / 127.5 - 1`."
            )
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or 0 in shape or shape[2] % ratio or shape[3] % ratio:
            raise ValueError(
                f"`pixel_values` must be [B, {channels}, H, W] with one image or more and H and W multiples of "
                f"{ratio}, got {list(shape)}. TheWorldProcessor resizes images to such a size."
            )
        # The slack is for rounding; NaN fails the comparison too.
        torch_compilable_check(
            pixel_values.abs().amax() <= 1.001,
            "`pixel_values` must be in [-1, 1] (0..255 maps there by `image / 127.5 - 1`), but values lie outside, or "
            "are NaN. TheWorldProcessor scales images to that range.",
        )
        images = pixel_values.to(self.quant_conv.weight.dtype)
        if torch.compiler.is_compiling():  # the compiler chooses the layout, and one graph serves all sizes
            return self.mode(images)
        images = images.contiguous(memory_format=torch.channels_last)
        limit = PIXELS_AT_ONCE["cpu" if images.device.type == "cpu" else "accelerator"]
        at_once = max(1, limit // (shape[2] * shape[3]))
        return torch.cat([self.mode(some) for some in images.split(at_once)])

    def mode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [B, z, h, w] of checked images [B, 3, H, W], all at once."""
        mean, _logvar = self.quant_conv(self.encoder(images.unsqueeze(2))).chunk(2, dim=1)
        return mean.squeeze(2)
