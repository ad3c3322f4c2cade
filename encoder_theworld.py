# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""The encoder of the Wan VAE, from images and videos to latents."""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanEncoder3d
from torch import nn
from transformers.utils import torch_compilable_check

from .configuration_theworld import TheWorldEncoderConfig
from .padding_theworld import map_by_shape
from .validation_theworld import check_floating
from .wan_blocks_theworld import use_frame_modules


# Pixels per forward pass, which bounds memory: one image of 256 x 256 on a CPU, where larger batches are slower, and
# eight of 512 x 512 elsewhere.
PIXELS_PER_PASS = {"cpu": 2**16, "accelerator": 2**21}
# Pixels per chunk of a video, but at least the frames of one latent frame: sixteen frames of 128 x 128 on a CPU.
# Larger chunks amortize the Winograd transform of the kernels.
PIXELS_PER_CHUNK = {"cpu": 2**18, "accelerator": 2**21}


@dataclass
class VideoCache:
    """
    The encoder's state between chunks of videos, owned by the caller.

    Each call of [`TheWorldEncoder`] replaces its tensors and never writes into them, so `copy.copy(cache)` is a
    snapshot from which several continuations can start. Its size does not depend on the number of frames.
    """

    shape: tuple[int, ...] = ()  # B, 3, H, W of the videos
    num_frames: int = 0
    # diffusers' `feat_cache`, one for each group of videos that is encoded together.
    layers: tuple[list[torch.Tensor | None], ...] = ()


