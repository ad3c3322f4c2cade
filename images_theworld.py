# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Reads an image in any form as sRGB, as a viewer shows it: upright, with 8 bits, on a white page.

And finds the size to which it is resized if it keeps its shape.
"""

import base64
import math
import os
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import get_size_dict


IMAGE_FORMS = "a PIL image, a uint8 array or tensor, a path, a URL or base64 text"
CHANNEL_AXES = {"channels_first": 0, "channels_last": -1}


def read_images(images: Any, input_data_format: str | None = None) -> Any:
    """`read_image` of each image, in the same nesting; an array of four dimensions is a list of images."""
    if isinstance(images, list | tuple):
        return [read_images(image, input_data_format) for image in images]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return [read_image(image, input_data_format) for image in images]
    return read_image(images, input_data_format)


def read_image(image: Any, input_data_format: str | None = None) -> Image.Image:
    """
    An image as sRGB; of an animation, the first frame.

    Args:
        image: A PIL image, a path, a URL (`http://`, `https://`, `file://` or `data:`), base64 text, or a uint8 array
            or tensor: [H, W], or with 1, 3 or 4 channels first or last.
        input_data_format: "channels_first" or "channels_last", for an array that could be either.

    Raises:
        TypeError: If it is something else, or an array of another dtype.
        ValueError: If it cannot be read, is empty, has 32 bits a channel, or more pixels than `Image.MAX_IMAGE_PIXELS`
            (None admits any number); the latter is found before anything is decoded.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        image = image_from_array(image, input_data_format)
    elif isinstance(image, str | os.PathLike):
        image = open_image(os.fspath(image))
    elif not isinstance(image, Image.Image):
        raise TypeError(f"An image must be {IMAGE_FORMS}, got {type(image).__name__}.")

    check_pixels(image.width, image.height)
    try:
        image.load()
        image = apply_exif_orientation(image)
    except Exception as error:  # each of Pillow's decoders has errors of its own
        raise ValueError(
            f"The image cannot be decoded: {error}. The file is damaged or cut off; get it again."
        ) from None
    return to_rgb(image)


def check_pixels(width: int, height: int) -> None:
    """Raises a `ValueError` if an image of this size has no pixel, or more than `Image.MAX_IMAGE_PIXELS`."""
    limit = Image.MAX_IMAGE_PIXELS
    if width * height == 0 or (limit is not None and width * height > limit):
        raise ValueError(
            f"An image must have 1 to {limit:,} pixels, got {width}x{height}. Make it smaller, or, if you "
            "trust where it comes from, raise `PIL.Image.MAX_IMAGE_PIXELS`."
        )


