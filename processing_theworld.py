# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Text and images to TheWorld's inputs: one `<world>` in a prompt becomes the places of an image's world tokens."""

# First: it names a transformers that lacks what follows.
from .checks_theworld import check_text  # isort: skip

import torch
from jinja2 import TemplateError
from transformers import BatchFeature, ProcessorMixin, SiglipImageProcessorPil
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs

from .images_theworld import read_images


class TheWorldImagesKwargs(ImagesKwargs, total=False):
    """The image processor's, and whether the images are latents already."""

    encoded: bool


class TheWorldProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: TheWorldImagesKwargs
    _defaults = {}  # transformers 5.17 reads it


def grouped_by_prompt(images: ImageInput | None) -> bool:
    """Whether `images` is a list of lists, one (maybe empty) for each prompt."""
    entries = images if isinstance(images, list | tuple) else []
    grouped = [isinstance(entry, list | tuple) for entry in entries]
    if any(grouped) and not all(grouped):
        raise ValueError("`images` must be a list of images or a list of images for each prompt, got a mixture.")
    return any(grouped)


def flatten_images(images: ImageInput | None) -> list:
    """The images of all prompts in their order."""
    if images is None or (isinstance(images, list | tuple) and not images):
        return []
    if grouped_by_prompt(images):
        return [image for prompt_images in images for image in prompt_images]
    return make_flat_list_of_images(images)


def list_latents(world_latents: torch.Tensor | list) -> list:
    """Latents as a list of [z, h, w], or of a list of those for each prompt; raises a `ValueError` for others."""

    def is_list(entry):
        return isinstance(entry, list | tuple) or (isinstance(entry, torch.Tensor) and entry.ndim == 4)

    entries = [list(entry) if is_list(entry) else entry for entry in world_latents]
    flat = [each for entry in entries for each in (entry if isinstance(entry, list) else [entry])]
    found = {str(list(each.shape)) if isinstance(each, torch.Tensor) else type(each).__name__ for each in flat}
    if len(found) > 1 or not all(isinstance(each, torch.Tensor) and each.ndim == 3 for each in flat):
        raise ValueError(
            f"`world_latents` must be tensors [z, h, w], one for each image, all of one size, got "
            f"{', '.join(sorted(found))}. `get_world_latents` returns them for a batch of images."
        )
    return entries