class TheWorldEncoder(nn.Module):
    """
    The encoder of a Wan VAE, built from diffusers' own modules, for images and videos.

    Its parameters are those of `AutoencoderKLWan.encoder` and `.quant_conv`, with their diffusers names. It keeps no
    state between calls, so threads can share it.
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

    def forward(
        self, pixel_values: torch.Tensor | list[torch.Tensor], cache: VideoCache | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """
        Encodes images or videos to the mode of their latent distribution: deterministic and differentiable.

        A video is encoded a few frames at a time. The first latent frame is that of the first frame as an image. Each
        later one encodes `config.temporal_compression_ratio` = 4 frames and depends on all earlier ones.

        Args:
            pixel_values: Images [B, 3, H, W] or videos [B, T, 3, H, W], floating point, in [-1, 1], H and W multiples
                of 8, T = 1 + 4k. Or a list of images [3, H, W] or of videos [T, 3, H, W] of several sizes.
            cache: To encode videos in several calls, pass the same cache to each. After the first call, T = 4k.

        Returns:
            Latents [B, z, H / 8, W / 8] of images, [B, 1 + k, z, H / 8, W / 8] of videos (k of them after the first
            call with a cache), in the encoder's dtype, not normalized; equal to
            `AutoencoderKLWan.encode(videos.transpose(1, 2)).latent_dist.mode().transpose(1, 2)`. Of a list, a list of
            the latents of each.

        Raises:
            TypeError: If `pixel_values` is not floating point.
            ValueError: If its shape or range is wrong, or the cache belongs to other videos.
        """
        if isinstance(pixel_values, list) and all(isinstance(each, torch.Tensor) for each in pixel_values):
            return map_by_shape(self.encode, pixel_values)  # in one call, because FSDP gathers the weights for each
        return self.encode(pixel_values, cache)  # type: ignore[arg-type] # other lists are rejected there

    def encode(self, pixel_values: torch.Tensor, cache: VideoCache | None = None) -> torch.Tensor:
        """Latents of images or videos of one size; see `forward`."""
        self.check(pixel_values)
        # Not the weight's dtype: a quantized weight is stored as integers.
        pixels = pixel_values.to(self.quant_conv.bias.dtype)  # type: ignore[union-attr] # Wan's has a bias
        if pixels.dim() == 5:
            return self.encode_videos(pixels, VideoCache() if cache is None else cache)
        if cache is not None:
            raise ValueError("A `cache` needs videos [B, T, 3, H, W], got images [B, 3, H, W].")
        if torch.compiler.is_compiling():  # the compiler chooses the layout; one graph works for all sizes
            return self.mode(pixels.unsqueeze(2)).squeeze(2)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return torch.cat([self.mode(some.unsqueeze(2)).squeeze(2) for some in pixels.split(self.batch_size(pixels))])

    def check(self, pixel_values: torch.Tensor) -> None:
        """Checks dtype, shape and range; see `forward`."""
        channels, ratio = self.config.in_channels, self.config.spatial_compression_ratio
        check_floating(
            pixel_values,
            "`pixel_values` must be floating point in [-1, 1]",
            "TheWorldProcessor converts images; without it, use `image / 127.5 - 1`.",
        )
        shape = tuple(pixel_values.shape)
        if len(shape) not in (4, 5) or shape[-3] != channels or 0 in shape or shape[-2] % ratio or shape[-1] % ratio:
            raise ValueError(
                f"`pixel_values` must be [B, {channels}, H, W], or [B, T, {channels}, H, W] for videos, with at least "
                f"one image, and H and W multiples of {ratio}, got {list(shape)}. TheWorldProcessor resizes images to "
                "such a size."
            )
        # The tolerance is for rounding. NaN fails the comparison too.
        least, greatest = pixel_values.aminmax()
        torch_compilable_check(
            (least >= -1.001) & (greatest <= 1.001),
            "`pixel_values` must be in [-1, 1] (from 0..255: `image / 127.5 - 1`), but some are outside or NaN. "
            "TheWorldProcessor scales images to that range.",
        )

    def batch_size(self, pixels: torch.Tensor, limits: dict[str, int] = PIXELS_PER_PASS, frames: int = 1) -> int:
        """How many items, each of `frames` images [.., H, W], are encoded together; at least one."""
        limit = limits["cpu" if pixels.device.type == "cpu" else "accelerator"]
        return max(1, limit // (pixels.shape[-2] * pixels.shape[-1] * frames))

    def encode_videos(self, videos: torch.Tensor, cache: VideoCache) -> torch.Tensor:
        """Latents of checked videos [B, T, 3, H, W]; see `forward`."""
        batch, num_frames, *frame_shape = videos.shape
        ratio, shape = self.config.temporal_compression_ratio, (batch, *frame_shape)
        first = 0 if cache.num_frames else 1
        if num_frames % ratio != first % ratio:
            raise ValueError(
                f"Videos must have {f'1 + {ratio}k' if first else f'{ratio}k'} frames"
                f"{'' if first else ' if the cache has earlier frames'}, got {num_frames}. Remove frames, or repeat "
                "the last one."
            )
        if cache.num_frames and cache.shape != shape:
            raise ValueError(
                f"The cache belongs to videos [B, 3, H, W] = {list(cache.shape)}, got {list(shape)}. Pass a new "
                "`VideoCache()` for other videos."
            )

        groups = videos.split(self.batch_size(videos, frames=ratio))
        chunk = ratio * self.batch_size(videos, PIXELS_PER_CHUNK, frames=ratio * len(groups[0]))
        num_convs = sum(isinstance(module, WanCausalConv3d) for module in self.encoder.modules())
        layers = [list(past) for past in cache.layers] or [[None] * num_convs for _ in groups]
        # The compiler chooses the layout; with channels last, one frame comes out wrong (torch 2.13).
        layout = torch.contiguous_format if torch.compiler.is_compiling() else torch.channels_last_3d
        latents = []
        for group, past in zip(groups, layers, strict=True):
            frames = group.transpose(1, 2)
            chunks = (frames[:, :, :first], *frames[:, :, first:].split(chunk, dim=2))
            encoded = [self.mode(c.contiguous(memory_format=layout), past) for c in chunks if c.shape[2]]
            latents.append(torch.cat(encoded, dim=2))
        # Last, so that a call that fails leaves the cache unchanged.
        cache.shape, cache.num_frames, cache.layers = shape, cache.num_frames + num_frames, tuple(layers)
        return torch.cat(latents).transpose(1, 2)

    def mode(self, frames: torch.Tensor, past: list[torch.Tensor | None] | None = None) -> torch.Tensor:
        """Latents [B, z, t, h, w] of images [B, 3, 1, H, W], or of a chunk [B, 3, T, H, W] after `past`."""
        mean, _logvar = self.quant_conv(self.encoder(frames, past, [0])).chunk(2, dim=1)
        return mean
