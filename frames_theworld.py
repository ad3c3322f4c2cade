# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
The modules of a Wan VAE on single frames: the numbers of diffusers, several times sooner.

Everywhere: a causal convolution sees the past, and before a first frame there are only zeros. So the last time slice
of a kernel does all the work, and a 3x3x3 convolution is a 3x3 one.

Besides, on a CPU, in float32, where nothing is to be differentiated or compiled: residual blocks convolve by
Winograd's F(4x4, 3x3). Rows of 4 outputs depend on 6 inputs x and 3 weights w as the product of two polynomials does.
With both known by their values at 6 points, the product is 6 numbers in place of 12, and of a tile of 4x4 outputs 36
in place of 144 (A. Lavin and S. Gray, 2016, arXiv:1509.09308). Tiles are many, so they are 36 matrix products:

    V = B^T x B [36, tiles, C]      U = G w G^T [36, C, C']      output = A^T (V U) A [tiles, 4, 4, C']

A frame [H, W, C] goes through in bands of tiles that fit the processor's cache. Nothing but the weights outlives a
call, so nothing can go stale, and threads may share the modules.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import nn
from torch.nn import functional as F


# Measured on 2 cores by benchmarks/encoder.py. One thread does as well with a quarter of them. Two meet after every
# operation: the fewer and larger those are, the better, until the points are more than the caches hold.
TILES_A_BAND = 512
ROWS_A_BAND = 64
# For fewer of either, transforming costs more than it saves.
MIN_TILES, MIN_CHANNELS = 64, 64

# G: a row of 3 weights, as a polynomial, at the points 0, 1, -1, 2, -2 and infinity.
G = (
    (1 / 4, 0, 0),
    (-1 / 6,) * 3,
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)

# A step of a transform: where the sum `first + factor * second` goes.
Step = tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]


def weights_at_points(weight: torch.Tensor) -> torch.Tensor:
    """U = G w G^T [36, C, C'], by column and row, of 3x3 kernels [C', C, 3, 3]."""
    matrix = torch.tensor(G, dtype=torch.float64)
    matrix = torch.einsum("rh,cw->crhw", matrix, matrix).reshape(36, 9).to(weight.dtype)
    return (matrix @ weight.flatten(2).transpose(1, 2)).permute(1, 2, 0)


def to_points(x: torch.Tensor, points: torch.Tensor) -> list[Step]:
    """
    Steps that make points [6, ..] = B^T x of rows of inputs x [6, ..].

        4  0 -5  0  1  0
        0 -4 -4  1  1  0
        0  4 -4 -1  1  0
        0 -2 -1  2  1  0
        0  2 -1 -2  1  0
        0  4  0 -5  0  1
    """
    apart, odd_even = torch.empty_like(points[:4]), torch.empty_like(points[:2])
    return [
        (x[2:], -1, x[:4], apart),
        (apart[2:], -4, apart[:2], points[::5]),
        (apart[2], 2, apart[1], points[3]),
        (apart[2], -2, apart[1], points[4]),
        (x[3:5], -4, x[1:3], odd_even),
        (odd_even[1], 1, odd_even[0], points[1]),
        (odd_even[1], -1, odd_even[0], points[2]),
    ]


def from_points(points: torch.Tensor, y: torch.Tensor) -> list[Step]:
    """
    Steps that make rows of outputs y [4, ..] = A^T points.

        1  1  1  1  1  0
        0  1 -1  2 -2  0
        0  1  1  4  4  0
        0  1 -1  8 -8  1
    """
    sums, differences = torch.empty_like(points[:2]), torch.empty_like(points[:2])
    return [
        (points[1:5:2], 1, points[2:5:2], sums),
        (points[1:5:2], -1, points[2:5:2], differences),
        (sums[0], 1, sums[1], y[0]),
        (y[0], 1, points[0], y[0]),
        (differences[0], 2, differences[1], y[1]),
        (sums[0], 4, sums[1], y[2]),
        (differences[0], 8, differences[1], y[3]),
        (y[3], 1, points[5], y[3]),
    ]


def run(steps: list[Step]) -> None:
    for first, factor, second, out in steps:
        torch.add(first, second, alpha=factor, out=out)


def norm_silu(norm: WanRMS_norm, x: torch.Tensor, out: torch.Tensor) -> None:
    """Writes `silu(norm(x))` of x [.., C] to `out`."""
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
    torch.mul(x, norm.scale / lengths, out=out).mul_(norm.gamma.flatten())
    F.silu(out, inplace=True)


