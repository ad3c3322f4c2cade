# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Text, images and videos to TheWorld's inputs. One `<world>` in a prompt expands to the placeholders of an image's world
tokens, and of Gemma 3's own image tokens if the model has its vision tower; one `<world_video>` to those of a video's.
"""

# Must be the first import: fails clearly if transformers is too old.
from .versions_theworld import TESTED  # noqa: F401 # isort: skip

import copy
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature, Gemma3Processor, ProcessorMixin, SiglipImageProcessorPil
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorKwargs, Gemma3ImageProcessorPil
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, Unpack
from transformers.utils import PROCESSOR_NAME
from transformers.video_utils import VideoInput, VideoMetadataType

from .images_theworld import fit_size, read_images, read_pixel_limits
from .modalities_theworld import VISION_TYPE, WORLD_TYPE
from .padding_theworld import pad_together, without_shared_settings
from .validation_theworld import check_conversation, check_text
from .videos_theworld import (
    Clip,
    Sampling,
    count_videos_by_prompt,
    flatten_metadata,
    flatten_videos,
    open_clip,
    open_videos,
    pad_frames,
)


# Options for world tokens only, because the tower has one image size; and options for the tower only, which has crops.
WORLD_ONLY = ("size", "do_resize")
VISION_ONLY = tuple(name for name in Gemma3ImageProcessorKwargs.__annotations__ if "pan_and_scan" in name)
# Options that set the size of images, and those that set the values of their pixels.
AREAS = ("size", "pad_size", "crop_size")
WORLD_INPUTS = {"pixel_values", "world_latents", "pixel_values_videos"}
NOT_SERVED = (
    "A serving engine reads world tokens, but `world` is False. Set it to True, in processor_config.json and in "
    "requests, or use transformers."
)
SCALES = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class TheWorldImagesKwargs(Gemma3ImageProcessorKwargs, total=False):
    """The image processors' options, whether the images are latents, and which of the two modalities to use."""

    encoded: bool
    world: bool
    vision: bool


class TheWorldVideosKwargs(ImagesKwargs, total=False):
    """The image processor's options for each frame, which frames are read, the videos' metadata, and the switches."""

    fps: float | int | None
    num_frames: int | None
    max_frames: int | None
    max_video_pixels: int | None
    do_sample_frames: bool | None
    video_metadata: VideoMetadataType | None
    world: bool
    vision: bool


class TheWorldProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: TheWorldImagesKwargs  # type: ignore[misc] # as transformers' own processors narrow them
    videos_kwargs: TheWorldVideosKwargs  # type: ignore[misc]
    _defaults = {}  # type: ignore[misc] # transformers 5.17 reads it


def grouped_by_prompt(images: Any) -> bool:
    """Whether `images` is a list of lists (possibly empty), one for each prompt."""
    entries = images if isinstance(images, list | tuple) else []
    grouped = [isinstance(entry, list | tuple) for entry in entries]
    if any(grouped) and not all(grouped):
        raise ValueError("`images` must be a list of images or a list of images for each prompt, got a mixture.")
    return any(grouped)


def flatten_images(images: Any) -> list:
    """The images of all prompts, in order."""
    if images is None or (isinstance(images, list | tuple) and not images):
        return []
    if grouped_by_prompt(images):
        return [image for prompt_images in images for image in prompt_images]
    flat: Any = make_flat_list_of_images(images)
    return flat


def time_stamp(seconds: float) -> str:
    """The text before a latent frame of a video: its time, to the millisecond."""
    return f"{seconds:.3f}s"


def list_latents(world_latents: torch.Tensor | list) -> list:
    """Latents as a list of [z, h, w], or a list of such lists, one for each prompt; else raises a `ValueError`."""

    def is_list(entry):
        return isinstance(entry, list | tuple) or (isinstance(entry, torch.Tensor) and entry.ndim == 4)

    entries = [list(entry) if is_list(entry) else entry for entry in world_latents]
    flat = [each for entry in entries for each in (entry if isinstance(entry, list) else [entry])]
    found = {str(list(each.shape)) if isinstance(each, torch.Tensor) else type(each).__name__ for each in flat}
    channels = {each.shape[0] if isinstance(each, torch.Tensor) and each.ndim == 3 else None for each in flat}
    if len(channels) > 1 or None in channels:
        raise ValueError(
            f"`world_latents` must be tensors [z, h, w], one for each image, got {', '.join(sorted(found))}. "
            "`get_world_latents` returns them for a batch of images."
        )
    return entries