class TheWorldProcessor(ProcessorMixin):
    """
    An image processor and a Gemma tokenizer with TheWorld's three tokens, in one call.

    Args:
        image_processor: Resizes and scales images to [-1, 1]. It always works on PIL's side, so that an image gives
            the same numbers whether torchvision is installed or not.
        tokenizer: Gemma's, with `<world>`, `<start_of_world>` and `<end_of_world>`.
        chat_template: Jinja template of a conversation.
        patch_size: Pixels a side of the square that one world token stands for; `TheWorldConfig.patch_size`.
        image_seq_length: World tokens an image for `token_layout="channel"`, where their number and the image's size
            are fixed; None where they follow from the size.
        compression_ratio: Pixels a side of the square that one latent position stands for;
            `TheWorldEncoderConfig.spatial_compression_ratio`.

    Raises:
        ValueError: If the tokenizer lacks one of the three tokens.
    """

    valid_processor_kwargs = TheWorldProcessorKwargs
    image_token = "<world>"
    start_of_world_token = "<start_of_world>"
    end_of_world_token = "<end_of_world>"
    world_tokens = (image_token, start_of_world_token, end_of_world_token)

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template=None,
        patch_size: int = 8,
        image_seq_length: int | None = None,
        compression_ratio: int = 8,
    ):
        if image_processor.backend != "pil":
            image_processor = SiglipImageProcessorPil(**image_processor.to_dict())
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in self.world_tokens if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer has no {', '.join(missing)}. Use the one that convert_weights.py wrote with the model."
            )
        self.patch_size = patch_size
        self.image_seq_length = image_seq_length
        self.compression_ratio = compression_ratio
        self.image_token_id = vocabulary[self.image_token]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        *,
        world_latents: torch.Tensor | list | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Text and images to the model's inputs.

        Args:
            images: An image in any form that `read_image` reads, a list of the images of all prompts, or a list of
                images for each prompt.
            text: A prompt or several, with one `<world>` for each image.
            world_latents: In place of `images`: latents of images, as the model's `get_world_latents` returns them,
                [B, z, h, w]; or a list of [z, h, w], or a list of those for each prompt.
            kwargs: The tokenizer's and the image processor's.

        Returns:
            `input_ids`, `attention_mask`, and `pixel_values` or `world_latents`.

        Raises:
            TypeError, ValueError: If images and `<world>` differ in number, images come twice, or one cannot be read;
                or if `text` is none.
        """
        check_text(text)
        if world_latents is None:
            return super().__call__(images=images, text=text, **kwargs)
        if images is not None:
            raise ValueError("Give the images once: as `images` or as `world_latents`.")
        images_kwargs = {**kwargs.pop("images_kwargs", {}), "encoded": True}
        return super().__call__(images=list_latents(world_latents), text=text, images_kwargs=images_kwargs, **kwargs)

    def apply_chat_template(self, conversation: list[dict] | list[list[dict]], *args, **kwargs):
        """
        As transformers' own.

        Raises:
            ValueError: If the template does not take the conversation: its turns do not alternate, or a text in it
                holds one of the three tokens, which nobody who types in a chat is to write.
        """
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def prepare_inputs_layout(self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs):
        """As transformers' own, with the images as RGB, however they came."""
        if images is not None and not kwargs.get("images_kwargs", {}).get("encoded"):
            images = read_images(images, kwargs.get("input_data_format"))
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def validate_inputs(self, images: ImageInput | None = None, text: list[str] | None = None, **kwargs):
        """Checks that every prompt has one `<world>` for each of its images; raises a `ValueError` where not."""
        flat_images = flatten_images(images)
        if text is not None:
            expected = [prompt.count(self.image_token) for prompt in text]
            if grouped_by_prompt(images):
                given = [len(prompt_images) for prompt_images in images]
                if given != expected:
                    raise ValueError(
                        f"Each prompt needs one `{self.image_token}` for each of its images: the prompts have "
                        f"{expected}, the images are {given}."
                    )
            elif sum(expected) != len(flat_images):
                raise ValueError(
                    f"The prompts have {sum(expected)} `{self.image_token}`, but {len(flat_images)} image(s) came. "
                    f"Write one `{self.image_token}` in a prompt where each image belongs."
                )
        super().validate_inputs(images=flat_images or None, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for one image: its world tokens' places between the start and end tokens."""
        if "pixel_values" in image_inputs:
            height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        else:
            height, width = (self.compression_ratio * side for side in image_inputs["world_latents"].shape[-2:])
        num_tokens = self._num_world_tokens(height, width)
        return self.start_of_world_token + self.image_token * num_tokens + self.end_of_world_token

    def _process_images(self, images: ImageInput, encoded: bool = False, **kwargs) -> tuple[dict, list[str]]:
        """The model's inputs for images, or for latents if they are `encoded`, and the text that stands for each."""
        images = flatten_images(images)
        if encoded and images:
            inputs = {"world_latents": torch.stack(images)}
            return inputs, [self.replace_image_token(inputs, number) for number in range(len(images))]
        return super()._process_images(images, **kwargs) if images else ({}, [])

    def _num_world_tokens(self, height: int, width: int) -> int:
        """World tokens of an image of `height` x `width` pixels as the model gets it."""
        if self.image_seq_length is not None:
            fixed = (self.image_processor.size["height"], self.image_processor.size["width"])
            if (height, width) != fixed:
                raise ValueError(
                    f"This model has `token_layout='channel'`, built for images of {fixed[0]}x{fixed[1]} pixels, got "
                    f"{height}x{width}. Leave `size` and `do_resize` as they are."
                )
            return self.image_seq_length
        if min(height, width) < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"Image sides must be positive multiples of {self.patch_size} pixels, got {height}x{width}. Pass such "
                "a `size={'height': ..., 'width': ...}`."
            )
        return (height // self.patch_size) * (width // self.patch_size)

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """
        Counts the `<world>` places that images of the given sizes take; what vLLM plans with.

        Args:
            image_sizes: (height, width) of each image in pixels, before resizing.
            kwargs: The image processor's, such as `size`.

        Returns:
            `num_image_tokens` and `num_image_patches`, one entry an image.
        """
        if image_sizes is None:
            return MultiModalData()
        if kwargs.get("do_resize", self.image_processor.do_resize):
            size = kwargs.get("size") or self.image_processor.size
            image_sizes = [(size["height"], size["width"])] * len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self._num_world_tokens(height, width) for height, width in image_sizes],
            num_image_patches=[1] * len(image_sizes),
        )


TheWorldProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["TheWorldProcessor"]
