"""Tests the encoder's modules against diffusers': the same numbers on each path, and no weights kept twice."""

import copy
import threading
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import nn

from theworld import TheWorldEncoderConfig, wan_blocks_theworld
from theworld.encoder_theworld import PIXELS_PER_PASS, TheWorldEncoder
from theworld.wan_blocks_theworld import use_frame_modules


# Winograd's constants go up to 8, and its rounding errors with them: 1e-6 was seen in a block, 3e-6 in the encoder.
TOLERANCE = 1e-5


def pair(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """diffusers' module, and the same module for single frames."""
    return block.eval(), use_frame_modules(copy.deepcopy(block)).eval()


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return pair(WanResidualBlock(64, 96))


@pytest.fixture
def frames():
    return torch.randn(1, 64, 1, 36, 36, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def winograd(monkeypatch) -> mock.Mock:
    """Counts the convolutions done by Winograd."""
    counted = mock.Mock(wraps=wan_blocks_theworld.norm_silu_conv)
    monkeypatch.setattr(wan_blocks_theworld, "norm_silu_conv", counted)
    return counted


@pytest.mark.parametrize("size", [(32, 32), (33, 35), (34, 130), (131, 38), (5, 517), (1030, 3), (64, 30)], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (64, 128), (96, 64)], ids=str)
@torch.no_grad()
def test_a_block_in_bands_gives_the_numbers_of_diffusers(size, widths, winograd):
    torch.manual_seed(0)
    theirs, ours = pair(WanResidualBlock(*widths))
    x = torch.randn(2, widths[0], 1, *size)
    before = x.clone()
    for layout in (x, x.to(memory_format=torch.channels_last_3d)):
        result = ours(layout)
        torch.testing.assert_close(result, theirs(x), atol=TOLERANCE, rtol=TOLERANCE)
    assert winograd.call_count == 4
    assert torch.equal(x, before)


@torch.no_grad()
def test_frames_of_zeros_have_no_length_to_divide_by(blocks):
    theirs, ours = blocks
    x = torch.zeros(1, 64, 1, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("size", [(6, 10), (64, 32), (130, 66), (128, 8)], ids=str)
@torch.no_grad()
def test_halving_in_bands_gives_the_numbers_of_diffusers(size):
    torch.manual_seed(0)
    theirs, ours = pair(WanResample(8, mode="downsample3d"))
    x = torch.randn(2, 8, 1, *size)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_halving_keeps_the_fast_memory_layout():
    """PyTorch reads it from all strides, even that of a batch of one."""
    _, ours = pair(WanResample(8, mode="downsample3d"))
    image = torch.randn(1, 8, 64, 32).to(memory_format=torch.channels_last)
    half = torch.empty(1, 8, 32, 16, memory_format=torch.channels_last)
    assert ours(image.unsqueeze(2)).squeeze(2).stride() == half.stride()


def use_grad(block, x):
    return block(x)


def use_autocast(block, x):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return block(x)


def use_bfloat16(block, x):
    with torch.no_grad():
        return block.bfloat16()(x.bfloat16())


def use_compiler(block, x):
    with torch.no_grad():
        return torch.compile(block, fullgraph=True, backend="eager")(x)


def use_few_pixels(block, x):
    with torch.no_grad():
        return block(x[..., :28, :28])


def use_adapter(block, x):
    class Adapter(nn.Module):
        """A wrapper like that of a fine-tuned or quantized layer."""

        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    block.conv1 = Adapter(block.conv1)
    with torch.no_grad():
        return block(x)


def use_offload(block, x):
    with torch.no_grad():
        return cpu_offload(block, torch.device("cpu"))(x)


WAYS = [use_grad, use_autocast, use_bfloat16, use_compiler, use_few_pixels, use_adapter, use_offload]


@pytest.mark.parametrize("use", WAYS, ids=lambda use: use.__name__.removeprefix("use_"))
def test_elsewhere_diffusers_own_code_runs(use, blocks, frames, winograd):
    theirs, ours = blocks
    result = use(ours, frames)
    tolerance = 1e-2 if result.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(result, use(theirs, frames), atol=tolerance, rtol=0)
    assert not winograd.called


def test_frozen_blocks_under_autograd_use_winograd(blocks, frames, winograd):
    theirs, ours = blocks
    ours.requires_grad_(False)
    torch.testing.assert_close(ours(frames), theirs(frames), atol=TOLERANCE, rtol=TOLERANCE)
    assert winograd.call_count == 2


def test_gradients_are_those_of_diffusers(blocks, frames):
    gradients = []
    for block in blocks:
        x = frames.clone().requires_grad_()
        block(x).square().mean().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in block.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


CHANGES = {
    "in place": lambda block: block.conv1.weight.data.mul_(2),
    "another tensor": lambda block: setattr(block.conv2.weight, "data", block.conv2.weight.data.flip(0)),
    "loaded": lambda block: block.load_state_dict({name: value + 0.1 for name, value in block.state_dict().items()}),
    "norm": lambda block: block.norm2.gamma.data.fill_(0.3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changed_weights_take_effect_at_once(change, blocks, frames, winograd):
    theirs, ours = blocks
    ours(frames)
    for block in blocks:
        change(block)
    torch.testing.assert_close(ours(frames), theirs(frames), atol=1e-4, rtol=1e-5)
    assert winograd.call_count == 4


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TheWorldEncoder(TheWorldEncoderConfig(base_dim=64, num_res_blocks=1)).eval()


def images(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(side)) * 2 - 1


@torch.no_grad()
def test_threads_share_an_encoder_in_bands(encoder, winograd):
    pictures = images(4, 64)
    expected = [encoder(picture[None]) for picture in pictures]
    results = [None] * 4

    def encode(index: int):
        with torch.no_grad():
            results[index] = encoder(pictures[index][None])

    threads = [threading.Thread(target=encode, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winograd.called
    for result, alone in zip(results, expected, strict=True):
        torch.testing.assert_close(result, alone, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_batch_is_encoded_in_passes_of_limited_size(encoder, monkeypatch):
    monkeypatch.setitem(PIXELS_PER_PASS, "cpu", 3 * 32 * 32)
    pictures = images(7, 32)
    with mock.patch.object(encoder.encoder, "forward", wraps=encoder.encoder.forward) as forward:
        latents = encoder(pictures)
    assert [call.args[0].shape[0] for call in forward.call_args_list] == [3, 3, 1]
    alone = torch.cat([encoder(picture[None]) for picture in pictures])
    torch.testing.assert_close(latents, alone, atol=TOLERANCE, rtol=0)