def check_areas(images: list[Image.Image], **options) -> None:
    """Raises a `ValueError`, before allocating, if an option makes images larger than Pillow's limit."""
    for name in AREAS:
        if options.get(name) is None or Image.MAX_IMAGE_PIXELS is None:
            continue
        sides = get_size_dict(options[name], default_to_square=False, param_name=name)
        limits = read_pixel_limits(sides) if name == "size" else None
        if limits is not None:
            area = limits[1]
        elif "height" in sides:
            area = sides["height"] * sides["width"]
        else:  # the other side follows from the image's aspect ratio
            area = max(sides.values()) ** 2 * max(max(image.size) / min(image.size) for image in images)
        if area > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"`{name}` must give images of at most {Image.MAX_IMAGE_PIXELS:,} pixels, got {options[name]!r:.80}. "
                "Make it smaller, or, if you trust its source, raise `PIL.Image.MAX_IMAGE_PIXELS`."
            )


def check_range(pixel_values: Iterable[torch.Tensor | np.ndarray]) -> None:
    """Raises a `ValueError` unless images are in [-1, 1]; in a server, the model's own check would end the process."""
    for pixels in pixel_values:
        least, greatest = torch.as_tensor(pixels).aminmax()
        if not (least >= -1.001 and greatest <= 1.001):  # the encoder's tolerance; NaN fails too
            raise ValueError(
                f"Images must be scaled to [-1, 1], but these options give {least:.4g} to {greatest:.4g}. Do not "
                f"change {', '.join(f'`{name}`' for name in SCALES)}."
            )


def complete_folder(folder: str | os.PathLike, processor_config: str) -> None:
    """Writes `processor_config` into a model's `folder` unless it has one."""
    path = Path(folder) / PROCESSOR_NAME
    if not path.exists():
        path.write_text(processor_config)


