"""
A table of invalid or unusual inputs and the expected results.

The expected result is either a pattern that the message of a ValueError or TypeError must contain, or the result of
the same call for the intended input. `test_bad_inputs.py` checks every row, and randomly damaged files.
"""

import base64
import itertools
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageOps

from tests.helpers.films import write_film
from theworld import TheWorldForConditionalGeneration, TheWorldProcessor


@dataclass(frozen=True)
class Given:
    """
    What the rows use: a checkpoint for images of 64x64 pixels, a folder for files, and the same for a checkpoint
    `with_vision`, Gemma 3's vision tower.
    """

    model: TheWorldForConditionalGeneration
    processor: TheWorldProcessor
    folder: Path
    with_vision: "Given | None" = None

    @classmethod
    def load(cls, checkpoint: Path, folder: Path, **more: Any) -> "Given":
        model = TheWorldForConditionalGeneration.from_pretrained(checkpoint).eval()
        return cls(model, TheWorldProcessor.from_pretrained(checkpoint), folder, **more)

    def pixels(self, *images: Any, **options) -> torch.Tensor:
        return self.processor(images=list(images), return_tensors="pt", **options)["pixel_values"]

    def frames(self, *videos: Any, **options) -> torch.Tensor:
        return self.processor(videos=list(videos), return_tensors="pt", **options)["pixel_values_videos"]

    def count_placeholders(self, text: Any, images: Any = None, **options) -> list[int]:
        """The number of `<world>` placeholders in each prompt."""
        input_ids = self.processor(text=text, images=images, **options)["input_ids"]
        return [row.count(self.processor.image_token_id) for row in input_ids]

    def chat(self, *contents: Any, **options) -> str:
        """The prompt of a conversation whose turns have these contents."""
        roles = ["user", "assistant"]
        messages = [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]
        return self.processor.apply_chat_template(messages, **options)

    def file(self, name: str, content: bytes) -> str:
        (self.folder / name).write_bytes(content)
        return str(self.folder / name)

    def logits(self, **changes: Any) -> torch.Tensor:
        """The last logits of two prompts with a picture each, with these inputs changed."""
        return call(self.model, **{**self.good, "logits_to_keep": 1, **changes}).logits

    def logits_of_videos(self, **changes: Any) -> torch.Tensor:
        """As `logits`, of two prompts with a video each."""
        return call(self.model, **{**self.good_videos, "logits_to_keep": 1, **changes}).logits

    def answer(self, **changes: Any) -> torch.Tensor:
        return call(self.model.generate, **{**self.good, "max_new_tokens": 3, "do_sample": False, **changes})

    @property
    def good(self) -> dict[str, torch.Tensor]:
        return dict(self.processor(text=["a<world>b", "c<world>d"], images=[SCENE, RED], return_tensors="pt"))

    @property
    def good_videos(self) -> dict[str, torch.Tensor]:
        text = ["a<world_video>b", "c<world_video>d"]
        return dict(self.processor(text=text, videos=[CLIP, CLIP], return_tensors="pt"))


@torch.no_grad()
def call(function: Callable, **arguments: Any) -> Any:
    return function(**{name: value for name, value in arguments.items() if value is not None})


