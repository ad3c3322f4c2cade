"""Tests the encoder on videos against diffusers: the same latents, chunk by chunk, with the caller's cache."""

import copy
import threading

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import nn

from benchmarks.measure import MEMORY, in_turns, run_fresh
from theworld import TheWorldEncoderConfig, wan_blocks_theworld
from theworld.encoder_theworld import PIXELS_PER_CHUNK, PIXELS_PER_PASS, TheWorldEncoder, VideoCache
from theworld.wan_blocks_theworld import use_frame_modules


# Largest difference to diffusers' mode in float32; it was 6e-6 in bands at 128 px, 1e-6 elsewhere.
TOLERANCE = 1e-5
# Of a block by itself, which sums three times as many products as for an image; it was 1.7e-5 of numbers up to 6.
BLOCK_TOLERANCE = 3e-5


def make_pair(**fields) -> tuple[AutoencoderKLWan, TheWorldEncoder]:
    """A VAE with random weights, norms included, and its encoder."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**fields).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    encoder = TheWorldEncoder(TheWorldEncoderConfig(**fields)).eval()
    encoder.load_state_dict({key: vae.state_dict()[key] for key in encoder.state_dict()})
    return vae, encoder


@pytest.fixture(scope="module")
def real_size():
    return make_pair()


@pytest.fixture(scope="module")
def small():
    """Wide enough for Winograd in all stages but the last."""
    return make_pair(base_dim=64, dim_mult=[1, 1, 2, 2], num_res_blocks=1)


def random_videos(batch: int, num_frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, num_frames, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def diffusers_mode(vae: AutoencoderKLWan, videos: torch.Tensor) -> torch.Tensor:
    return vae.encode(videos.transpose(1, 2)).latent_dist.mode().transpose(1, 2)


@pytest.mark.parametrize(
    "shape", [(1, 1, 64, 64), (2, 5, 72, 40), (1, 9, 40, 88), (1, 17, 24, 56), (3, 5, 8, 8)], ids=str
)
@torch.no_grad()
def test_latents_are_the_mode_of_diffusers(real_size, shape):
    vae, encoder = real_size
    batch, num_frames, height, width = shape
    videos = random_videos(*shape)
    expected = diffusers_mode(vae, videos)
    latents = encoder(videos)
    assert latents.shape == (batch, 1 + num_frames // 4, 16, height // 8, width // 8)
    assert (latents - expected).abs().max() < TOLERANCE
    with torch.enable_grad():  # without Winograd
        assert (encoder(videos) - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_winograd_in_all_stages_equals_diffusers(small, monkeypatch):
    vae, encoder = small
    shapes, norm_silu_conv = [], wan_blocks_theworld.norm_silu_conv

    def record(norm, conv, x, **kwargs):
        shapes.append(tuple(x.shape[1:4]))
        norm_silu_conv(norm, conv, x, **kwargs)

    monkeypatch.setattr(wan_blocks_theworld, "norm_silu_conv", record)
    videos = random_videos(2, 9, 136, 136)
    assert (encoder(videos) - diffusers_mode(vae, videos)).abs().max() < TOLERANCE
    assert {(1, 136, 136), (8, 136, 136), (1, 68, 68), (8, 68, 68), (1, 34, 34), (4, 34, 34)} == set(shapes)


@torch.no_grad()
def test_the_first_latent_equals_that_of_an_image(small):
    _, encoder = small
    videos = random_videos(1, 5, 40, 40)
    torch.testing.assert_close(encoder(videos)[:, 0], encoder(videos[:, 0]), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_cache_continues_the_video(small, monkeypatch):
    _, encoder = small
    monkeypatch.setitem(PIXELS_PER_PASS, "cpu", 4 * 64 * 64)  # two videos in turn, each with its own past
    monkeypatch.setitem(PIXELS_PER_CHUNK, "cpu", 4 * 64 * 64)
    videos = random_videos(2, 13, 64, 64)
    whole, cache = encoder(videos), VideoCache()
    sizes = []
    encoder.encoder.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[2]))
    first = encoder(videos[:, :5], cache=cache)
    at_five, seen = copy.copy(cache), len(sizes)
    rest = encoder(videos[:, 5:], cache=cache)
    assert sizes == [1, 4, 1, 4] + [4, 4, 4, 4] and seen == 4
    assert (cache.num_frames, at_five.num_frames) == (13, 5)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, atol=TOLERANCE, rtol=0)
    # What was copied has not moved on: another continuation starts there.
    assert torch.equal(encoder(videos[:, 5:], cache=at_five), rest)


@torch.no_grad()
def test_a_failed_call_leaves_the_cache_unchanged(small, monkeypatch):
    _, encoder = small
    videos, cache = random_videos(1, 9, 32, 32), VideoCache()
    encoder(videos[:, :5], cache=cache)
    before = copy.copy(cache)
    with monkeypatch.context() as context:
        context.setattr(encoder.encoder.conv_out, "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoder(videos[:, 5:], cache=cache)
    assert cache == before
    torch.testing.assert_close(encoder(videos[:, 5:], cache=cache), encoder(videos)[:, 2:], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_threads_share_an_encoder(small):
    _, encoder = small
    videos = random_videos(4, 9, 64, 64)
    expected = [encoder(video[None]) for video in videos]
    results = [None] * 4

    def encode(index: int):
        cache = VideoCache()
        with torch.no_grad():
            results[index] = torch.cat(
                [encoder(part, cache=cache) for part in videos[index, None].split([5, 4], 1)], 1
            )

    threads = [threading.Thread(target=encode, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, alone in zip(results, expected, strict=True):
        torch.testing.assert_close(result, alone, atol=TOLERANCE, rtol=0)


def test_gradients_are_those_of_diffusers_and_reach_every_parameter():
    vae, encoder = make_pair(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    videos = random_videos(1, 9, 16, 16)
    diffusers_mode(vae, videos).square().mean().backward()
    encoder(videos).square().mean().backward()
    theirs = dict(vae.named_parameters())
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in encoder.named_parameters() if "time_conv" in name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_are_the_same(use_reentrant):
    encoder = make_pair(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)[1].train()
    videos, gradients = random_videos(1, 9, 16, 16), []
    for checkpointed in (False, True):
        for module in encoder.modules():
            if isinstance(module, wan_blocks_theworld.FrameResidualBlock):
                module.gradient_checkpointing = checkpointed
                module._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                    function, *args, use_reentrant=use_reentrant
                )
        encoder.zero_grad()
        encoder(videos).square().mean().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for with_it, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("time", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("past", [0, 1, 2])
@torch.no_grad()
def test_a_block_in_bands_continues_from_any_past(time, past):
    torch.manual_seed(0)
    theirs = WanResidualBlock(64, 96).eval()
    ours = use_frame_modules(copy.deepcopy(theirs))
    x, caches = torch.randn(2, 64, past + time, 37, 45), ([None, None], [None, None])
    for chunk in x.split([past, time] if past else [time], dim=2):
        results = [block(chunk, cache, [0]) for block, cache in zip((theirs, ours), caches, strict=True)]
        torch.testing.assert_close(*results, atol=BLOCK_TOLERANCE, rtol=TOLERANCE)
        # The second norm makes numbers, and so their rounding errors, several times as large.
        for kept in zip(*caches, strict=True):
            torch.testing.assert_close(*kept, atol=10 * TOLERANCE, rtol=0)
    torch.testing.assert_close(ours(x), theirs(x), atol=BLOCK_TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_halving_in_bands_halves_time_too():
    torch.manual_seed(0)
    theirs = WanResample(8, mode="downsample3d").eval()
    ours, caches = use_frame_modules(copy.deepcopy(theirs)), ([None], [None])
    for chunk in torch.randn(2, 8, 5, 130, 66).split([1, 4], dim=2):
        results = [module(chunk, cache, [0]) for module, cache in zip((theirs, ours), caches, strict=True)]
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_encoder_compiles_without_graph_breaks():
    _, encoder = make_pair(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    videos = random_videos(1, 9, 16, 16)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(videos), encoder(videos), atol=TOLERANCE, rtol=0)


BAD = {
    "8 frames": (random_videos(1, 8, 16, 16), None, r"must have 1 \+ 4k frames, got 8"),
    "5 frames after 5": (random_videos(1, 5, 16, 16), 16, "must have 4k frames if the cache has .* got 5"),
    "another size": (
        random_videos(1, 4, 16, 24),
        16,
        r"cache belongs to videos .* \[1, 3, 16, 16\], got \[1, 3, 16, 24\]",
    ),
    "no frames": (torch.zeros(1, 0, 3, 16, 16), None, "for videos, with at least one image"),
    "channels first": (torch.zeros(1, 3, 5, 16, 16), None, r"got \[1, 3, 5, 16, 16\]"),
    "an image": (torch.zeros(1, 3, 16, 16), 16, "needs videos .* got images"),
}


@pytest.mark.parametrize(("pixels", "cached_side", "message"), BAD.values(), ids=BAD)
@torch.no_grad()
def test_bad_videos_and_continuations_are_rejected(small, pixels, cached_side, message):
    _, encoder = small
    cache = VideoCache() if cached_side else None
    if cached_side:
        encoder(random_videos(1, 5, cached_side, cached_side), cache=cache)
    with pytest.raises(ValueError, match=message):
        encoder(pixels, cache=cache)


PEAK = (
    MEMORY
    + """
