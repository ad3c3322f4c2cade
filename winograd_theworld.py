# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Causal 3x3x3 convolution with Winograd's F(4x4, 3x3), for float32 on a CPU without autograd.

Rows of 4 outputs depend on 6 inputs x and 3 weights w as the product of two polynomials does. With both polynomials
evaluated at 6 points, the product takes 6 multiplications instead of 12, and a tile of 4x4 outputs takes 36 instead of
144 (A. Lavin and S. Gray, 2016, arXiv:1509.09308). All tiles together give 36 matrix products:

    V = B^T x B [36, tiles, C]      U = G w G^T [36, C, C']      output = A^T (V U) A [tiles, 4, 4, C']

Frames [T, H, W, C] are processed in bands of tiles that fit the processor's cache. Each band is transformed once, for
all three time slices of the kernel. Nothing is kept between calls but the modules' own weights, so nothing can go
stale, and threads can share the modules.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch.nn import functional as F


# Measured on 2 cores with benchmarks/encoder.py. With one thread, a quarter of this is as fast. With two threads,
# synchronization dominates small operations; larger bands help until they exceed the cache.
TILES_PER_BAND = 512
# Below either of these, the transforms cost more than they save.
MIN_TILES, MIN_CHANNELS = 64, 64

# G: evaluates a row of 3 weights, as a polynomial, at the points 0, 1, -1, 2, -2 and infinity.
G = (
    (1 / 4, 0, 0),
    (-1 / 6,) * 3,
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)

# One step of a transform: `torch.add(first, second, alpha=factor, out=out)` as (first, factor, second, out).
Step = tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]


def transform_weights(weight: torch.Tensor) -> torch.Tensor:
    """U = G w G^T [36, C, C'], by column and row, of 3x3 kernels [C', C, 3, 3]."""
    matrix = torch.tensor(G, dtype=torch.float64)
    matrix = torch.einsum("rh,cw->crhw", matrix, matrix).reshape(36, 9).to(weight.dtype)
    return (matrix @ weight.flatten(2).transpose(1, 2)).permute(1, 2, 0)


def to_points(x: torch.Tensor, points: torch.Tensor) -> list[Step]:
    """
    Steps that write B^T x of rows of inputs x [6, ..] to points [6, ..], where B^T is

        4  0 -5  0  1  0
        0 -4 -4  1  1  0
        0  4 -4 -1  1  0
        0 -2 -1  2  1  0
        0  2 -1 -2  1  0
        0  4  0 -5  0  1
    """
    differences, odd_even = torch.empty_like(points[:4]), torch.empty_like(points[:2])
    return [
        (x[2:], -1, x[:4], differences),
        (differences[2:], -4, differences[:2], points[::5]),
        (differences[2], 2, differences[1], points[3]),
        (differences[2], -2, differences[1], points[4]),
        (x[3:5], -4, x[1:3], odd_even),
        (odd_even[1], 1, odd_even[0], points[1]),
        (odd_even[1], -1, odd_even[0], points[2]),
    ]


