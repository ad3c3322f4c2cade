"""Tests the world encoder against diffusers: the same latents, no state between calls, nothing unused is built."""

import threading
from statistics import median
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import in_turns
from theworld import TheWorldEncoderConfig
from theworld.encoder_theworld import TheWorldEncoder


# Largest difference to diffusers' mode in float32; it was 3e-6 in bands, 6e-7 elsewhere.
FLOAT32_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    """A VAE of real size: base_dim 96, 126,892,531 parameters."""
    torch.manual_seed(0)
    return AutoencoderKLWan().eval()


@pytest.fixture(scope="module")
def encoder(vae) -> TheWorldEncoder:
    encoder = TheWorldEncoder(TheWorldEncoderConfig()).eval()
    state = vae.state_dict()
    encoder.load_state_dict({key: state[key] for key in encoder.state_dict()})
    return encoder


def random_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def diffusers_mode(vae: AutoencoderKLWan, images: torch.Tensor) -> torch.Tensor:
    return vae.encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2)


def test_real_size_parameter_counts(vae, encoder):
    assert sum(parameter.numel() for parameter in vae.parameters()) == 126_892_531
    assert sum(parameter.numel() for parameter in encoder.encoder.parameters()) == 53_595_872


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (2, 40, 88), (1, 8, 8), (1, 128, 128)])
@torch.no_grad()
def test_latents_are_the_mode_of_diffusers(vae, encoder, batch, height, width):
    images = random_images(batch, height, width)
    latents = encoder(images)
    assert latents.shape == (batch, 16, height // 8, width // 8)
    assert (latents - diffusers_mode(vae, images)).abs().max() < FLOAT32_TOLERANCE


@torch.no_grad()
def test_a_batch_has_the_latents_of_single_images(encoder):
    images = random_images(3, 32, 32)
    alone = torch.cat([encoder(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(encoder(images), alone, atol=FLOAT32_TOLERANCE, rtol=0)


@torch.no_grad()
def test_one_frame_costs_nine_times_fewer_operations(vae, encoder):
    images = random_images(1, 256, 256)
    counts = []
    for encode in (lambda: diffusers_mode(vae, images), lambda: encoder(images)):
        with FlopCounterMode(display=False) as counter:
            encode()
        counts.append(counter.get_total_flops())
    assert counts[0] / counts[1] > 9


@torch.no_grad()
def test_encoding_is_2_5_times_as_fast_as_diffusers(vae, encoder):
    """A loose floor: machines of one kind differ, and may be busy. benchmarks/ measures the ratio."""
    images = random_images(1, 256, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encoder(images)
        ours, theirs = in_turns(lambda: encoder(images), lambda: diffusers_mode(vae, images), repeats=3)
    finally:
        torch.set_num_threads(threads)
    assert median(theirs) / median(ours) > 2.5


@torch.no_grad()
def test_two_threads_get_equal_latents(encoder):
    images = [random_images(1, 32, 32, seed) for seed in range(2)]
    expected = [encoder(image) for image in images]
    results = [[], []]

    def encode_repeatedly(index: int):
        with torch.no_grad():
            for _ in range(10):
                results[index].append(encoder(images[index]))

    threads = [threading.Thread(target=encode_repeatedly, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 10
        for latents in results[index]:
            torch.testing.assert_close(latents, expected[index], atol=FLOAT32_TOLERANCE, rtol=0)


def test_the_mode_is_deterministic_and_never_sampled(encoder):
    images = random_images(1, 16, 16)
    with torch.no_grad(), mock.patch("torch.randn", side_effect=AssertionError("sampled")):
        assert torch.equal(encoder(images), encoder(images))


def test_gradients_reach_the_first_layer_through_the_mode():
    encoder = TheWorldEncoder(TheWorldEncoderConfig(base_dim=8))
    images = random_images(1, 16, 16).requires_grad_()
    encoder(images).square().mean().backward()
    assert images.grad.abs().sum() > 0
    without_gradient = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert without_gradient == {name for name in encoder.state_dict() if "time_conv" in name}


def test_only_the_encoder_half_is_built(encoder):
    assert {name.split(".")[0] for name in encoder.state_dict()} == {"encoder", "quant_conv"}
    assert not list(encoder.buffers())


BAD_PIXELS = {
    "integers": (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "must be floating point.*got torch.uint8"),
    "0 to 255": (torch.full((1, 3, 16, 16), 200.0), ValueError, r"must be in \[-1, 1\] \(from 0..255: `image"),
    "NaN": (torch.full((1, 3, 16, 16), torch.nan), ValueError, "some are outside or NaN"),
    "no batch axis": (torch.zeros(3, 16, 16), ValueError, r"must be \[B, 3, H, W\].*got \[3, 16, 16\]"),
    "channels last": (torch.zeros(1, 16, 16, 3), ValueError, r"got \[1, 16, 16, 3\]"),
    "a side of 227": (torch.zeros(1, 3, 227, 224), ValueError, "H and W multiples of 8, got"),
    "an empty batch": (torch.zeros(0, 3, 16, 16), ValueError, "with at least one image"),
    "a video": (torch.zeros(1, 3, 5, 16, 16), ValueError, r"got \[1, 3, 5, 16, 16\]"),
}


@pytest.mark.parametrize(("pixel_values", "error", "message"), BAD_PIXELS.values(), ids=BAD_PIXELS)
def test_bad_pixels_are_rejected(encoder, pixel_values, error, message):
    with pytest.raises(error, match=message):
        encoder(pixel_values)