def open_image(source: str) -> Image.Image:
    """The image behind a path, a URL or base64 text, not decoded yet."""
    try:
        file = find_file(source)
        return Image.open(BytesIO(file) if isinstance(file, bytes) else file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{shown(source)} is refused: {error} Make it smaller.") from None
    except (
        Exception
    ) as error:  # Pillow's decoders have errors of their own, and its text shows where in memory a file is
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ValueError(f"{shown(source)} is no image that can be read{reason}. Expected {IMAGE_FORMS}.") from None


def shown(source: str) -> str:
    """A path, a URL or base64 text as error messages show it."""
    return repr(source if len(source) < 200 else f"{source[:50]}...")


def find_file(source: str) -> str | bytes:
    """
    The path of a local file, or the content behind another URL or base64 text.

    Raises:
        OSError: If there is neither.
    """
    if source.startswith(("http://", "https://")):
        return fetch(source)
    path = url2pathname(urlsplit(source).path) if source.startswith("file://") else source
    if os.path.isfile(path):
        return path
    try:
        text = source.partition(",")[2] if source.startswith("data:") else source
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise FileNotFoundError("there is no such file") from None


def fetch(url: str) -> bytes:
    """What is behind a URL, which must answer within half a minute."""
    try:
        with urlopen(Request(url, headers={"User-Agent": "theworld"}), timeout=30) as response:
            return response.read()
    except HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def image_from_array(array: np.ndarray | torch.Tensor, input_data_format: str | None) -> Image.Image:
    """The PIL image of an array or tensor of bytes; see `read_image`."""
    array = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    if array.dtype != np.uint8:
        raise TypeError(
            f"An image as an array must be uint8 in 0..255, got {array.dtype}. From 0..1 it is "
            "`(image * 255).round()` as uint8; pixels in [-1, 1] are the model's `pixel_values` already."
        )
    sides = [side for side, axis in CHANNEL_AXES.items() if array.ndim == 3 and array.shape[axis] in (1, 3, 4)]
    if input_data_format in sides:
        sides = [input_data_format]
    if array.ndim != 2 and len(sides) != 1:
        raise ValueError(
            f"An image as an array must be [H, W], or have 1, 3 or 4 channels first or last; {list(array.shape)} "
            f"{'could be either' if sides else 'is neither'}. Say which by `input_data_format`, or give a PIL image."
        )
    if array.ndim == 3:
        array = np.moveaxis(array, CHANNEL_AXES[sides[0]], -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def apply_exif_orientation(image: Image.Image) -> Image.Image:
    """A decoded image, turned as its EXIF data say."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as sRGB: 16 bits scaled to 8, transparency over white."""
    if image.mode in ("I", "F"):
        raise ValueError(
            f"The image has 32 bits a channel (PIL's mode {image.mode!r}), which have no agreed range. Scale it to "
            "0..255 as you mean it to look, and give 8 bits."
        )
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):  # Pillow's own conversion makes all above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if profile:
        image = to_srgb(image, profile)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image if image.mode == "RGB" else image.convert("RGB")


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """
    An image of 8 bits with its colors converted from those of an ICC profile.

    A profile that is damaged, or made for other channels than the image has, is ignored, as browsers do.
    """
    channels = {"CMYK": "CMYK", "L": "L", "LA": "L", "1": "L"}.get(image.mode, "RGB")
    transparent = image.convert("RGBA") if image.has_transparency_data else None
    opaque = (transparent if transparent and channels == "RGB" else image).convert(channels)
    try:
        given = ImageCms.ImageCmsProfile(BytesIO(profile))
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        converted = ImageCms.ImageCmsTransform(given, srgb, channels, "RGB").apply(opaque)
    except (OSError, TypeError, ValueError):
        return image
    if transparent:
        converted.putalpha(transparent.getchannel("A"))
    return converted


def read_pixel_limits(size: Mapping | int | Sequence[int]) -> tuple[int, int] | None:
    """
    The least and the most pixels of `size={"shortest_edge": least, "longest_edge": most}`; None for any other `size`.

    Both are areas, as in Qwen's image processors.

    Raises:
        ValueError: If the two are not positive or not in ascending order.
    """
    given = get_size_dict(size, default_to_square=False, param_name="size")
    if not {"shortest_edge", "longest_edge"} <= {name for name, value in given.items() if value is not None}:
        return None
    least, most = given["shortest_edge"], given["longest_edge"]
    if not 0 < least <= most:
        raise ValueError(
            "`size` must give the least and the most pixels of an image as `shortest_edge` and `longest_edge`, with "
            f"0 < shortest_edge <= longest_edge, got {dict(given)}."
        )
    return least, most


def fit_size(height: int, width: int, patch_size: int, least: int, most: int) -> tuple[int, int]:
    """
    The size to resize an image of `height` x `width` to, so that its shape is kept.

    Both sides are multiples of `patch_size`, and among the multiples around the exact size, those with the nearest
    aspect ratio are taken. An image of `least` to `most` pixels changes no more than this needs. A narrow image is
    enlarged until its shorter side is one patch.

    Raises:
        ValueError: If the image is too narrow for `most` pixels.
    """
    area = height * width
    scale = math.sqrt(min(max(area, least), most) / area)
    scale = max(scale, patch_size / min(height, width))
    rows, columns = height * scale / patch_size, width * scale / patch_size
    allowed = [(r, c) for r in neighbors(rows) for c in neighbors(columns) if r * c * patch_size**2 <= most]
    if not allowed:
        raise ValueError(
            f"An image of {height}x{width} pixels (height x width) cannot keep its shape with at most {most:,} pixels "
            f"and sides that are multiples of {patch_size}. Crop it, or allow more pixels by `size['longest_edge']`; "
            "for a video, also by `max_video_pixels` or fewer frames."
        )

    def misfit(size: tuple[int, int]) -> tuple[bool, float, float]:
        pixels, ratio = size[0] * size[1] * patch_size**2, size[0] / size[1]
        wanted = rows * columns * patch_size**2
        return pixels < least, abs(math.log(ratio * width / height)), abs(math.log(pixels / wanted))

    rows, columns = min(allowed, key=misfit)
    return rows * patch_size, columns * patch_size


def neighbors(number: float) -> list[int]:
    """The integers around a number, at least 1."""
    return sorted({max(1, math.floor(number)), max(1, math.ceil(number))})
