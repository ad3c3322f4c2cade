# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Compares the encoder at real size (random weights, float32) with diffusers' `AutoencoderKLWan.encode`."""

from collections.abc import Iterator
from statistics import median

import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from theworld import TheWorldEncoderConfig
from theworld.encoder_theworld import TheWorldEncoder
from theworld.padding_theworld import pad_together, unpad

from .measure import MEMORY, Row, in_turns, run_fresh, timed


# Shape of pixels [B, 3, H, W], or [B, T, 3, H, W] for videos; threads; turns; target speed-up. One thread varies less:
# two wait for each other after every operation, and that time varies.
CASES = [
    ((1, 3, 256, 256), 2, 11, 5),
    ((1, 3, 256, 256), 1, 5, 5),
    ((1, 3, 448, 448), 1, 5, 5),
    ((1, 3, 512, 512), 1, 5, 4.5),
    ((4, 3, 256, 256), 2, 5, 5),
    ((1, 5, 3, 128, 128), 1, 5, 2.5),
    ((1, 17, 3, 128, 128), 1, 5, 2.5),
]
# Height and width of the images of a padded batch.
SHAPES = [(160, 400), (440, 152), (256, 256)] * 2
MATRIX_SIDE = 2048

EXTRA_MEMORY = (
    MEMORY
    + """
import torch
from diffusers import AutoencoderKLWan
from theworld import TheWorldEncoderConfig
from theworld.encoder_theworld import TheWorldEncoder
vae = AutoencoderKLWan().eval().requires_grad_(False)
encoder = TheWorldEncoder(TheWorldEncoderConfig()).eval().requires_grad_(False)
images = torch.rand({batch}, 3, {side}, {side})
before = memory("VmRSS")
{call}
print((memory("VmHWM") - before) / 1e6)
"""
)


def matrix_rate() -> float:
    """Operations per second in a large float32 matrix product: the limit of this machine."""
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE)
    return 2 * MATRIX_SIDE**3 / median(timed(lambda: a @ b) for _ in range(10))


@torch.no_grad()
def measure_speed() -> Iterator[Row]:
    torch.manual_seed(0)
    vae = AutoencoderKLWan().eval()
    encoder = TheWorldEncoder(TheWorldEncoderConfig()).eval()
    encoder.load_state_dict({key: vae.state_dict()[key] for key in encoder.state_dict()})

    def encode_by_diffusers(pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dim() == 4:
            return vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)
        return vae.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)

    available = torch.get_num_threads()
    for (*counts, _, _, side), threads, repeats, goal in CASES:
        torch.set_num_threads(threads)
        pixels = torch.rand(*counts, 3, side, side) * 2 - 1
        with FlopCounterMode(display=False) as counter:
            latents = encoder(pixels)
        difference = (latents - encode_by_diffusers(pixels)).abs().max().item()
        ours, theirs = in_turns(lambda: encoder(pixels), lambda: encode_by_diffusers(pixels), repeats)  # noqa: B023
        limit, rate = matrix_rate(), counter.get_total_flops() / median(ours)
        what = f"{counts[0]} x" if len(counts) == 1 else f"{counts[1]} frames of"
        yield Row(
            f"encode {what} {side} px, {threads} thread{'s' * (threads > 1)}",
            "diffusers `encode`",
            ours,
            theirs,
            goal=goal,
            faster=True,
            note=f"largest difference {difference:.1e}; {rate / 1e9:.0f} GFLOP/s, {rate / limit:.0%} of the machine's "
            "in a matrix product",
        )
    torch.set_num_threads(available)


SHAPES_MEMORY = (
    MEMORY
    + """
import torch
from benchmarks.encoder import SHAPES
from theworld import TheWorldEncoderConfig
from theworld.encoder_theworld import TheWorldEncoder
from theworld.padding_theworld import pad_together, unpad
encoder = TheWorldEncoder(TheWorldEncoderConfig()).eval().requires_grad_(False)
images = [torch.rand(3, *shape) for shape in SHAPES]
padded, sizes = pad_together(images)
before = memory("VmRSS")
{call}
print((memory("VmHWM") - before) / 1e6)
"""
)


@torch.no_grad()
def measure_shapes() -> Iterator[Row]:
    """A padded batch of several shapes, against its images one after another without padding."""
    what, peer = "padded batch of 3 shapes", "its images one by one"
    encoder = TheWorldEncoder(TheWorldEncoderConfig()).eval()
    images = [torch.rand(3, *shape) for shape in SHAPES]
    padded, sizes = pad_together(images)
    times = in_turns(
        lambda: encoder(unpad(padded, sizes, "sizes", (1, 1))), lambda: [encoder(image[None]) for image in images]
    )
    yield Row(
        f"time of encoding a {what}",
        peer,
        *times,
        goal=1.05,
        note=f"{padded[:, 0].numel() / sizes.prod(1).sum():.1f}x pixels",
    )
    calls = ('encoder(unpad(padded, sizes, "sizes", (1, 1)))', "[encoder(image[None]) for image in images]")
    ours, theirs = (float(run_fresh(SHAPES_MEMORY.format(call=call))) for call in calls)
    yield Row(f"peak memory of encoding a {what}", peer, [ours], [theirs], "MB", goal=1.05, note="without the weights")


def measure_memory() -> Iterator[Row]:
    for batch, side in ((1, 256), (1, 512), (4, 256)):
        ours, theirs = (
            float(run_fresh(EXTRA_MEMORY.format(batch=batch, side=side, call=call)))
            for call in ("encoder(images)", "vae.encode(images.unsqueeze(2)).latent_dist.mode()")
        )
        what = f"peak memory of encoding {batch} x {side} px"
        yield Row(what, "diffusers `encode`", [ours], [theirs], "MB", goal=0.5, note="without the weights")
