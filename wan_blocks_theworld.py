# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
The modules of a Wan VAE on images, and on videos a few frames at a time: the numbers of diffusers, sooner.

Everywhere: a causal convolution sees the past, two frames of it, and before a first frame there are only zeros. So for
an image the last time slice of a kernel does all the work, and a 3x3x3 convolution is a 3x3 one. A video's frames go
through in chunks; what a chunk leaves for the next is diffusers' `feat_cache`, a list that the caller holds.

Besides, on a CPU, in float32, where nothing is to be differentiated or compiled: residual blocks convolve by
Winograd's F(4x4, 3x3). Rows of 4 outputs depend on 6 inputs x and 3 weights w as the product of two polynomials does.
With both known by their values at 6 points, the product is 6 numbers in place of 12, and of a tile of 4x4 outputs 36
in place of 144 (A. Lavin and S. Gray, 2016, arXiv:1509.09308). Tiles are many, so they are 36 matrix products:

    V = B^T x B [36, tiles, C]      U = G w G^T [36, C, C']      output = A^T (V U) A [tiles, 4, 4, C']

A chunk's frames [T, H, W, C] go through in bands of tiles that fit the processor's cache. Each is taken to the points
once, for all three time slices of the kernel. Nothing but the weights outlives a call, so nothing can go stale, and
threads may share the modules.
"""

from collections.abc import Sequence

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
TILES_PER_BAND = 512
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


class DirectTemporalKernel:
    """The time slices of a 3x3x3 kernel, each by itself: three products a frame, or one where there is no past."""

    together = 1  # frames that are made together

    def __init__(self, weight: torch.Tensor, past: int):
        self.weights = [weights_at_points(weight[:, :, 2 - back]) for back in range(past + 1)]

    def multiply(self, inputs: torch.Tensor, products: torch.Tensor) -> None:
        """Makes products [1, 36, T, tiles, C'] of inputs [36, past + T, tiles, C]."""
        time, tiles = products.shape[2:4]
        inputs, products = inputs.flatten(1, 2), products[0].flatten(1, 2)
        last = inputs.shape[1] - time * tiles
        torch.bmm(inputs[:, last:], self.weights[0], out=products)
        for back, weights in enumerate(self.weights[1:], start=1):
            first = last - back * tiles
            products.baddbmm_(inputs[:, first : first + time * tiles], weights)


class WinogradTemporalKernel:
    """
    Winograd's F(2, 3) over time: two frames made from four together, by four products in place of six.

    The points are 0, 1, -1 and infinity.
    """

    together = 2

    def __init__(self, weight: torch.Tensor):
        first, second, third = weight.unbind(2)
        kernels = (first, (first + second + third) / 2, (first - second + third) / 2, third)
        self.weights = [weights_at_points(kernel) for kernel in kernels]

    def multiply(self, inputs: torch.Tensor, products: torch.Tensor) -> None:
        """Makes products [2, 36, T / 2, tiles, C'], even frames and odd, of inputs [36, 2 + T, tiles, C]."""
        even, odd = inputs[:, ::2], inputs[:, 1::2]
        first, second, third, fourth = even[:, :-1], odd[:, :-1], even[:, 1:], odd[:, 1:]
        evens, odds = products.flatten(2, 3)
        point, product = torch.empty_like(first), torch.empty_like(evens)
        point_rows = point.flatten(1, 2)

        torch.add(second, third, out=point)
        torch.bmm(point_rows, self.weights[1], out=odds)
        torch.sub(third, second, out=point)
        torch.bmm(point_rows, self.weights[2], out=product)
        torch.add(odds, product, out=evens)
        odds -= product
        torch.sub(first, third, out=point)
        evens.baddbmm_(point_rows, self.weights[0])
        torch.sub(fourth, second, out=point)
        odds.baddbmm_(point_rows, self.weights[3])


def norm_silu_conv(
    norm: WanRMS_norm,
    conv: WanCausalConv3d,
    x: torch.Tensor,
    out: torch.Tensor,
    plus: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> None:
    """
    Writes `conv(silu(norm(x))) + plus` of frames x [B, T, H, W, C] to `out` [B, T, H, W, C'], by Winograd.

    `past` [B, 1 or 2, H, W, C] are the frames before, after norm and silu; without it there were none. `kept`
    [B, 1 or 2, H, W, C] gets the last frames of these and of x, as the next call's `past`.

    `out` may be x: a band is read before it is written, and its last two rows are kept for the next.
    """
    batch, time, height, width, channels = x.shape
    before = 0 if past is None and time == 1 else 2  # frames that are read besides; of zeros, where there were none
    kernel = DirectTemporalKernel(conv.weight, before) if time % 2 else WinogradTemporalKernel(conv.weight)
    steps, together = time // kernel.together, kernel.together
    rows, columns = -(-height // 4), -(-width // 4)  # of tiles
    rows = min(rows, -(-TILES_PER_BAND // (columns * time)))  # in a band

    bands = x.new_zeros(before + time, 4 * rows + 2, 4 * columns + 2, channels)  # zeros around the frames
    by_row = x.new_empty(6, before + time, rows, 4 * columns + 2, channels)
    inputs = x.new_empty(6, 6, before + time, rows, columns, channels)  # at points of a column and of a row
    products = x.new_empty(together, 6, 6, steps, rows, columns, out.shape[-1])
    rows_left = x.new_empty(4, 6, together, steps, rows, columns, out.shape[-1])
    outputs = x.new_empty(together, steps, rows, 4, columns, 4, out.shape[-1])
    rows_to_points = to_points(bands.unfold(1, 6, 4).movedim(-1, 0), by_row)
    columns_to_points = to_points(by_row.unfold(3, 6, 4).movedim(-1, 0), inputs)
    points_to_rows = from_points(products.movedim(0, 2), rows_left)
    points_to_outputs = points_to_rows + from_points(rows_left.movedim(0, -2), outputs.movedim(3, 0))
    inputs = inputs.view(36, before + time, rows * columns, channels)
    products_by_tile = products.view(together, 36, steps, rows * columns, -1)
    out, plus = (
        None if frames is None else frames.unflatten(1, (steps, together)).transpose(1, 2) for frames in (out, plus)
    )

    for video in range(batch):
        bands[:, :2] = 0
        for top in range(0, height, 4 * rows):
            # The band starts at row top - 1 of the frame; its first two rows are there, but for the frame's own first.
            first, end = top + 1 if top else 0, min(top + 4 * rows + 1, height)
            read = bands[:, first - top + 1 : end - top + 1, 1 : width + 1]
            if past is not None:
                read[before - past.shape[1] : before] = past[video, :, first:end]
            norm_silu(norm, x[video, :, first:end], out=read[before:])
            if kept is not None:
                kept[video, :, first:end] = read[-kept.shape[1] :]
            bands[:, end - top + 1 :] = 0
            run(rows_to_points)
            bands[:, :2] = bands[:, -2:]
            run(columns_to_points)
            kernel.multiply(inputs, products_by_tile)
            # What is added at the point (1, 1) alone is added to all outputs: the second columns of A^T are ones.
            products[:, 1, 1] += conv.bias
            run(points_to_outputs)
            here = slice(top, min(top + 4 * rows, height))
            result = outputs.view(together, steps, 4 * rows, 4 * columns, -1)[:, :, : here.stop - top, :width]
            if plus is None:
                out[video, :, :, here] = result
            else:
                torch.add(result, plus[video, :, :, here], out=out[video, :, :, here])


def is_plain_on_cpu(module: nn.Module, *inputs: torch.Tensor) -> bool:
    """Whether `module(*inputs)` is float32 on a CPU, and neither autograd nor a compiler follows what it does."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    tensors = (*inputs, *module.parameters())
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors) and not (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )


class FrameConv(WanCausalConv3d):
    """`WanCausalConv3d`, frame by frame and slice by slice of its kernel: PyTorch is slow in three dimensions."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if cache_x is None and x.shape[2] == 1:
            return self.at_last_of([x.squeeze(2)]).unsqueeze(2)
        if not is_plain_on_cpu(self, x):
            return super().forward(x, cache_x)
        frames = (*cache_x.unbind(2), *x.unbind(2)) if cache_x is not None else x.unbind(2)
        ends = range(len(frames) - x.shape[2] + 1, len(frames) + 1)
        return torch.cat([self.at_last_of(frames[:end]).unsqueeze(2) for end in ends], dim=2)

    def at_last_of(self, frames: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result [B, C', H, W] at the last of the frames [B, C, H, W], before which there were zeros."""
        (last, slice_of_last), *earlier = zip(reversed(frames), reversed(self.weight.unbind(2)), strict=False)
        result = F.conv2d(last, slice_of_last, self.bias, padding="same")
        for frame, its_slice in earlier:
            result += F.conv2d(frame, its_slice, padding="same")
        return result


class FrameResidualBlock(WanResidualBlock):
    """`WanResidualBlock` for an image [B, C, 1, H, W], or, with `feat_cache`, the next frames [B, C, T, H, W]."""

    # transformers' `gradient_checkpointing_enable` sets it, and `_gradient_checkpointing_func` beside it. diffusers'
    # own encoder has such a flag and never reads it.
    gradient_checkpointing = False

    def forward(
        self, x: torch.Tensor, feat_cache: list[torch.Tensor | None] | None = None, feat_idx: list[int] | None = None
    ) -> torch.Tensor:
        mine = slice(feat_idx[0], feat_idx[0] + 2) if feat_cache is not None else slice(0)  # conv1's and conv2's
        past = feat_cache[mine] if feat_cache is not None else []
        if self.pays_in_bands(x, *past):
            x, *kept = self.forward_in_bands(x, *past)
        elif self.gradient_checkpointing and self.training:
            x, *kept = self._gradient_checkpointing_func(self.forward_plainly, x, *past)
        else:
            x, *kept = self.forward_plainly(x, *past)
        if feat_cache is not None:
            feat_cache[mine] = kept
            feat_idx[0] += 2
        return x

    def forward_plainly(self, x: torch.Tensor, *past: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """diffusers' own lines, as a function that may run twice: the result, and if there is a past the next one."""
        kept = list(past)
        return super().forward(x, kept or None, [0]), *kept

    def forward_in_bands(self, x: torch.Tensor, *past: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """As `forward_plainly`, by Winograd."""
        frames, shortcut = (each.permute(0, 2, 3, 4, 1) for each in (x, self.conv_shortcut(x)))
        h = frames.new_empty(*frames.shape[:4], self.out_dim)
        past = [None if each is None else each.permute(0, 2, 3, 4, 1) for each in past]
        kept = [
            each.new_empty(each.shape[0], min(2, each.shape[1] + (0 if before is None else 2)), *each.shape[2:])
            for each, before in zip((frames, h), past, strict=False)
        ]
        (past_1, past_2), (kept_1, kept_2) = past or (None, None), kept or (None, None)
        norm_silu_conv(self.norm1, self.conv1, frames, out=h, past=past_1, kept=kept_1)
        norm_silu_conv(self.norm2, self.conv2, h, out=h, plus=shortcut, past=past_2, kept=kept_2)
        return tuple(each.permute(0, 4, 1, 2, 3) for each in (h, *kept))

    def pays_in_bands(self, x: torch.Tensor, *past: torch.Tensor | None) -> bool:
        return (
            is_plain_on_cpu(self, x, *(frames for frames in past if frames is not None))
            # An adapter or a quantised layer in a convolution's place has more to say than its weights.
            and type(self.conv1) is type(self.conv2) is FrameConv
            and not (self.training and self.dropout.p)
            and min(self.in_dim, self.out_dim) >= MIN_CHANNELS
            and x[0, 0].numel() >= 16 * MIN_TILES
        )


class FrameDownsample(WanResample):
    """
    A `WanResample` to half the height and width, of an image [B, C, 1, H, W].

    With `feat_cache`, of the next frames [B, C, T, H, W]; if its mode halves time too, all but a video's first frame
    become half as many.
    """

    def forward(
        self, x: torch.Tensor, feat_cache: list[torch.Tensor | None] | None = None, feat_idx: list[int] | None = None
    ) -> torch.Tensor:
        in_bands = is_plain_on_cpu(self, x)
        x = torch.cat([self.halve(frame, in_bands).unsqueeze(2) for frame in x.unbind(2)], dim=2)
        if feat_cache is None or self.mode != "downsample3d":
            return x
        index = feat_idx[0]
        feat_idx[0] += 1
        last_before, feat_cache[index] = feat_cache[index], x[:, :, -1:].clone()
        return x if last_before is None else self.time_conv(torch.cat([last_before, x], dim=2))

    def halve(self, frame: torch.Tensor, in_bands: bool) -> torch.Tensor:
        """A frame [B, C, H, W] to half the height and width."""
        if not in_bands:
            return self.resample(frame)
        # In bands, so that no second frame with padding around it is made; a band reads one row of the next.
        pad, conv = self.resample
        bands = [frame[:, :, top : top + ROWS_A_BAND + 1] for top in range(0, frame.shape[2], ROWS_A_BAND)]
        *upper, last = bands
        return torch.cat([conv(F.pad(band, (0, 1))) for band in upper] + [conv(pad(last))], dim=2)


def use_frame_modules(module: nn.Module) -> nn.Module:
    """
    Makes a Wan VAE, or a part of one, read images and chunks of videos; returns it.

    Modules keep the parameters and names that diffusers gave them; only how they meet a frame changes. The
    convolutions with a stride over time, which an image never reaches, stay as they are.
    """
    for child in module.modules():
        if isinstance(child, WanCausalConv3d) and child.stride == (1, 1, 1):
            child.__class__ = FrameConv
        elif isinstance(child, WanResidualBlock):
            child.__class__ = FrameResidualBlock
        elif isinstance(child, WanResample) and child.mode.startswith("downsample"):
            child.__class__ = FrameDownsample
    return module