def from_points(points: torch.Tensor, y: torch.Tensor) -> list[Step]:
    """
    Steps that write A^T points of points [6, ..] to rows of outputs y [4, ..], where A^T is

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
    """A 3x3x3 kernel, one time slice after another: three products per frame, or one without past frames."""

    frames_per_step = 1

    def __init__(self, weight: torch.Tensor, num_past: int):
        self.weights = [transform_weights(weight[:, :, 2 - back]) for back in range(num_past + 1)]

    def multiply(self, inputs: torch.Tensor, products: torch.Tensor) -> None:
        """Writes the products [1, 36, T, tiles, C'] of inputs [36, num_past + T, tiles, C]."""
        time, tiles = products.shape[2:4]
        inputs, products = inputs.flatten(1, 2), products[0].flatten(1, 2)
        last = inputs.shape[1] - time * tiles
        torch.bmm(inputs[:, last:], self.weights[0], out=products)
        for back, weights in enumerate(self.weights[1:], start=1):
            first = last - back * tiles
            products.baddbmm_(inputs[:, first : first + time * tiles], weights)


class WinogradTemporalKernel:
    """
    Winograd's F(2, 3) over time: two frames are computed from four with four products instead of six.

    The points are 0, 1, -1 and infinity.
    """

    frames_per_step = 2

    def __init__(self, weight: torch.Tensor):
        first, second, third = weight.unbind(2)
        kernels = (first, (first + second + third) / 2, (first - second + third) / 2, third)
        self.weights = [transform_weights(kernel) for kernel in kernels]

    def multiply(self, inputs: torch.Tensor, products: torch.Tensor) -> None:
        """Writes the products [2, 36, T / 2, tiles, C'], even frames then odd, of inputs [36, 2 + T, tiles, C]."""
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


class Band:
    """
    The buffers for a band of rows of tiles, reused for all bands of a call, and the transforms between them.

    Args:
        conv: The convolution.
        x: Its inputs [B, T, H, W, C].
        num_past: How many frames it reads before x: 0 or 2.

    Attributes:
        inputs: [num_past + T, height + 2, width + 2, C]: the band with a border of one pixel, to be filled in.
        height: Output rows of a band.
    """

    def __init__(self, conv: WanCausalConv3d, x: torch.Tensor, num_past: int):
        time, height, width, channels = x.shape[1:]
        self.bias, out_channels = conv.bias, conv.weight.shape[0]
        self.kernel = DirectTemporalKernel(conv.weight, num_past) if time % 2 else WinogradTemporalKernel(conv.weight)
        per_step = self.kernel.frames_per_step
        steps, frames = time // per_step, num_past + time
        rows, columns = -(-height // 4), -(-width // 4)  # of tiles
        rows = min(rows, -(-TILES_PER_BAND // (columns * time)))
        self.height = 4 * rows

        self.inputs = x.new_zeros(frames, 4 * rows + 2, 4 * columns + 2, channels)
        by_row = x.new_empty(6, frames, rows, 4 * columns + 2, channels)
        points = x.new_empty(6, 6, frames, rows, columns, channels)  # by column and row
        self.products = x.new_empty(per_step, 6, 6, steps, rows, columns, out_channels)
        by_column = x.new_empty(4, 6, per_step, steps, rows, columns, out_channels)
        outputs = x.new_empty(per_step, steps, rows, 4, columns, 4, out_channels)
        self.rows_to_points = to_points(self.inputs.unfold(1, 6, 4).movedim(-1, 0), by_row)
        self.columns_to_points = to_points(by_row.unfold(3, 6, 4).movedim(-1, 0), points)
        self.points_to_outputs = from_points(self.products.movedim(0, 2), by_column)
        self.points_to_outputs += from_points(by_column.movedim(0, -2), outputs.movedim(3, 0))
        self.points = points.view(36, frames, rows * columns, channels)
        self.products_by_tile = self.products.view(per_step, 36, steps, rows * columns, out_channels)
        self.outputs = outputs.view(per_step, steps, 4 * rows, 4 * columns, out_channels)

    def convolve(self) -> torch.Tensor:
        """
        The convolution of `inputs`, whose first two rows become those of the next band.

        Returns:
            [frames per step, steps, height, width, C'], to be read before the next call.
        """
        run(self.rows_to_points)
        self.inputs[:, :2] = self.inputs[:, -2:]
        run(self.columns_to_points)
        self.kernel.multiply(self.points, self.products_by_tile)
        if self.bias is not None:
            # Added at the point (1, 1), it reaches all outputs: the second column of A^T is all ones.
            self.products[:, 1, 1] += self.bias
        run(self.points_to_outputs)
        return self.outputs


def norm_silu_conv(
    norm: WanRMS_norm,
    conv: WanCausalConv3d,
    x: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> None:
    """
    Writes `conv(silu(norm(x))) + residual` of frames x [B, T, H, W, C] to `out` [B, T, H, W, C'].

    Args:
        norm, conv: A normalization and a 3x3x3 convolution.
        x: Frames.
        out: Where the result goes. It may be x: each band is read before it is written, and its last two rows are
            kept for the next band.
        residual: [B, T, H, W, C'].
        past: The frames before x, [B, 1 or 2, H, W, C], after norm and silu; zeros if None.
        kept: [B, 1 or 2, H, W, C]; receives the last frames of past and x, for the next call's `past`.
    """
    batch, time, height, width, _channels = x.shape
    num_past = 0 if past is None and time == 1 else 2
    band = Band(conv, x, num_past)
    per_step = band.kernel.frames_per_step
    out_steps = out.unflatten(1, (-1, per_step)).transpose(1, 2)
    residual_steps = None if residual is None else residual.unflatten(1, (-1, per_step)).transpose(1, 2)
    for video in range(batch):
        band.inputs[:, :2] = 0
        for top in range(0, height, band.height):
            # The band's inputs start at row top - 1. Their first two rows are already there, but for the first band.
            first, end = top + 1 if top else 0, min(top + band.height + 1, height)
            read = band.inputs[:, first - top + 1 : end - top + 1, 1 : width + 1]
            if past is not None:
                read[num_past - past.shape[1] : num_past] = past[video, :, first:end]
            norm_silu(norm, x[video, :, first:end], out=read[num_past:])
            if kept is not None:
                kept[video, :, first:end] = read[-kept.shape[1] :]
            band.inputs[:, end - top + 1 :] = 0
            out_rows = slice(top, min(top + band.height, height))
            result = band.convolve()[:, :, : out_rows.stop - top, :width]
            target = out_steps[video, :, :, out_rows]
            if residual_steps is None:
                target.copy_(result)
            else:
                torch.add(result, residual_steps[video, :, :, out_rows], out=target)
