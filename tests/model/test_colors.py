"""Tests that images with an ICC profile are converted to sRGB, and that others are unchanged."""

import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.helpers.bad_inputs import encoded
from tests.helpers.films import write_film
from theworld import TheWorldProcessor
from theworld.images_theworld import read_image


# X, Y and Z of Display P3's primaries under D50, as the profiles of phones have them; its curve is that of sRGB.
PRIMARIES = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}
SRGB_FROM_P3 = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
FORMATS = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def wide_profile() -> bytes:
    """Display P3: sRGB's profile with other primaries."""
    profile = bytearray(srgb_profile())
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        name, start, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if name in PRIMARIES:
            struct.pack_into(">3i", profile, start + 8, *(round(value * 2**16) for value in PRIMARIES[name]))
    return bytes(profile)


def gray_profile(gamma: float) -> bytes:
    """A profile of one channel, [header, white, curve]."""
    white = struct.pack(">4s4x3i", b"XYZ ", round(0.9642 * 2**16), 2**16, round(0.8249 * 2**16))
    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(gamma * 2**8))
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", 156, len(white), b"kTRC", 156 + len(white), len(curve))
    size = 156 + len(white) + len(curve)
    header = bytearray(128)
    struct.pack_into(">I4xI4s4s4s", header, 0, size, 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header[36:40] = b"acsp"
    struct.pack_into(">3i", header, 68, round(0.9642 * 2**16), 2**16, round(0.8249 * 2**16))
    return bytes(header) + tags + white + curve


def colors(count: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(40, 216, (count, count, 3), dtype=np.uint8)


def as_srgb(p3: np.ndarray) -> np.ndarray:
    """What Display P3's colors are in sRGB, by its formulas; uint8 to float in 0..255."""
    encoded = p3 / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    linear = (linear @ SRGB_FROM_P3.T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.fixture
def processor(convert):
    return TheWorldProcessor.from_pretrained(convert("gemma2"))


@pytest.mark.parametrize("form", FORMATS)
def test_wide_colors_are_converted_to_srgb(form, tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(encoded(Image.fromarray(colors()), form, icc_profile=wide_profile(), **FORMATS[form]))
    with Image.open(path) as image:
        expected = as_srgb(np.asarray(image.convert("RGB")))
    for source in (path, str(path), path.as_uri(), Image.open(path)):
        assert np.abs(np.asarray(read_image(source)) - expected).max() < 2
    assert np.abs(expected - colors()).max() > 20


def test_images_and_frames_go_through_one_reader(processor, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(Image.fromarray(colors()), "PNG", icc_profile=wide_profile()))
    image = processor(images=path, return_tensors="pt")["pixel_values"]
    plain = processor(images=read_image(path), return_tensors="pt")["pixel_values"]
    frame = processor(videos=[path, path], return_tensors="pt")["pixel_values_videos"][0, :1]
    assert torch.equal(image, plain) and torch.equal(frame, plain)


def test_srgb_and_no_profile_give_the_same_bits():
    picture = Image.fromarray(colors())
    for image in (picture, Image.open(BytesIO(encoded(picture, "PNG", icc_profile=srgb_profile())))):
        assert np.array_equal(np.asarray(read_image(image)), colors())


def test_transparency_stays_under_a_profile():
    picture = Image.fromarray(np.dstack([colors(), np.tile(np.uint8([0, 255]), (16, 8))]))
    read = np.asarray(read_image(Image.open(BytesIO(encoded(picture, "PNG", icc_profile=wide_profile())))))
    assert (read[:, ::2] == 255).all()
    assert np.abs(read[:, 1::2] - as_srgb(colors())[:, 1::2]).max() < 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_gray_pictures_have_profiles_too(mode):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(levels).convert("LA" if mode == "LA" else "L")
    if mode == "I;16":
        picture = Image.fromarray(levels.astype(np.uint16) * 256)
    read = np.asarray(read_image(Image.open(BytesIO(encoded(picture, "PNG", icc_profile=gray_profile(1.5))))))
    linear = (levels / 255) ** 1.5
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(read - expected[..., None]).max() < 2


@pytest.mark.parametrize(
    "profile", [b"no profile", wide_profile()[:200], gray_profile(1.0)], ids=["text", "cut off", "gray"]
)
def test_profiles_that_do_not_fit_are_ignored(profile):
    image = Image.open(BytesIO(encoded(Image.fromarray(colors()), "PNG", icc_profile=profile)))
    assert np.array_equal(np.asarray(read_image(image)), colors())


def test_a_palette_is_converted_with_its_profile():
    palette = Image.fromarray(colors()).quantize(32)
    read = read_image(Image.open(BytesIO(encoded(palette, "PNG", icc_profile=wide_profile()))))
    assert np.abs(np.asarray(read) - as_srgb(np.asarray(palette.convert("RGB")))).max() < 2


@pytest.mark.parametrize("standard", [1, 5], ids=["BT.709", "BT.601"])
def test_films_have_the_colors_that_they_say(standard, processor, tmp_path):
    frame = np.full((64, 64, 3), (200, 30, 60), np.uint8)
    (tmp_path / "clip.mp4").write_bytes(write_film([frame] * 2, [0, 0.125], colors=standard))
    read = processor(videos=tmp_path / "clip.mp4", return_tensors="pt")["pixel_values_videos"][0, 0]
    assert (read.mean(dim=(1, 2)) * 127.5 + 127.5 - torch.tensor([200.0, 30, 60])).abs().max() < 6
