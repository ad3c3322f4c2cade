# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
The modules of a Wan VAE for images, and for videos a few frames at a time: numerically equal to diffusers, and faster.

A causal 3x3x3 convolution reads two past frames, which are zeros before the first frame. So for an image only the last
time slice of a kernel counts, and the convolution is a 3x3 one. Videos are encoded in chunks; the state between chunks
is diffusers' `feat_cache`, a list that the caller holds.

On a CPU, in float32, without autograd or a compiler, residual blocks convolve with `winograd_theworld`.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock
from torch import nn
from torch.nn import functional as F

from .winograd_theworld import MIN_CHANNELS, MIN_TILES, norm_silu_conv


# Rows that `FrameDownsample` convolves together.
ROWS_PER_BAND = 64


def is_plain_on_cpu(module: nn.Module, *inputs: torch.Tensor) -> bool:
    """Whether `module(*inputs)` is float32 on a CPU, and neither autograd nor a compiler records it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    tensors = (*inputs, *module.parameters())
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors) and not (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )


class FrameConv(WanCausalConv3d):
    """`WanCausalConv3d` as 2D convolutions, one per frame and time slice of the kernel, which PyTorch runs faster."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if cache_x is None and x.shape[2] == 1:
            return self.conv_at_last_frame([x.squeeze(2)]).unsqueeze(2)
        if not is_plain_on_cpu(self, x):
            return super().forward(x, cache_x)
        frames = (*cache_x.unbind(2), *x.unbind(2)) if cache_x is not None else x.unbind(2)
        ends = range(len(frames) - x.shape[2] + 1, len(frames) + 1)
        return torch.cat([self.conv_at_last_frame(frames[:end]).unsqueeze(2) for end in ends], dim=2)

    def conv_at_last_frame(self, frames: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result [B, C', H, W] at the last of `frames` [B, C, H, W]; before the first there are zeros."""
        (last, last_weight), *earlier = zip(reversed(frames), reversed(self.weight.unbind(2)), strict=False)
        result = F.conv2d(last, last_weight, self.bias, padding="same")
        for frame, weight in earlier:
            result += F.conv2d(frame, weight, padding="same")
        return result


class FrameResidualBlock(WanResidualBlock):
    """`WanResidualBlock` for an image [B, C, 1, H, W], or, with `feat_cache`, the next frames [B, C, T, H, W]."""

    # transformers' `gradient_checkpointing_enable` sets this and `_gradient_checkpointing_func`. diffusers' encoder
    # has such a flag too, but never reads it.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable

    def forward(
        self, x: torch.Tensor, feat_cache: list[torch.Tensor | None] | None = None, feat_idx: list[int] | None = None
    ) -> torch.Tensor:
        if feat_cache is None or feat_idx is None:
            return self.encode(x)[0]
        own = slice(feat_idx[0], feat_idx[0] + 2)  # conv1's and conv2's
        x, *feat_cache[own] = self.encode(x, *feat_cache[own])
        feat_idx[0] += 2
        return x

    def encode(self, x: torch.Tensor, *past: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The result, and, if the convolutions' `past` is given, that of the next call."""
        if self.can_use_winograd(x, *past):
            return self.forward_winograd(x, *past)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.forward_plainly, x, *past)
        return self.forward_plainly(x, *past)

    def forward_plainly(self, x: torch.Tensor, *past: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """`encode` with diffusers' `forward`, which gradient checkpointing may run twice."""
        kept: list = list(past)
        return super().forward(x, kept or None, [0]), *kept

    def forward_winograd(self, x: torch.Tensor, *past: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """`encode` with `norm_silu_conv`."""
        frames, shortcut = (each.permute(0, 2, 3, 4, 1) for each in (x, self.conv_shortcut(x)))
        h = frames.new_empty(*frames.shape[:4], self.out_dim)
        before = [None if each is None else each.permute(0, 2, 3, 4, 1) for each in past]
        kept = [
            each.new_empty(each.shape[0], min(2, each.shape[1] + (0 if earlier is None else 2)), *each.shape[2:])
            for each, earlier in zip((frames, h), before, strict=False)
        ]
        (past_1, past_2), (kept_1, kept_2) = before or (None, None), kept or (None, None)
        norm_silu_conv(self.norm1, self.conv1, frames, out=h, past=past_1, kept=kept_1)
        norm_silu_conv(self.norm2, self.conv2, h, out=h, residual=shortcut, past=past_2, kept=kept_2)
        return tuple(each.permute(0, 4, 1, 2, 3) for each in (h, *kept))

    def can_use_winograd(self, x: torch.Tensor, *past: torch.Tensor | None) -> bool:
        return (
            is_plain_on_cpu(self, x, *(frames for frames in past if frames is not None))
            # An adapter or a quantized layer in place of a convolution computes more than its weights say.
            and type(self.conv1) is type(self.conv2) is FrameConv
            and not (self.training and self.dropout.p)
            and min(self.in_dim, self.out_dim) >= MIN_CHANNELS
            and x[0, 0].numel() >= 16 * MIN_TILES
        )


class FrameDownsample(WanResample):
    """
    `WanResample` for an image [B, C, 1, H, W], to half the height and width.

    With `feat_cache`, for the next frames [B, C, T, H, W]. In the mode "downsample3d" it also halves the number of
    frames after a video's first.
    """

    def forward(
        self, x: torch.Tensor, feat_cache: list[torch.Tensor | None] | None = None, feat_idx: list[int] | None = None
    ) -> torch.Tensor:
        in_bands = is_plain_on_cpu(self, x)
        x = torch.cat([self.halve(frame, in_bands).unsqueeze(2) for frame in x.unbind(2)], dim=2)
        if feat_cache is None or feat_idx is None or self.mode != "downsample3d":
            return x
        index = feat_idx[0]
        feat_idx[0] += 1
        last_before, feat_cache[index] = feat_cache[index], x[:, :, -1:].clone()
        return x if last_before is None else self.time_conv(torch.cat([last_before, x], dim=2))

    def halve(self, frame: torch.Tensor, in_bands: bool) -> torch.Tensor:
        """A frame [B, C, H, W] at half the height and width."""
        if not in_bands:
            return self.resample(frame)
        # In bands, so that the whole padded frame is never copied. A band reads the first row of the next.
        pad, conv = self.resample
        bands = [frame[:, :, top : top + ROWS_PER_BAND + 1] for top in range(0, frame.shape[2], ROWS_PER_BAND)]
        *upper, last = bands
        return torch.cat([conv(F.pad(band, (0, 1))) for band in upper] + [conv(pad(last))], dim=2)


def use_frame_modules(module: nn.Module) -> nn.Module:
    """
    Lets a Wan VAE, or a part of one, read images and chunks of videos; returns it.

    Modules keep the parameters and names that diffusers gave them; only their `forward` changes. Convolutions with a
    stride over time, which images never reach, stay as they are.
    """
    for child in module.modules():
        if isinstance(child, WanCausalConv3d) and child.stride == (1, 1, 1):
            child.__class__ = FrameConv
        elif isinstance(child, WanResidualBlock):
            child.__class__ = FrameResidualBlock
        elif isinstance(child, WanResample) and child.mode.startswith("downsample"):
            child.__class__ = FrameDownsample
    return module