def norm_silu_conv(
    norm: WanRMS_norm, conv: WanCausalConv3d, x: torch.Tensor, out: torch.Tensor, plus: torch.Tensor | None = None
) -> None:
    """
    Writes `conv(silu(norm(x))) + plus` of frames x [B, H, W, C] to `out` [B, H, W, C'], by Winograd.

    `out` may be x: a band is read before it is written, and its last two rows are kept for the next.
    """
    height, width, channels = x.shape[1:]
    rows, columns = -(-height // 4), -(-width // 4)  # of tiles
    rows = min(rows, -(-TILES_A_BAND // columns))  # in a band
    weights = weights_at_points(conv.weight[:, :, -1])

    band = x.new_zeros(4 * rows + 2, 4 * columns + 2, channels)  # zeros around the frame
    by_row = x.new_empty(6, rows, 4 * columns + 2, channels)
    inputs = x.new_empty(6, 6, rows, columns, channels)  # at points of a column and of a row
    products = x.new_empty(6, 6, rows, columns, out.shape[-1])
    rows_left = x.new_empty(4, 6, rows, columns, out.shape[-1])
    outputs = x.new_empty(rows, 4, columns, 4, out.shape[-1])
    rows_to_points = to_points(band.unfold(0, 6, 4).movedim(-1, 0), by_row)
    columns_to_points = to_points(by_row.unfold(2, 6, 4).movedim(-1, 0), inputs)
    points_to_outputs = from_points(products, rows_left) + from_points(rows_left.movedim(0, -2), outputs.movedim(1, 0))

    for frame, written, added in zip(x, out, [None] * len(x) if plus is None else plus, strict=True):
        band[:2] = 0
        for top in range(0, height, 4 * rows):
            # The band starts at row top - 1 of the frame; its first two rows are there, but for the frame's own first.
            first, end = top + 1 if top else 0, min(top + 4 * rows + 1, height)
            norm_silu(norm, frame[first:end], out=band[first - top + 1 : end - top + 1, 1 : width + 1])
            band[end - top + 1 :] = 0
            run(rows_to_points)
            band[:2] = band[-2:]
            run(columns_to_points)
            torch.bmm(inputs.view(36, -1, channels), weights, out=products.view(36, rows * columns, -1))
            # What is added at the point (1, 1) alone is added to all outputs: the second columns of A^T are ones.
            products[1, 1] += conv.bias
            run(points_to_outputs)
            here = slice(top, min(top + 4 * rows, height))
            result = outputs.view(4 * rows, 4 * columns, -1)[: here.stop - top, :width]
            if added is None:
                written[here] = result
            else:
                torch.add(result, added[here], out=written[here])


def is_plain_on_cpu(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether `module(x)` is float32 on a CPU, and neither autograd nor a compiler follows what happens in it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    tensors = (x, *module.parameters())
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors) and not (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )


class FrameConv(WanCausalConv3d):
    """`WanCausalConv3d` for a single frame [B, C, 1, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, padding="same").unsqueeze(2)


class FrameResidualBlock(WanResidualBlock):
    """`WanResidualBlock` for a single frame [B, C, 1, H, W]."""

    # transformers' `gradient_checkpointing_enable` sets it, and `_gradient_checkpointing_func` beside it. diffusers'
    # own encoder has such a flag and never reads it.
    gradient_checkpointing = False

    def forward(self, x: torch.Tensor, feat_cache: None = None, feat_idx: list[int] | None = None) -> torch.Tensor:
        if not self.pays_in_bands(x):
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(super().forward, x)
            return super().forward(x)
        frames, shortcut = (each.squeeze(2).permute(0, 2, 3, 1) for each in (x, self.conv_shortcut(x)))
        h = frames.new_empty(*frames.shape[:3], self.out_dim)
        norm_silu_conv(self.norm1, self.conv1, frames, out=h)
        norm_silu_conv(self.norm2, self.conv2, h, out=h, plus=shortcut)
        return h.permute(0, 3, 1, 2).unsqueeze(2)

    def pays_in_bands(self, x: torch.Tensor) -> bool:
        return (
            is_plain_on_cpu(self, x)
            # An adapter or a quantised layer in a convolution's place has more to say than its weights.
            and type(self.conv1) is type(self.conv2) is FrameConv
            and not (self.training and self.dropout.p)
            and min(self.in_dim, self.out_dim) >= MIN_CHANNELS
            and x.shape[-2] * x.shape[-1] >= 16 * MIN_TILES
        )


class FrameDownsample(WanResample):
    """A `WanResample` to half the height and width, for a single frame [B, C, 1, H, W]."""

    def forward(self, x: torch.Tensor, feat_cache: None = None, feat_idx: list[int] | None = None) -> torch.Tensor:
        frames = x.squeeze(2)
        if not is_plain_on_cpu(self, x):
            return self.resample(frames).unsqueeze(2)
        # In bands, so that no second frame with padding around it is made; a band reads one row of the next.
        pad, conv = self.resample
        bands = [frames[:, :, top : top + ROWS_A_BAND + 1] for top in range(0, frames.shape[2], ROWS_A_BAND)]
        *upper, last = bands
        halves = [conv(F.pad(band, (0, 1))) for band in upper] + [conv(pad(last))]
        return torch.cat(halves, dim=2).unsqueeze(2)


def use_frame_modules(module: nn.Module) -> nn.Module:
    """
    Makes a Wan VAE, or a part of one, read single frames; returns it.

    Modules keep the parameters and names that diffusers gave them; only how they meet a single frame changes. Those
    with a stride over time are for video: one frame never reaches them.
    """
    for child in module.modules():
        if isinstance(child, WanCausalConv3d) and child.stride == (1, 1, 1):
            child.__class__ = FrameConv
        elif isinstance(child, WanResidualBlock):
            child.__class__ = FrameResidualBlock
        elif isinstance(child, WanResample) and child.mode.startswith("downsample"):
            child.__class__ = FrameDownsample
    return module