class Row(NamedTuple):
    name: str
    do: Callable[[Given], Any]
    expected: str | Callable[[Given], Any]

    def check(self, given: Given) -> None:
        """Calls `do`, and raises an AssertionError if the result is not the expected one."""
        if isinstance(self.expected, str):
            try:
                result = self.do(given)
            except (ValueError, TypeError) as error:
                assert re.search(self.expected, str(error)), error
                assert "object at 0x" not in str(error), error
            else:
                raise AssertionError(f"The input was not rejected; the result is {result}.")
        else:
            result, expected = self.do(given), self.expected(given)
            assert torch.equal(result, expected) if isinstance(result, torch.Tensor) else result == expected


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def film() -> bytes:
    """An MP4 of the five frames of `CLIP`."""
    return write_film([np.asarray(frame) for frame in CLIP], [number / 8 for number in range(5)])


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG file, with its size and without pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def gif_header(width: int, height: int) -> bytes:
    """The start of a GIF file, up to the position and size of its first frame, without pixels."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"


def ramp(*shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape)) * 7 % 256).astype(np.uint8).reshape(shape)


def changed(tensor: torch.Tensor, index: Any, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def text(content: str) -> list[dict]:
    return [{"type": "image"}, {"type": "text", "text": content}]


SCENE = Image.fromarray(ramp(48, 40, 3))
RED = Image.new("RGB", (20, 30), "red")
GREY = Image.fromarray(ramp(48, 40))
DEEP = Image.fromarray(ramp(48, 40).astype(np.uint16) * 256 + 255)
CLIP = [SCENE, *(Image.new("RGB", (40, 48), colour) for colour in ("red", "lime", "blue", "white"))]
ANIMATION = {"save_all": True, "append_images": CLIP[1:], "duration": 125}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # the top is on the right
# Of copies: Pillow keeps what its writer of JPEG sets.
TWO_PICTURES = encoded(SCENE.copy(), "MPO", save_all=True, append_images=[RED.copy()])
PAGES = encoded(SCENE.copy(), "TIFF", save_all=True, append_images=[RED.copy()])
CLEAR = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
WHITE = Image.new("RGB", (8, 8), "white")
SIDEWAYS = ImageOps.exif_transpose(Image.open(BytesIO(encoded(SCENE, "PNG", exif=TURNED))))
OUT_OF_RANGE = r"`pixel_values` must be in \[-1, 1\] .*TheWorldProcessor scales images"
SHAPE = r"`pixel_values` must be \[B, 3, H, W\], or .* TheWorldProcessor resizes images"
TYPED = r"A message's text holds {}, which stands for an image or a video. Give those as parts of type 'image'"
NO_IMAGE = "is no image that can be read.*Expected a PIL image, a uint8 array"
NO_VIDEO = "cannot be read as a video: .*(Expected a list of PIL images|It is damaged)"
PICTURE = "A video is a list of PIL images .*, got {}. A single picture is an image: give it as `images`"
DAMAGED = "The image cannot be decoded: .*. The file is damaged or cut off; get it again."
SIDES = "Image sides must be positive multiples of 8 pixels, got {}. Pass multiples as `size="
TOO_LARGE = r"An image must have 1 to 89,478,485 pixels, got {}. Make it smaller"
AS_ARRAY = r"An image as an array must be uint8 in 0..255, got {}. From 0..1 it is `\(image \* 255\).round\(\)`"
CHANNELS = r"must be \[H, W\], or have 1, 3 or 4 channels first or last; \[{}\] {}. Say which by `input_data_format`"
NOT_AN_IMAGE = "An image must be a PIL image, a uint8 array or tensor, a path, a URL or base64 text, got {}"

IMAGES = [
    Row("palette", lambda g: g.pixels(SCENE.quantize(8)), lambda g: g.pixels(SCENE.quantize(8).convert("RGB"))),
    Row("grey", lambda g: g.pixels(GREY), lambda g: g.pixels(Image.merge("RGB", [GREY] * 3))),
    Row(
        "black and white", lambda g: g.pixels(GREY.convert("1")), lambda g: g.pixels(GREY.convert("1").convert("RGB"))
    ),
    Row(
        "CMYK, a JPEG",
        lambda g: g.pixels(g.file("a.jpg", encoded(RED.convert("CMYK"), "JPEG"))),
        lambda g: g.pixels(Image.open(BytesIO(encoded(RED.convert("CMYK"), "JPEG"))).convert("RGB")),
    ),
    Row("YCbCr", lambda g: g.pixels(RED.convert("YCbCr")), lambda g: g.pixels(RED.convert("YCbCr").convert("RGB"))),
    Row("16 bits, a PNG", lambda g: g.pixels(g.file("a.png", encoded(DEEP, "PNG"))), lambda g: g.pixels(GREY)),
    Row(
        "16 bits, big-endian",
        lambda g: g.pixels(Image.frombytes("I;16B", DEEP.size, np.asarray(DEEP).astype(">u2").tobytes())),
        lambda g: g.pixels(GREY),
    ),
    Row("transparent", lambda g: g.pixels(CLEAR), lambda g: g.pixels(WHITE)),
    Row("half transparent", lambda g: g.pixels(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), lambda g: g.pixels(WHITE)),
    Row("grey and transparent", lambda g: g.pixels(Image.new("LA", (8, 8), (9, 0))), lambda g: g.pixels(WHITE)),
    Row(
        "palette with a transparent colour",
        lambda g: g.pixels(g.file("a.gif", encoded(Image.new("P", (8, 8), 3), "GIF", transparency=3))),
        lambda g: g.pixels(WHITE),
    ),
    Row(
        "turned by EXIF, a file",
        lambda g: g.pixels(g.file("a.png", encoded(SCENE, "PNG", exif=TURNED))),
        lambda g: g.pixels(SIDEWAYS),
    ),
    Row(
        "turned by EXIF, opened",
        lambda g: g.pixels(Image.open(BytesIO(encoded(SCENE, "PNG", exif=TURNED)))),
        lambda g: g.pixels(SIDEWAYS),
    ),
    Row(
        "animated: its first frame",
        lambda g: g.pixels(g.file("a.gif", encoded(RED, "GIF", save_all=True, append_images=[SCENE]))),
        lambda g: g.pixels(RED),
    ),
    Row("of 1 pixel", lambda g: g.pixels(Image.new("RGB", (1, 1), "red")), lambda g: g.pixels(RED)),
    Row("as thin as a hair", lambda g: g.pixels(Image.new("RGB", (1, 60_000), "red")), lambda g: g.pixels(RED)),
    Row("as flat as a sheet", lambda g: g.pixels(Image.new("RGB", (60_000, 1), "red")), lambda g: g.pixels(RED)),
    Row("base64", lambda g: g.pixels(base64.b64encode(encoded(SCENE, "PNG")).decode()), lambda g: g.pixels(SCENE)),
    Row(
        "a data URL",
        lambda g: g.pixels("data:image/png;base64," + base64.b64encode(encoded(SCENE, "PNG")).decode()),
        lambda g: g.pixels(SCENE),
    ),
    Row("a `Path`", lambda g: g.pixels(Path(g.file("a.png", encoded(SCENE, "PNG")))), lambda g: g.pixels(SCENE)),
    Row("array, channels last", lambda g: g.pixels(ramp(48, 40, 3)), lambda g: g.pixels(SCENE)),
    Row(
        "tensor, channels first",
        lambda g: g.pixels(torch.tensor(ramp(48, 40, 3)).permute(2, 0, 1)),
        lambda g: g.pixels(SCENE),
    ),
    Row("array, grey", lambda g: g.pixels(ramp(48, 40)), lambda g: g.pixels(GREY)),
    Row("array, one channel", lambda g: g.pixels(ramp(48, 40)[None]), lambda g: g.pixels(GREY)),
    Row("array, four channels", lambda g: g.pixels(np.asarray(CLEAR)), lambda g: g.pixels(WHITE)),
    Row(
        "array of two images",
        lambda g: g.processor(images=np.stack([ramp(48, 40, 3)] * 2), return_tensors="pt")["pixel_values"],
        lambda g: g.pixels(SCENE, SCENE),
    ),
    Row(
        "array, first and last of 3, told which",
        lambda g: g.pixels(ramp(3, 9, 3), input_data_format="channels_last"),
        lambda g: g.pixels(Image.fromarray(ramp(3, 9, 3))),
    ),
    Row(
        "array, first and last of 3", lambda g: g.pixels(ramp(3, 9, 3)), CHANNELS.format("3, 9, 3", "could be either")
    ),
    Row("array, two channels", lambda g: g.pixels(ramp(9, 9, 2)), CHANNELS.format("9, 9, 2", "is neither")),
    Row("array, one dimension", lambda g: g.pixels(ramp(9)), CHANNELS.format("9", "is neither")),
    Row(
        "array, five dimensions",
        lambda g: g.pixels(ramp(1, 1, 3, 9, 9)),
        CHANNELS.format("1, 1, 3, 9, 9", "is neither"),
    ),
    Row("array without a pixel", lambda g: g.pixels(ramp(0, 9, 3)), TOO_LARGE.format("9x0")),
    Row("array of floats in 0..1", lambda g: g.pixels(ramp(9, 9, 3) / 255), AS_ARRAY.format("float64")),
    Row("tensor of floats in -1..1", lambda g: g.pixels(torch.zeros(3, 9, 9)), AS_ARRAY.format("float32")),
    Row("array of NaN", lambda g: g.pixels(np.full((9, 9, 3), np.nan)), AS_ARRAY.format("float64")),
    Row("array of int64", lambda g: g.pixels(ramp(9, 9, 3).astype(np.int64)), AS_ARRAY.format("int64")),
    Row("array of booleans", lambda g: g.pixels(ramp(9, 9) > 9), AS_ARRAY.format("bool")),
    Row(
        "32-bit integers",
        lambda g: g.pixels(Image.new("I", (8, 8), 70_000)),
        r"32 bits a channel \(PIL's mode 'I'\).*Scale it to 0..255",
    ),
    Row(
        "32-bit floats",
        lambda g: g.pixels(Image.new("F", (8, 8), 0.5)),
        r"32 bits a channel \(PIL's mode 'F'\).*Scale it to 0..255",
    ),
    Row("without a pixel", lambda g: g.pixels(Image.new("RGB", (0, 5))), TOO_LARGE.format("0x5")),
    Row(
        "a bomb of 105 megapixels, a file",
        lambda g: g.pixels(g.file("a.png", png_header(15_000, 7_000))),
        TOO_LARGE.format("15000x7000"),
    ),
    Row(
        "a bomb of 105 megapixels, opened",
        lambda g: g.pixels(Image.open(BytesIO(png_header(15_000, 7_000)))),
        TOO_LARGE.format("15000x7000"),
    ),
    Row(
        "a bomb of 400 megapixels",
        lambda g: g.pixels(g.file("a.png", png_header(20_000, 20_000))),
        "is refused: Image size .400000000 pixels. .*Make it smaller",
    ),
    Row(
        "a bomb in base64",
        lambda g: g.pixels(base64.b64encode(png_header(30_000, 30_000)).decode()),
        "is refused: .*Make it smaller",
    ),
    Row("a file of 0 bytes", lambda g: g.pixels(g.file("a.png", b"")), NO_IMAGE),
    Row(
        "a file of text", lambda g: g.pixels(g.file("a.png", b"version https://git-lfs.github.com/spec/v1")), NO_IMAGE
    ),
    Row("a file cut off, JPEG", lambda g: g.pixels(g.file("a.jpg", encoded(SCENE, "JPEG")[:-200])), DAMAGED),
    Row("a file cut off, PNG", lambda g: g.pixels(g.file("a.png", encoded(SCENE, "PNG")[:150])), DAMAGED),
    Row(
        "a file of flipped bits",
        lambda g: g.pixels(g.file("a.png", encoded(SCENE, "PNG")[:60] + bytes(60) + encoded(SCENE, "PNG")[120:])),
        DAMAGED,
    ),
    Row("a file that is not there", lambda g: g.pixels("missing.png"), f"'missing.png' {NO_IMAGE}"),
    Row("a folder", lambda g: g.pixels(str(g.folder)), NO_IMAGE),
    Row("an empty path", lambda g: g.pixels(""), NO_IMAGE),
    Row("a URL that nobody answers", lambda g: g.pixels("http://127.0.0.1:9/a.png"), NO_IMAGE),
    Row("a URL that is none", lambda g: g.pixels("http://"), NO_IMAGE),
    Row("None in a list", lambda g: g.pixels(SCENE, None), NOT_AN_IMAGE.format("NoneType")),
    Row("a number", lambda g: g.pixels(7), NOT_AN_IMAGE.format("int")),
    Row("a dict", lambda g: g.pixels({"bytes": b""}), NOT_AN_IMAGE.format("dict")),
]

PROMPTS = [
    Row(
        "an image too many",
        lambda g: g.count_placeholders("<world>", [SCENE, RED]),
        r"The prompts have 1 `<world>`, but 2 image\(s\) are given. Write one",
    ),
    Row(
        "an image too few",
        lambda g: g.count_placeholders("<world><world>", [SCENE]),
        r"The prompts have 2 `<world>`, but 1 image\(s\) are given. Write one",
    ),
    Row(
        "a placeholder and no image",
        lambda g: g.count_placeholders("<world>"),
        r"The prompts have 1 `<world>`, but 0 image\(s\) are given. Write one",
    ),
    Row(
        "an image in another prompt",
        lambda g: g.count_placeholders(["<world>", "a"], [[], [SCENE]]),
        r"the prompts have \[1, 0\], the images are \[0, 1\]",
    ),
    Row(
        "images of two prompts for three",
        lambda g: g.count_placeholders(["<world>", "<world>", "a"], [[SCENE], [RED]]),
        r"the prompts have \[1, 1, 0\], the images are \[1, 1\]",
    ),
    Row(
        "images grouped and not",
        lambda g: g.count_placeholders(["<world>"] * 2, [SCENE, [RED]]),
        "a list of images for each prompt, got a mixture",
    ),
    Row(
        "`<world>` typed behind the developer's",
        lambda g: g.count_placeholders("<world>" + "what is <world>?", SCENE),
        r"have 2 `<world>`, but 1 image",
    ),
    Row("`<world>` in a chat's text", lambda g: g.chat(text("what is <world>?")), TYPED.format("<world>")),
    Row("`<world>` as a chat's text", lambda g: g.chat("<world>"), TYPED.format("<world>")),
    Row("`<world>` in an earlier answer", lambda g: g.chat("a", "<world>", "b"), TYPED.format("<world>")),
    Row(
        "`<start_of_world>` in a chat's text",
        lambda g: g.chat(text("<start_of_world>")),
        TYPED.format("<start_of_world>"),
    ),
    Row(
        "`<end_of_world>` in a chat's text", lambda g: g.chat(text("a<end_of_world>")), TYPED.format("<end_of_world>")
    ),
    Row(
        "a system message that holds `<world>`",
        lambda g: g.processor.apply_chat_template(
            [{"role": "system", "content": "<world>"}, {"role": "user", "content": "a"}]
        ),
        TYPED.format("<world>"),
    ),
    Row(
        "nearly `<world>` in a chat's text",
        lambda g: g.chat("< world> <World> world"),
        lambda g: "<bos><start_of_turn>user\n< world> <World> world<end_of_turn>\n",
    ),
    Row(
        "two turns of one side",
        lambda g: g.processor.apply_chat_template([{"role": "user", "content": "a"}] * 2),
        "Turns must alternate",
    ),
    Row(
        "a part of another kind",
        lambda g: g.chat([{"type": "smell"}]),
        "content of type 'text', 'image' and 'video', got 'smell'",
    ),
    Row("no prompt", lambda g: g.count_placeholders([]), "`text` is an empty list. Give at least one prompt"),
    Row("a prompt of no characters", lambda g: g.count_placeholders(""), lambda g: [0]),
    Row(
        "a prompt that is a number",
        lambda g: g.count_placeholders(7),
        "`text` must be a string or a list of strings, got int: 7",
    ),
    Row(
        "a prompt of ids",
        lambda g: g.count_placeholders([2, 7]),
        r"`text` must be a string or a list of strings, got list: \[2, 7\]",
    ),
    Row(
        "cut through the world tokens",
        lambda g: g.count_placeholders("<world>", SCENE, truncation=True, max_length=20),
        "Please disable truncation or increase `max_length`",
    ),
    Row(
        "a size that would be cropped",
        lambda g: g.count_placeholders("<world>", SCENE, size={"height": 60, "width": 64}),
        SIDES.format("60x64"),
    ),
    Row(
        "a size under 8 pixels",
        lambda g: g.count_placeholders("<world>", SCENE, size={"height": 4, "width": 8}),
        SIDES.format("4x8"),
    ),
    Row("an image kept at 48x40", lambda g: g.count_placeholders("<world>", SCENE, do_resize=False), lambda g: [30]),
    Row(
        "an image kept at 30x20",
        lambda g: g.count_placeholders("<world>", RED, do_resize=False),
        SIDES.format("30x20"),
    ),
    Row(
        "latents and images",
        lambda g: g.count_placeholders("<world>", SCENE, world_latents=torch.zeros(1, 16, 8, 8)),
        "Give the images once",
    ),
    Row(
        "latents without their channels",
        lambda g: g.count_placeholders("<world>", world_latents=torch.zeros(1, 8, 8)),
        r"`world_latents` must be tensors \[z, h, w\], one for each image, got \[8, 8\]",
    ),
    Row(
        "latents of two VAEs",
        lambda g: g.count_placeholders("<world><world>", world_latents=[torch.zeros(16, 8, 8), torch.zeros(48, 8, 8)]),
        r"one for each image, got \[16, 8, 8\], \[48, 8, 8\]",
    ),
    Row(
        "latents that are lists",
        lambda g: g.count_placeholders("<world>", world_latents=[[0.0]]),
        "`world_latents` must be tensors .* got float",
    ),
    Row(
        "latents in another prompt",
        lambda g: g.count_placeholders(
            ["<world>", "a"], world_latents=[torch.zeros(0, 16, 8, 8), torch.zeros(1, 16, 8, 8)]
        ),
        r"the prompts have \[1, 0\], the images are \[0, 1\]",
    ),
    Row(
        "latents too few",
        lambda g: g.count_placeholders("<world><world>", world_latents=torch.zeros(1, 16, 8, 8)),
        r"have 2 `<world>`, but 1 image\(s\) are given",
    ),
]

TENSORS = [
    Row(
        "a NaN pixel",
        lambda g: g.logits(pixel_values=changed(g.good["pixel_values"], (0, 0, 0, 0), torch.nan)),
        OUT_OF_RANGE,
    ),
    Row(
        "an infinite pixel",
        lambda g: g.logits(pixel_values=changed(g.good["pixel_values"], (0, 0, 0, 0), torch.inf)),
        OUT_OF_RANGE,
    ),
    Row(
        "floats in 0..255",
        lambda g: g.logits(pixel_values=g.good["pixel_values"] * 127.5 + 127.5),
        r"from 0..255: `image / 127.5 - 1`",
    ),
    Row(
        "bytes",
        lambda g: g.logits(pixel_values=torch.zeros(2, 3, 64, 64, dtype=torch.uint8)),
        "must be floating point in .*, got torch.uint8. TheWorldProcessor",
    ),
    Row(
        "pixels that are lists",
        lambda g: g.logits(pixel_values=g.good["pixel_values"].tolist()),
        "must be floating point in .*, got list",
    ),
    Row("pixels in float64", lambda g: g.logits(pixel_values=g.good["pixel_values"].double()), lambda g: g.logits()),
    Row("an image without its batch", lambda g: g.logits(pixel_values=torch.zeros(3, 64, 64)), SHAPE),
    Row("channels last", lambda g: g.logits(pixel_values=torch.zeros(2, 64, 64, 3)), SHAPE),
    Row(
        "a video",
        lambda g: g.logits(pixel_values=torch.zeros(2, 1, 3, 64, 64)),
        "`pixel_values` must have 4 dimensions",
    ),
    Row("sides no multiple of 8", lambda g: g.logits(pixel_values=torch.zeros(2, 3, 60, 64)), SHAPE),
    Row("images of no pixel", lambda g: g.logits(pixel_values=torch.zeros(2, 3, 0, 64)), SHAPE),
    Row("a batch of no image", lambda g: g.logits(pixel_values=torch.zeros(0, 3, 64, 64)), SHAPE),
    Row(
        "images of another size",
        lambda g: g.logits(pixel_values=torch.zeros(2, 3, 32, 32)),
        r"2 image\(s\) of 16 world tokens need 32 .* have \[64, 64\]",
    ),
    Row(
        "an image missing",
        lambda g: g.logits(pixel_values=g.good["pixel_values"][:1]),
        r"1 image\(s\) of 64 world tokens need 64 .* have \[64, 64\]",
    ),
    Row(
        "all images missing",
        lambda g: g.logits(pixel_values=None),
        "The prompt has `<world>` placeholders but no image is given",
    ),
    Row(
        "all images missing from an answer",
        lambda g: g.answer(pixel_values=None),
        "The prompt has `<world>` placeholders but no image is given",
    ),
    Row(
        "a placeholder that moved to another prompt",
        lambda g: g.logits(input_ids=moved(g.good["input_ids"])),
        r"64 `<world>` placeholders must be in one prompt and contiguous, but the prompts have \[63, 65\]",
    ),
    Row(
        "a placeholder that moved, in generate",
        lambda g: g.answer(input_ids=moved(g.good["input_ids"])),
        r"64 `<world>` placeholders must be in one prompt and contiguous, but the prompts have \[63, 65\]",
    ),
    Row(
        "a placeholder that moved within its prompt",
        lambda g: g.logits(input_ids=changed(changed(g.good["input_ids"], (0, 40), 30), (0, 1), 7)),
        "64 `<world>` placeholders must be in one prompt and contiguous",
    ),
    Row(
        "a token outside the vocabulary",
        lambda g: g.logits(input_ids=changed(g.good["input_ids"], (1, 0), 512)),
        r"`input_ids` must be in 0..511, got \[512\]. Tokenizer and model",
    ),
    Row(
        "a token below 0",
        lambda g: g.answer(input_ids=changed(g.good["input_ids"], (1, 0), -1)),
        r"`input_ids` must be in 0..511, got \[-1\]",
    ),
    Row(
        "tokens that are floats",
        lambda g: g.logits(input_ids=g.good["input_ids"].float()),
        "`input_ids` must be an int64 tensor of token ids, got torch.float32",
    ),
    Row(
        "tokens that are lists",
        lambda g: g.logits(input_ids=g.good["input_ids"].tolist()),
        "`input_ids` must be an int64 tensor of token ids, got list",
    ),
    Row(
        "tokens of one prompt, flat",
        lambda g: g.logits(input_ids=g.good["input_ids"][0]),
        r"`input_ids` must be \[batch, S\].*For one prompt, batch is 1",
    ),
    Row(
        "no token",
        lambda g: g.logits(input_ids=torch.zeros(2, 0, dtype=torch.long)),
        r"`input_ids` must be \[batch, S\] with at least one token",
    ),
    Row(
        "tokens and embeddings",
        lambda g: g.logits(inputs_embeds=torch.zeros(2, 68, 64)),
        "exactly one of `input_ids` and `inputs_embeds`",
    ),
    Row(
        "a mask of another length",
        lambda g: g.logits(attention_mask=torch.ones(2, 60)),
        r"`attention_mask` must cover the prompts, \[2, 69\].*got \[2, 60\]",
    ),
    Row(
        "a mask of another batch",
        lambda g: g.logits(attention_mask=torch.ones(1, 69)),
        r"`attention_mask` must cover the prompts, \[2, 69\].*got \[1, 69\]",
    ),
    Row(
        "prompts padded on the right, for an answer",
        lambda g: g.answer(attention_mask=changed(torch.ones(2, 69, dtype=torch.long), (0, -1), 0)),
        "`generate` needs left padding, but some prompts end in padding",
    ),
    Row(
        "no room for an answer",
        lambda g: g.answer(input_ids=torch.full((1, 8192), 30), attention_mask=None, pixel_values=None),
        "The prompt has 8192 tokens, and with an answer the model reads 8192",
    ),
    Row("little room for an answer", lambda g: answer_in_context(g, 71), lambda g: g.answer(max_new_tokens=2)),
    Row(
        "a label outside the vocabulary",
        lambda g: g.logits(labels=changed(g.good["input_ids"], (0, 0), 600), logits_to_keep=0),
        r"`labels` must be in 0..511 or -100, got \[600\]",
    ),
    Row(
        "labels of another length",
        lambda g: g.logits(labels=g.good["input_ids"]),
        r"`labels` must be \[2, 1\].*got \[2, 69\]. Do not pass `logits_to_keep` in training",
    ),
    Row("latents and pixels", lambda g: g.logits(world_latents=torch.zeros(2, 16, 8, 8)), "Give the images once"),
    Row(
        "latents of NaN",
        lambda g: g.logits(pixel_values=None, world_latents=torch.full((2, 16, 8, 8), torch.nan)),
        "`world_latents` must be finite.*Encode the images again",
    ),
    Row(
        "latents of infinity, for an answer",
        lambda g: g.answer(pixel_values=None, world_latents=torch.full((2, 16, 8, 8), torch.inf)),
        "`world_latents` must be finite",
    ),
    Row(
        "latents of another VAE",
        lambda g: g.logits(pixel_values=None, world_latents=torch.zeros(2, 48, 8, 8)),
        r"Expected latents \[B, 16, h, w\]",
    ),
    Row(
        "latents without their batch",
        lambda g: g.logits(pixel_values=None, world_latents=torch.zeros(16, 8, 8)),
        r"Expected latents \[B, 16, h, w\]",
    ),
    Row(
        "latents of integers",
        lambda g: g.logits(pixel_values=None, world_latents=torch.zeros(2, 16, 8, 8, dtype=torch.long)),
        "`world_latents` must be a floating-point tensor, got torch.int64",
    ),
    Row(
        "latents in lists of lists",
        lambda g: g.logits(pixel_values=None, world_latents=[torch.zeros(16, 8, 8).tolist()] * 2),
        "`world_latents` must be a floating-point tensor, got list",
    ),
]


VIDEOS = [
    Row(
        "frames turned by EXIF",
        lambda g: g.frames([Image.open(BytesIO(encoded(SCENE, "PNG", exif=TURNED)))] * 5),
        lambda g: g.frames([SIDEWAYS] * 5),
    ),
    Row("transparent frames", lambda g: g.frames([CLEAR] * 5), lambda g: g.frames([WHITE] * 5)),
    Row("frames of 16 bits", lambda g: g.frames([DEEP] * 5), lambda g: g.frames([GREY] * 5)),
    Row(
        "frames with channels first",
        lambda g: g.frames(torch.tensor(np.stack([ramp(48, 40, 3)] * 5)).permute(0, 3, 1, 2)),
        lambda g: g.frames([SCENE] * 5),
    ),
    Row(
        "a PNG that moves",
        lambda g: g.frames(g.file("a.png", encoded(SCENE, "PNG", **ANIMATION))),
        lambda g: g.frames(CLIP),
    ),
    Row("a picture for a video", lambda g: g.processor(videos=SCENE), "A single picture is an image: give it as"),
    Row("a frame that is None", lambda g: g.frames([SCENE, None]), "A video is a list of PIL images or arrays"),
    Row("a video of no frame", lambda g: g.frames(np.zeros((0, 48, 40, 3), np.uint8)), "must have one frame or more"),
    Row("a video of floats in 0..1", lambda g: g.frames(np.zeros((5, 48, 40, 3))), AS_ARRAY.format("float64")),
    Row(
        "a video with frames of two sizes",
        lambda g: g.frames([SCENE, SCENE.resize((8, 80))], do_resize=False),
        "The frames of a video must have one size",
    ),
    Row(
        "a video and no placeholder",
        lambda g: g.processor(text="a", videos=CLIP),
        r"have 0 `<world_video>`, but 1 video\(s\) are given. Write one `<world_video>`",
    ),
    Row(
        "a placeholder and no video in the list",
        lambda g: g.processor(text="<world_video>", videos=[]),
        r"have 1 `<world_video>`, but 0 video\(s\) are given",
    ),
    Row("`<world_video>` in a chat's text", lambda g: g.chat(text("<world_video>")), TYPED.format("<world_video>")),
    Row("a film of 0 bytes", lambda g: g.frames(g.file("a.gif", b"")), NO_VIDEO),
    Row("an MP4 of 0 bytes", lambda g: g.frames(g.file("a.mp4", b"")), NO_VIDEO),
    Row("an MP4 that is a text", lambda g: g.frames(g.file("a.mp4", b"version https://git-lfs")), NO_VIDEO),
    Row("an MP4 cut off", lambda g: g.frames(g.file("a.mp4", film()[:-200])), NO_VIDEO),
    Row("an MP4 of flipped bits", lambda g: g.frames(g.file("a.mp4", film()[:60] + bytes(60))), NO_VIDEO),
    Row(
        "an MP4 that is a list of other files",
        lambda g: g.frames(g.file("a.mp4", f"ffconcat version 1.0\nfile {g.file('b.mp4', film())}".encode())),
        NO_VIDEO,
    ),
    Row("an MP4 for an image", lambda g: g.pixels(g.file("a.mp4", film())), NO_IMAGE),
    Row("an MP4 at a URL that nobody answers", lambda g: g.frames("http://127.0.0.1:9/a.mp4"), NO_VIDEO),
    Row("a folder for a video", lambda g: g.frames(str(g.folder)), NO_VIDEO),
    Row("a film that is not there", lambda g: g.frames("missing.gif"), f"'missing.gif' {NO_VIDEO}"),
    Row("an MP4 that is not there", lambda g: g.frames("missing.mp4"), "'missing.mp4' .*: there is no such file"),
    Row("a `file://` that is not there", lambda g: g.frames("file:///no/a.mp4"), "a video: there is no such file"),
    Row(
        "a picture's file for a video",
        lambda g: g.processor(videos=g.file("a.png", encoded(SCENE, "PNG"))),
        PICTURE.format("the picture '.*a.png'"),
    ),
    Row(
        "a phone's JPEG of two pictures",
        lambda g: g.processor(videos=g.file("a.jpg", TWO_PICTURES)),
        PICTURE.format("the picture '.*a.jpg'"),
    ),
    Row(
        "a TIFF of pages, opened",
        lambda g: g.processor(videos=Image.open(BytesIO(PAGES))),
        PICTURE.format("TiffImageFile"),
    ),
    Row(
        "phones' JPEGs of two pictures as frames",
        lambda g: g.frames([Image.open(BytesIO(TWO_PICTURES))] * 5),
        lambda g: g.frames([Image.open(BytesIO(encoded(SCENE, "JPEG")))] * 5),
    ),
    Row(
        "both `fps` and `num_frames`", lambda g: g.frames(CLIP, fps=8, num_frames=5), "`fps` or `num_frames`, got both"
    ),
    Row(
        "no frame of a video asked for", lambda g: g.frames(CLIP, num_frames=0), "`num_frames` must be positive, got 0"
    ),
    Row("at most no frame", lambda g: g.frames(CLIP, max_frames=0), "`max_frames` must be positive, got 0"),
    Row(
        "fewer indices than frames",
        lambda g: g.frames(CLIP, video_metadata={"fps": 8, "frames_indices": [0, 1]}),
        r"an ascending index for each of 5 frame\(s\), and `fps`, got 2 indices \[0, 1\] and fps=8",
    ),
    Row(
        "indices without their rate",
        lambda g: g.frames(CLIP, video_metadata={"frames_indices": [0, 1, 2, 3, 4]}),
        "for each of 5 frame.*, and `fps`, got 5 indices .* and fps=None",
    ),
    Row(
        "a film cut off",
        lambda g: g.frames(g.file("a.gif", encoded(SCENE, "GIF", **ANIMATION)[:-20])),
        DAMAGED,
    ),
    Row(
        "a film cut off between two frames",
        lambda g: g.frames(g.file("a.gif", encoded(SCENE, "GIF", **ANIMATION)[:-80])),
        r"The animation breaks off after 4 frame\(s\): .*. Get it again",
    ),
    Row(
        "a film that is a bomb of 105 megapixels",
        lambda g: g.frames(g.file("a.gif", gif_header(15_000, 7_000))),
        TOO_LARGE.format("15000x7000"),
    ),
    Row(
        "a film that is a bomb of 400 megapixels",
        lambda g: g.frames(g.file("a.gif", gif_header(20_000, 20_000))),
        "is refused: Image size .400000000 pixels. .*Make it smaller",
    ),
    Row(
        "4 frames to the model",
        lambda g: g.logits_of_videos(pixel_values_videos=g.good_videos["pixel_values_videos"][:, :4]),
        r"Videos must have 1 \+ 4k frames, got 4. Remove frames, or repeat the last one",
    ),
    Row(
        "frames that are images, to the model",
        lambda g: g.logits_of_videos(pixel_values_videos=g.good_videos["pixel_values_videos"][0]),
        "`pixel_values_videos` must have 5 dimensions",
    ),
    Row(
        "frames in 0..255",
        lambda g: g.logits_of_videos(pixel_values_videos=g.good_videos["pixel_values_videos"] * 127.5 + 127.5),
        OUT_OF_RANGE,
    ),
    Row(
        "a NaN in a frame",
        lambda g: g.logits_of_videos(
            pixel_values_videos=changed(g.good_videos["pixel_values_videos"], (1, 4, 0, 0, 0), torch.nan)
        ),
        OUT_OF_RANGE,
    ),
    Row(
        "frames in a list",
        lambda g: g.logits_of_videos(pixel_values_videos=g.good_videos["pixel_values_videos"].tolist()),
        "must be floating point in .*, got list",
    ),
    Row(
        "all videos missing",
        lambda g: g.logits_of_videos(pixel_values_videos=None),
        "The prompt has `<world_video>` placeholders but no video is given. Pass `pixel_values_videos`",
    ),
    Row(
        "a video's placeholder that moved to another prompt",
        lambda g: g.logits_of_videos(input_ids=moved(g.good_videos["input_ids"], g.processor.video_token_id)),
        r"Each video's 128 `<world_video>` placeholders must be in one prompt, but the prompts have \[127, 129\]",
    ),
    Row(
        "a video's latents of NaN",
        lambda g: g.logits_of_videos(
            pixel_values_videos=None, world_latents_videos=torch.full((2, 2, 16, 8, 8), torch.nan)
        ),
        "`world_latents` must be finite",
    ),
]

VISION = [
    Row(
        "vision for a model that has none",
        lambda g: g.logits(vision_pixel_values=torch.zeros(2, 3, 32, 32)),
        "this model has no `vision_config`. Convert a Gemma 3 with `--vision`",
    ),
    Row(
        "vision of another size",
        lambda g: g.with_vision.logits(vision_pixel_values=torch.zeros(2, 3, 64, 64)),
        r"`vision_pixel_values` must be \[C, 3, 32, 32\] .* got \[2, 3, 64, 64\]. TheWorldProcessor returns them so",
    ),
    Row(
        "vision in bytes",
        lambda g: g.with_vision.logits(vision_pixel_values=torch.zeros(2, 3, 32, 32, dtype=torch.uint8)),
        "`vision_pixel_values` must be floating point, got torch.uint8",
    ),
    Row(
        "vision in a list",
        lambda g: g.with_vision.logits(vision_pixel_values=[0.0]),
        "`vision_pixel_values` must be floating point, got list",
    ),
    Row(
        "a NaN in vision",
        lambda g: g.with_vision.logits(vision_pixel_values=torch.full((2, 3, 32, 32), torch.nan)),
        "`vision_pixel_values` must be finite.*TheWorldProcessor returns them so",
    ),
    Row(
        "all vision missing",
        lambda g: g.with_vision.logits(vision_pixel_values=None),
        "The prompt has `<image_soft_token>` placeholders but no image is given. Pass `vision_pixel_values`",
    ),
    Row(
        "`<image_soft_token>` in a chat's text",
        lambda g: g.with_vision.chat(text("<image_soft_token>")),
        TYPED.format("<image_soft_token>"),
    ),
    Row(
        "`<start_of_image>` in a chat's text",
        lambda g: g.with_vision.chat(text("<start_of_image>")),
        TYPED.format("<start_of_image>"),
    ),
    Row(
        "`<end_of_image>` in a chat's text",
        lambda g: g.with_vision.chat(text("a<end_of_image>")),
        TYPED.format("<end_of_image>"),
    ),
]


def moved(input_ids: torch.Tensor, place: int = 7) -> torch.Tensor:
    """Swaps a placeholder of the first prompt and a letter of the second: the total stays the same."""
    return changed(changed(input_ids, (0, 40), 30), (1, 1), place)


def answer_in_context(given: Given, context: int) -> torch.Tensor:
    with mock.patch.object(given.model.config.text_config, "max_position_embeddings", context):
        return given.answer(max_new_tokens=9)


def whole_files() -> dict[str, bytes]:
    """A picture, or five frames, in each format; some with EXIF data, which damage can hit as well."""
    return {
        **{form: encoded(SCENE, form, exif=TURNED) for form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")},
        **{form: encoded(SCENE, form) for form in ("GIF", "BMP", "ICO", "TGA", "PPM", "JPEG2000")},
        **{f"{form} of 5 frames": encoded(SCENE, form, **ANIMATION) for form in ("GIF", "PNG", "WEBP")},
    }


def damaged_files(each: int) -> Iterator[tuple[str, bytes]]:
    """`each` damaged files of each format, the same at each call: cut off, or with up to 20 bytes changed."""
    chance = random.Random(0)
    for form, whole in whole_files().items():
        for _ in range(each):
            content = bytearray(whole)
            if chance.random() < 0.4:
                content = content[: chance.randrange(len(content))]
            for _ in range(chance.choice([1, 3, 20]) if content else 0):
                reach = chance.choice([60, len(content)])  # headers are hit more often than chance would
                content[chance.randrange(min(reach, len(content)))] = chance.randrange(256)
            yield form, bytes(content)


def read_file(given: Given, form: str, content: bytes) -> bool:
    """
    Whether a file can be read: as an image, and as a video if it has frames; by path, and opened by Pillow.

    Raises an AssertionError if an unreadable file is not rejected with a clear message.
    """
    path, readable = given.file(f"file.{form.split()[0].lower()}", content), True
    sources = [lambda: path, lambda: Image.open(path)]
    try:
        Image.open(path).close()
    except Exception:  # before TheWorld sees it
        sources.pop()
    for read, source in itertools.product([given.pixels, given.frames][: 1 + ("frames" in form)], sources):
        try:
            assert read(source()).abs().max() <= 1
        except (ValueError, TypeError) as error:
            assert "object at 0x" not in str(error), error
            readable = False
        except Exception as error:
            raise AssertionError(f"{form}: {type(error).__name__}: {error}") from error
    return readable


BAD_INPUTS = [*IMAGES, *PROMPTS, *TENSORS, *VIDEOS, *VISION]