class TheWorldProcessor(ProcessorMixin):
    """
    An image processor and a Gemma tokenizer with TheWorld's tokens.

    Args:
        image_processor: Resizes and scales images, and the frames of videos, to [-1, 1]. Its `size` is a height and a
            width, which all images get; or `{"shortest_edge": a, "longest_edge": b}`, the least and the most pixels of
            an image (areas, as in Qwen's processors), which keeps the shape of each. The PIL backend is always used,
            so that an image gives the same numbers with and without torchvision.
        tokenizer: Gemma's, with `<world>`, `<start_of_world>` and `<end_of_world>`; and `<world_video>`, if the model
            reads videos.
        chat_template: Jinja template for conversations.
        patch_size: Side, in pixels, of the square that one world token covers; `TheWorldConfig.patch_size`.
        image_seq_length: World tokens per image for `token_layout="channel"`, where their number and the image size
            are fixed; None if they depend on the image size.
        compression_ratio: Side, in pixels, of the square that one latent position covers;
            `TheWorldEncoderConfig.spatial_compression_ratio`.
        temporal_compression_ratio: Frames that each latent frame after the first encodes;
            `TheWorldEncoderConfig.temporal_compression_ratio`.
        fps: Frames per second at which videos are sampled.
        max_frames: The most frames that are read from a video. If it has more at `fps`, this many are sampled evenly,
            from its first frame to its last.
        max_video_pixels: The most pixels of a video, frames x height x width, if `size` keeps the shape of images. A
            longer video has smaller frames. The default is 8 frames of 512 x 512 pixels.
        vision_settings: Settings of Gemma 3's image processor, for a model with `TheWorldConfig.vision_config`.
        vision_seq_length: Gemma's own tokens per image or crop; `TheWorldConfig.mm_tokens_per_image`.
        world_first: Whether an image's world tokens come before Gemma's own; `TheWorldConfig.world_first`.
        world: Whether images and videos become world tokens, unless a call says otherwise.
        vision: Whether images and videos become Gemma's own image tokens, if the model has a `vision_config`, unless a
            call says otherwise.

    Raises:
        ValueError: If the tokenizer lacks one of the first three tokens, or, with `vision_settings`, one of Gemma 3's;
            or if `image_seq_length` is set and the image processor's `size` is not a height and a width.
    """

    valid_processor_kwargs = TheWorldProcessorKwargs  # type: ignore[assignment] # a subclass, but of a TypedDict
    image_token = "<world>"
    start_of_world_token = "<start_of_world>"
    end_of_world_token = "<end_of_world>"
    video_token = "<world_video>"
    world_tokens = (image_token, start_of_world_token, end_of_world_token, video_token)

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template=None,
        patch_size: int = 8,
        image_seq_length: int | None = None,
        compression_ratio: int = 8,
        temporal_compression_ratio: int = 4,
        fps: float = 8,
        max_frames: int = 321,
        max_video_pixels: int = 8 * 512 * 512,
        vision_settings: dict | None = None,
        vision_seq_length: int = 256,
        world_first: bool = True,
        world: bool = True,
        vision: bool = True,
    ):
        if image_processor.backend != "pil":
            image_processor = SiglipImageProcessorPil(**image_processor.to_dict())
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in self.world_tokens[:3] if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer has no {', '.join(missing)}. Use the one that convert_weights.py wrote with the model."
            )
        if vision_settings is not None and getattr(tokenizer, "image_token_id", None) is None:
            raise ValueError(
                "`vision_settings` need Gemma 3's tokenizer, which knows `image_token`, `boi_token` and `eoi_token`."
            )
        self.patch_size = patch_size
        self.image_seq_length = image_seq_length
        self.compression_ratio = compression_ratio
        self.temporal_compression_ratio = temporal_compression_ratio
        self.fps = fps
        self.max_frames = max_frames
        self.max_video_pixels = max_video_pixels
        self.vision_settings = vision_settings
        self.vision_seq_length = vision_seq_length
        self.world_first = world_first
        self.world = world
        self.vision = vision
        self.image_token_id = vocabulary[self.image_token]
        self.video_token_id = vocabulary.get(self.video_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._pixel_limits()  # checks the settings
        # Frames are processed as images, because transformers' video processors need torchvision.
        self.video_processor = copy.copy(self.image_processor)
        # vLLM gives the times of frames to processors that sample them.
        self.video_processor.do_sample_frames, self.video_processor.fps = True, fps

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """
        As in transformers.

        Raises:
            ValueError: If the folder has no processor_config.json, for which transformers would use defaults.
        """
        settings, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "patch_size" not in settings:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no {PROCESSOR_NAME}, which says how images become tokens. Load "
                "the processor of the checkpoint that the model was made from, and save it there with "
                "`save_pretrained`."
            )
        return settings, kwargs

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        *,
        world_latents: torch.Tensor | list | None = None,
        **kwargs: Unpack[TheWorldProcessorKwargs],
    ) -> BatchFeature:
        """
        Text, images and videos to the model's inputs.

        A video is sampled at `fps` frames per second, from its first frame to its last; if it has more than
        `max_frames` at that rate, this many are sampled evenly. If their number is not 1 + 4k, the last one is
        repeated, so that no frame is dropped. Before the placeholders of each latent frame comes the time of its last
        frame, as "0.500s". Gemma's tower reads that frame.

        If a prompt already begins with `<bos>`, as chats rendered by `apply_chat_template` do, no second one is added:
        the call returns the same as `apply_chat_template(tokenize=True)`.

        Args:
            images: An image in any form that `read_image` reads, a list of the images of all prompts, or a list of
                images for each prompt.
            text: A prompt or a list of prompts, with one `<world>` for each image and one `<world_video>` for each
                video.
            videos: A video, a list of the videos of all prompts, or a list of videos for each prompt. A video is a
                list of PIL images, of arrays [H, W, 3] or of the paths of pictures, an array [T, H, W, 3], an animated
                PIL image, or the path or URL of a file: an animation that PIL reads (GIF, PNG, WebP, AVIF), or any
                other that PyAV reads, if it is installed. Each frame is read as an image is.
            world_latents: Instead of `images`: latents of images as the model's `get_world_latents` returns them,
                [B, z, h, w]; or a list of [z, h, w], or a list of those for each prompt.
            kwargs: Options of the tokenizer, the image processors and videos. Videos have `fps`, or `num_frames` to
                sample so many evenly; `max_frames`; `max_video_pixels`; `do_sample_frames=False` to read all frames;
                and `video_metadata`, whose `fps` and `frames_indices` give the times of the frames of lists and
                arrays, as returned by `transformers.video_utils.load_video`; without it they are assumed to be at the
                requested rate. `size`
                applies to images and frames that become world tokens; `do_pan_and_scan` and related options apply to
                images that Gemma's tower reads. `world=False` or `vision=False` removes one modality from prompts and
                inputs: with `world=False` they equal those of Gemma 3's processor; with neither, images and videos
                leave nothing. The defaults are the settings `world` and `vision`.

        Returns:
            `input_ids`, `attention_mask`, and `pixel_values` or `world_latents`; `pixel_values_videos`
            [V, T, 3, H, W]; with vision, `vision_pixel_values` and `token_type_ids` as well. If `size` keeps the shape
            of images, or the items differ in size, they are padded with zeros at the end of each axis, and
            `image_sizes` [B, 2] (h, w) or `video_sizes` [V, 3] (T, h, w), in pixels, come with them.

        Raises:
            ImportError: If a video needs PyAV, which is not installed.
            TypeError: If `text` is not a string or list of strings, or an item is not an image or a video.
            ValueError: If the numbers of images and `<world>`, or of videos and `<world_video>`, differ; if images are
                given in two forms, or one cannot be read, or is too narrow for the pixels that `size` allows; if the
                frames of a video differ in size, or it has more tokens than the tokenizer's `model_max_length`; or if
                latents are given to Gemma's tower.
        """
        check_text(text)
        if world_latents is not None:
            if images is not None:
                raise ValueError("Give the images once: as `images` or as `world_latents`.")
            kwargs["images_kwargs"] = {**kwargs.get("images_kwargs", {}), "encoded": True}
            images = list_latents(world_latents)
        text, kwargs = self._keep_one_bos(text, kwargs)
        call = copy.copy(self)
        call.tokenizer = without_shared_settings(self.tokenizer)
        inputs = super(TheWorldProcessor, call).__call__(images=images, text=text, videos=videos, **kwargs)
        if "text_replacement_offsets" in inputs and (images or videos) and not WORLD_INPUTS & set(inputs):
            raise ValueError(NOT_SERVED)
        call._join_vision_inputs(inputs)
        if self.vision_settings is not None and "input_ids" in inputs:
            inputs["token_type_ids"] = self.create_token_type_ids(inputs["input_ids"])
        return inputs

    def get_text_with_replacements(
        self, text: list[str], images_replacements: Any = (), videos_replacements: Any = (), *args
    ) -> tuple[list[str], list[dict]]:
        """As in transformers; also notes in which order Gemma's tower reads images and videos."""
        replacements = {self.image_token: iter(images_replacements), self.video_token: iter(videos_replacements)}
        found = [token for prompt in text for token in re.findall(f"{self.image_token}|{self.video_token}", prompt)]
        begin = getattr(self.tokenizer, "boi_token", None)
        self._vision_order = [(token, next(replacements[token], "").count(begin) if begin else 0) for token in found]
        return super().get_text_with_replacements(text, images_replacements, videos_replacements, *args)

    def _join_vision_inputs(self, inputs: BatchFeature) -> None:
        """Puts the tower's frames of videos among its images, in the order of the prompts."""
        frames = inputs.pop("vision_pixel_values_videos", None)
        if frames is None:
            return
        images = inputs.get("vision_pixel_values")
        if images is not None:
            waiting = {self.image_token: iter(images), self.video_token: iter(frames)}
            order = getattr(self, "_vision_order", [(self.image_token, len(images)), (self.video_token, len(frames))])
            frames = [next(waiting[token]) for token, count in order for _ in range(count)]
            frames = torch.stack(frames) if isinstance(images, torch.Tensor) else frames
        inputs["vision_pixel_values"] = frames

    def _keep_one_bos(self, text: str | list[str] | None, kwargs: dict) -> tuple[str | list[str] | None, dict]:
        """Changes prompts and options so that the tokenizer adds no BOS to a prompt that begins with one."""
        bos, prompts = self.tokenizer.bos_token, [text] if isinstance(text, str) else text or []
        text_kwargs = dict(kwargs.get("text_kwargs") or {})
        adds = kwargs.get("add_special_tokens", text_kwargs.pop("add_special_tokens", True))
        begun = [prompt.startswith(bos) for prompt in prompts if bos is not None]
        if not adds or not any(begun) or not self.tokenizer.num_special_tokens_to_add():
            return text, kwargs
        if not all(begun):  # the option is for the whole batch, so add it to the other prompts here
            text = [bos + prompt.removeprefix(bos) for prompt in prompts]
        return text, {**kwargs, "text_kwargs": text_kwargs, "add_special_tokens": False}

    def apply_chat_template(self, conversation: list[dict] | list[list[dict]], *args, **kwargs) -> Any:
        """
        As in transformers.

        Raises:
            ValueError: If the template rejects the conversation: it is empty, its turns do not alternate, a part of a
                message has no type, a content or text is not a string, or a text contains a placeholder of images or
                videos, which users must not be able to type.
        """
        check_conversation(conversation)
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, videos: Any = None, *args, **kwargs):
        """As in transformers, but converts images of any form to RGB, and opens the files of videos."""
        if images is not None and not kwargs.get("images_kwargs", {}).get("encoded"):
            images = read_images(images, kwargs.get("input_data_format"))
        return super().prepare_inputs_layout(images, text, open_videos(videos), *args, **kwargs)

    def create_token_type_ids(self, input_ids):
        """1 at placeholders of Gemma's own image tokens, as in Gemma 3; 2 at those of world tokens; 0 elsewhere."""
        if isinstance(input_ids, list):
            return [self.create_token_type_ids(torch.tensor(prompt)).tolist() for prompt in input_ids]
        is_world = (input_ids == self.image_token_id) | (input_ids == self.video_token_id)
        return VISION_TYPE * (input_ids == self.tokenizer.image_token_id) + WORLD_TYPE * is_world

    def validate_inputs(self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs):
        """Checks that every prompt has one `<world>` for each of its images, and `<world_video>` for each video."""
        if images is None and text is None and videos is None:
            raise ValueError("Give `text`, `images` or `videos`, got none of them.")
        if audio is not None:
            raise ValueError("TheWorld reads text, images and videos, got `audio`.")
        if videos is not None and self.video_token_id is None:
            raise ValueError(
                f"Got videos, but this model's tokenizer has no `{self.video_token}`. Convert its sources again with "
                "convert_weights.py."
            )
        if text is not None:
            by_prompt = [len(of_prompt) for of_prompt in images] if grouped_by_prompt(images) else None
            self._check_placeholders(text, self.image_token, "image", len(flatten_images(images)), by_prompt)
            self._check_placeholders(
                text, self.video_token, "video", len(flatten_videos(videos)), count_videos_by_prompt(videos)
            )

    def _check_placeholders(self, text: list[str], token: str, kind: str, number: int, by_prompt: list[int] | None):
        """Raises a `ValueError` unless the prompts have one `token` for each image or video."""
        expected = [prompt.count(token) for prompt in text]
        if by_prompt is not None and by_prompt != expected:
            raise ValueError(
                f"Each prompt needs one `{token}` for each of its {kind}s: the prompts have {expected}, the {kind}s "
                f"are {by_prompt}."
            )
        if sum(expected) != number:
            raise ValueError(
                f"The prompts have {sum(expected)} `{token}`, but {number} {kind}(s) are given. Write one `{token}` "
                f"in a prompt for each {kind}."
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that replaces an image's `<world>`: its placeholders between the start and end tokens."""
        if "image_sizes" in image_inputs:
            height, width = image_inputs["image_sizes"][image_idx].tolist()
        elif "pixel_values" in image_inputs:
            height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        else:
            height, width = (self.compression_ratio * side for side in image_inputs["world_latents"].shape[-2:])
        return self._placeholders(self.image_token, height, width)

    def _process_images(
        self, images: Any, encoded: bool = False, world: bool | None = None, vision: bool | None = None, **kwargs
    ) -> tuple[dict, list[str]]:
        """The model's inputs for images, or for latents if they are `encoded`, and the text that replaces each."""
        images = flatten_images(images)
        for name in VISION_ONLY if self.vision_settings is None else ():
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` needs a model with `vision_config`. Remove it.")
        world, vision = self._switches(world, vision)
        nothing: tuple[dict, list[str]] = {}, [""] * len(images)
        if not images:
            return nothing
        process_world = self._process_latents if encoded else self._process_pixels
        world_kwargs = {name: value for name, value in kwargs.items() if name not in VISION_ONLY}
        vision_kwargs = {name: value for name, value in kwargs.items() if name not in WORLD_ONLY}
        blocks = [
            process_world(images, **world_kwargs) if world else nothing,
            self._process_vision(images, encoded, **vision_kwargs) if vision else nothing,
        ]
        return self._join_blocks(blocks)

    def _switches(self, world: bool | None, vision: bool | None) -> tuple[bool, bool]:
        """Whether images and videos become world tokens, and whether they become Gemma's own image tokens."""
        if vision and self.vision_settings is None:
            raise ValueError("`vision=True` needs a model with `vision_config`. Remove it.")
        has_vision = self.vision_settings is not None and self.vision
        return self.world if world is None else world, has_vision if vision is None else vision

    def _join_blocks(self, blocks: Sequence[tuple[dict, list[str]]]) -> tuple[dict, list[str]]:
        """The inputs and texts of the world and of Gemma's tower, which `blocks` gives in this order, together."""
        (inputs, texts), (more_inputs, more_texts) = blocks if self.world_first else reversed(blocks)
        return inputs | more_inputs, [text + more for text, more in zip(texts, more_texts, strict=True)]

    def _resizes(self, do_resize: bool | None = None, **_) -> bool:
        return self.image_processor.do_resize if do_resize is None else do_resize

    def _pixel_limits(self, size: Any = None, **kwargs) -> tuple[int, int] | None:
        """The least and the most pixels of an image, if resizing keeps its shape; None if it does not."""
        if not self._resizes(**kwargs):
            return None
        limits = read_pixel_limits(self.image_processor.size if size is None else size)
        if limits is not None and self.image_seq_length is not None:
            raise ValueError(
                "With `token_layout='channel'` this model reads images of one size, but `size` gives the least and "
                f"the most pixels of an image, {limits[0]:,} and {limits[1]:,}. Give a height and a width."
            )
        return limits

    def _process_pixels(self, images: list[Image.Image], **kwargs) -> tuple[dict, list[str]]:
        """`pixel_values`, with `image_sizes` if they are padded, and the text that replaces each image's `<world>`."""
        check_areas(images, **kwargs)
        limits = self._pixel_limits(**kwargs)
        if limits is None and (self._resizes(**kwargs) or len({image.size for image in images}) == 1):
            inputs, texts = super()._process_images(images, **kwargs)
        else:
            pixels = [self._process_picture(image, limits, **kwargs) for image in images]
            inputs, texts = self._pad_images("pixel_values", pixels, limits is not None)
        if any(name in kwargs for name in SCALES):  # the defaults give the right range
            check_range(inputs["pixel_values"])
        return dict(inputs), texts

    def _process_picture(self, image: Image.Image, limits: tuple[int, int] | None, **kwargs) -> torch.Tensor:
        """The pixels [3, h, w] of an image or frame, resized within `limits`, or without them as the options say."""
        if limits is not None:
            height, width = fit_size(image.height, image.width, self.patch_size, *limits)
            kwargs["size"] = {"height": height, "width": width}
        return self.image_processor(image, **{**kwargs, "return_tensors": "pt"})["pixel_values"][0]

    def _process_latents(self, images: list[torch.Tensor], **kwargs) -> tuple[dict, list[str]]:
        """As `_process_pixels`, with `world_latents` in place of `pixel_values`."""
        keeps_shape = self._pixel_limits(**kwargs) is not None
        return self._pad_images("world_latents", images, keeps_shape, self.compression_ratio)

    def _pad_images(
        self, name: str, images: list[torch.Tensor], with_sizes: bool, pixels: int = 1
    ) -> tuple[dict, list[str]]:
        """`images` [C, h, w] as the input `name`, padded; an entry is a square whose side is `pixels`."""
        padded, sizes = pad_together(images)
        inputs = {name: padded}
        if with_sizes or len({image.shape for image in images}) > 1:
            inputs["image_sizes"] = sizes * pixels
        return inputs, [self.replace_image_token(inputs, number) for number in range(len(images))]

    def _process_vision(self, images: list, encoded: bool, **kwargs) -> tuple[dict, list[str]]:
        """`vision_pixel_values`, and the text for each image and its crops, as in Gemma 3's prompts."""
        if encoded:
            raise ValueError(
                "Gemma 3's tower does not read latents. Give `images`, or `vision=False` with `world_latents`."
            )
        image_processor = Gemma3ImageProcessorPil(**cast(dict, self.vision_settings))  # `_switches` checks it
        gemma = Gemma3Processor(image_processor, self.tokenizer, image_seq_length=self.vision_seq_length)
        inputs = image_processor(images, **kwargs)
        texts = [gemma.replace_image_token(dict(inputs), number) for number in range(len(images))]
        return {"vision_pixel_values": inputs["pixel_values"]}, texts

    def _process_videos(
        self,
        videos: VideoInput,
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        max_video_pixels: int | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: VideoMetadataType | None = None,
        world: bool | None = None,
        vision: bool | None = None,
        **kwargs,
    ) -> tuple[dict, list[str]]:
        """The model's inputs for videos, and the text that replaces each."""
        videos = flatten_videos(videos)
        world, vision = self._switches(world, vision)
        if not videos or not (world or vision):
            return {}, [""] * len(videos)
        if fps is not None and num_frames is not None:
            raise ValueError(f"Give `fps` or `num_frames`, got both: {fps} and {num_frames}.")
        sampling = Sampling(
            fps=self.fps if fps is None else fps,
            num_frames=num_frames,
            max_frames=self.max_frames if max_frames is None else max_frames,
            every_frame=do_sample_frames is False,
        )
        clips = [
            open_clip(video, sampling.fps, known, kwargs.get("input_data_format"))
            for video, known in zip(videos, flatten_metadata(video_metadata, len(videos)), strict=True)
        ]
        times = [pad_frames(sampling.times(clip), self.temporal_compression_ratio) for clip in clips]
        of_latents = [of_clip[:: self.temporal_compression_ratio] for of_clip in times]
        nothing: tuple[dict, list[str]] = {}, [""] * sum(map(len, of_latents))
        blocks = [
            self._process_clips(clips, times, max_video_pixels, **kwargs) if world else nothing,
            self._process_vision_frames(clips, of_latents) if vision else nothing,
        ]
        inputs, texts = self._join_blocks(blocks)
        waiting = iter(texts)
        return inputs, ["".join(time_stamp(time) + next(waiting) for time in of_clip) for of_clip in of_latents]

    def _process_clips(
        self, clips: list[Clip], times: list[torch.Tensor], max_video_pixels: int | None, **kwargs
    ) -> tuple[dict, list[str]]:
        """`pixel_values_videos`, with `video_sizes` if they are padded; and the placeholders of each latent frame."""
        limits = self._pixel_limits(**kwargs)
        pixels = [
            self._read_clip(clip, of_clip, self._frame_limits(len(of_clip), limits, max_video_pixels), **kwargs)
            for clip, of_clip in zip(clips, times, strict=True)
        ]
        ratio = self.temporal_compression_ratio
        texts = [self._placeholders(self.video_token, *video.shape[-2:]) for video in pixels for _ in video[::ratio]]
        with_sizes = limits is not None or len({video.shape for video in pixels}) > 1
        padded, sizes = pad_together(pixels)
        return {"pixel_values_videos": padded} | ({"video_sizes": sizes} if with_sizes else {}), texts

    def _process_vision_frames(self, clips: list[Clip], times: list[torch.Tensor]) -> tuple[dict, list[str]]:
        """The tower's pixels of the frames at `times`, and the text of each frame, that of an image without crops."""
        inputs, texts = [], []
        for clip, of_clip in zip(clips, times, strict=True):
            for frame, count in clip.frames_at(of_clip):
                of_frame, [text] = self._process_vision([frame], encoded=False, do_pan_and_scan=False)
                inputs += [torch.as_tensor(of_frame["vision_pixel_values"][0])] * count
                texts += [text] * count
        return {"vision_pixel_values_videos": torch.stack(inputs)}, texts

    def _frame_limits(
        self, num_frames: int, limits: tuple[int, int] | None, max_video_pixels: int | None
    ) -> tuple[int, int] | None:
        """The least and the most pixels of a frame: `limits`, and all frames together within `max_video_pixels`."""
        if limits is None:
            if max_video_pixels is not None:
                raise ValueError(
                    "`max_video_pixels` needs `size={'shortest_edge': ..., 'longest_edge': ...}`, the least and the "
                    "most pixels of a frame. Give it, or remove `max_video_pixels`."
                )
            return None
        share = (self.max_video_pixels if max_video_pixels is None else max_video_pixels) // num_frames
        if share < self.patch_size**2:
            raise ValueError(
                f"`max_video_pixels` must leave each frame {self.patch_size**2} pixels or more, but {num_frames} "
                f"frames get {share} each. Raise it, or read fewer frames by `max_frames`, `num_frames` or `fps`."
            )
        most = min(limits[1], share)
        return min(limits[0], most), most

    def _read_clip(self, clip: Clip, times: torch.Tensor, limits: tuple[int, int] | None, **kwargs) -> torch.Tensor:
        """The pixels of a video at `times`, [T, 3, h, w]; of its frames, one at a time is held at full size."""
        video, start = None, 0
        for frame, count in clip.frames_at(times):
            pixels = self._process_picture(frame, limits, **kwargs)
            if video is None:
                self._check_length(len(times), *pixels.shape[-2:])
                video = pixels.new_empty(len(times), *pixels.shape)
            if pixels.shape != video.shape[1:]:
                raise ValueError(
                    "The frames of a video must have one size, but it has frames of "
                    f"{list(video.shape[-2:])} and {list(pixels.shape[-2:])} pixels. Give a `size` with height and "
                    "width."
                )
            video[start : start + count] = pixels
            start += count
        return video  # type: ignore[return-value]  # a video has a frame

    def _check_length(self, num_frames: int, height: int, width: int) -> None:
        """Raises if a video alone has more tokens than the tokenizer admits, where it says how many those are."""
        tokens, limit = self._num_world_tokens(num_frames, height, width), self.tokenizer.model_max_length
        if tokens > limit:
            raise ValueError(
                f"A video of {num_frames} frames has {tokens} world tokens, but the tokenizer's `model_max_length` is "
                f"{limit}. Read fewer frames by `max_frames`, `num_frames` or `fps`."
            )

    def _placeholders(self, token: str, height: int, width: int) -> str:
        """One `token` per world token of `height` x `width` pixels, between the start and end tokens."""
        return self.start_of_world_token + token * self._num_world_tokens(1, height, width) + self.end_of_world_token

    def _num_world_tokens(self, num_frames: int, height: int, width: int) -> int:
        """The number of world tokens of a video, or of an image (one frame), of this size after resizing."""
        latent_frames = (num_frames - 1) // self.temporal_compression_ratio + 1
        if self.image_seq_length is not None:
            fixed = (self.image_processor.size["height"], self.image_processor.size["width"])
            if (height, width) != fixed:
                raise ValueError(
                    f"With `token_layout='channel'` this model reads images of {fixed[0]}x{fixed[1]} pixels, got "
                    f"{height}x{width}. Do not change `size` and `do_resize`."
                )
            return latent_frames * self.image_seq_length
        if min(height, width) < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"Image sides must be positive multiples of {self.patch_size} pixels, got {height}x{width}. Pass "
                "multiples as `size={'height': ..., 'width': ...}`."
            )
        return latent_frames * (height // self.patch_size) * (width // self.patch_size)

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        video_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs,
    ) -> MultiModalData:
        """
        Counts the placeholders of images and videos of the given sizes, for vLLM's memory planning.

        Args:
            image_sizes: (height, width) of each image in pixels, before resizing.
            video_sizes: (frames, height, width) of each video. The frames are at the rate at which videos are sampled.
            kwargs: Options of the processor, such as `size`, `num_frames` and `max_frames`.

        Returns:
            `num_image_tokens` and `num_image_patches`, one entry per image; `num_video_tokens`, one per video.
        """
        if not self.world:
            raise ValueError(NOT_SERVED)
        data = MultiModalData()
        if image_sizes is not None:
            limits = self._pixel_limits(**kwargs)
            data.num_image_tokens = [
                self._num_world_tokens(1, *self._resized(height, width, limits, **kwargs))
                for height, width in image_sizes
            ]
            data.num_image_patches = [1] * len(image_sizes)
        if video_sizes is not None:
            data.num_video_tokens = [
                self._num_video_tokens(num_frames, height, width, **kwargs)
                for num_frames, height, width in video_sizes
            ]
        return data

    def _num_video_tokens(
        self,
        num_given: int,
        height: int,
        width: int,
        num_frames: int | None = None,
        max_frames: int | None = None,
        max_video_pixels: int | None = None,
        do_sample_frames: bool | None = None,
        **kwargs,
    ) -> int:
        """The number of world tokens of a video of `num_given` frames at the sampling rate, before resizing."""
        read = num_frames or min(num_given, self.max_frames if max_frames is None else max_frames)
        read = num_given if do_sample_frames is False else read
        read += -(read - 1) % self.temporal_compression_ratio
        limits = self._frame_limits(read, self._pixel_limits(**kwargs), max_video_pixels)
        return self._num_world_tokens(read, *self._resized(height, width, limits, **kwargs))

    def _resized(
        self, height: int, width: int, limits: tuple[int, int] | None, size: dict | None = None, **kwargs
    ) -> tuple[int, int]:
        """Height and width of an image after resizing."""
        if not self._resizes(**kwargs):
            return height, width
        if limits is not None:
            return fit_size(height, width, self.patch_size, *limits)
        size = size or self.image_processor.size
        return size["height"], size["width"]


TheWorldProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["TheWorldProcessor"]