import torch
from theworld import TheWorldEncoderConfig
from theworld.encoder_theworld import TheWorldEncoder
torch.set_num_threads(1)
encoder = TheWorldEncoder(TheWorldEncoderConfig(base_dim=64, num_res_blocks=1)).eval().requires_grad_(False)
for num_frames in (33, 65):  # two chunks after the first frame, and four
    encoder(torch.zeros(1, num_frames, 3, 128, 128))
    print(memory("VmHWM") / 1e6)
"""
)


def test_memory_does_not_grow_with_the_number_of_frames(monkeypatch):
    monkeypatch.setenv(
        "MALLOC_MMAP_THRESHOLD_", "65536"
    )  # so that what is freed is given back, and the peak is of use
    with_33, with_65 = map(float, run_fresh(PEAK).split())
    assert with_65 < with_33 + 10  # MB, of which 6 are the longer input


@torch.no_grad()
def test_encoding_is_1_5_times_as_fast_as_diffusers(real_size):
    """A loose floor, because the machine may be busy; benchmarks/ measures the ratio."""
    vae, encoder = real_size
    videos = random_videos(1, 5, 128, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, theirs = in_turns(lambda: encoder(videos), lambda: diffusers_mode(vae, videos), repeats=3)
    finally:
        torch.set_num_threads(threads)
    assert min(theirs) / min(ours) > 1.5  # the least, because what else runs only adds time
