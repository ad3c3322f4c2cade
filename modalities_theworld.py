# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""The modalities, which are the inputs besides text; their placeholders in prompts; and the masks of their blocks."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Cache
from transformers.masking_utils import and_masks, sliding_window_overlay
from transformers.utils import torch_compilable_check
from transformers.utils.generic import is_flash_attention_requested

from .configuration_theworld import TheWorldConfig
from .versions_theworld import create_causal_mask, create_sliding_window_causal_mask


# Values of `token_type_ids` besides 0 for text. Blocks of Gemma's own image tokens are bidirectional, as in Gemma 3;
# blocks of world tokens are as `config.world_attention` says.
VISION_TYPE, WORLD_TYPE = 1, 2

EXPANDED_BY_PROCESSOR = (
    "TheWorldProcessor expands one `<world>` per image and one `<world_video>` per video to as many as are needed."
)


@dataclass(frozen=True)
class Modality:
    """
    One kind of non-text input.

    Args:
        name: Its key in `mm_encoder_outputs`.
        item: What one of its inputs is: an image or a video.
        ndim: Dimensions of its input tensors.
        kind: The name of its tokens in error messages.
        token: Its placeholder token.
        type_id: Its value in `token_type_ids`.
        contiguous: Whether the placeholders of an item follow one another. A video has timestamps between them.
        inputs: The arguments of `forward` that give it.
        sizes: The argument of `forward` with the sizes of its items, if they can be padded.
    """

    name: str
    item: str
    ndim: int
    kind: str
    token: str
    type_id: int
    contiguous: bool
    inputs: tuple[str, ...]
    sizes: str | None = None

    def token_id(self, config: TheWorldConfig) -> int | None:
        """The id of its placeholder token; None if a model with this config has none."""
        return getattr(config, f"{self.name}_token_id")


MODALITIES = (
    Modality(
        "image",
        item="image",
        ndim=4,
        kind="world",
        token="<world>",
        type_id=WORLD_TYPE,
        contiguous=True,
        inputs=("pixel_values", "world_latents"),
        sizes="image_sizes",
    ),
    Modality(
        "vision",
        item="image",
        ndim=4,
        kind="Gemma's own",
        token="<image_soft_token>",
        type_id=VISION_TYPE,
        contiguous=True,
        inputs=("vision_pixel_values",),
    ),
    Modality(
        "video",
        item="video",
        ndim=5,
        kind="world",
        token="<world_video>",
        type_id=WORLD_TYPE,
        contiguous=False,
        inputs=("pixel_values_videos", "world_latents_videos"),
        sizes="video_sizes",
    ),
)


def check_modality_inputs(encoded: Collection[str], **inputs: torch.Tensor | list | None) -> None:
    """
    Checks which inputs are given, before any is encoded.

    Args:
        encoded: Names of the modalities that are given encoded, in `mm_encoder_outputs`.
        inputs: The arguments of `forward` that `MODALITIES` lists.

    Raises:
        ValueError: If a modality is given in more than one form, images are passed as videos or the reverse, or sizes
            are given without what they belong to.
    """
    for modality in MODALITIES:
        given: dict[str, Any] = {name: inputs[name] for name in modality.inputs if inputs[name] is not None}
        if len(given) + (modality.name in encoded) > 1:
            forms = " or as ".join(f"`{form}`" for form in (*modality.inputs, "mm_encoder_outputs"))
            raise ValueError(f"Give the {modality.item}s once: as {forms}.")
        if modality.sizes is not None and inputs[modality.sizes] is not None and not given:
            owners = " or ".join(f"`{name}`" for name in modality.inputs)
            raise ValueError(f"`{modality.sizes}` belongs to {owners}, and neither is given. Remove it.")
        other_ndims = {other.ndim for other in MODALITIES} - {modality.ndim}
        for name, value in given.items():  # the encoder checks the rest of the shape
            if getattr(value, "ndim", None) in other_ndims:
                raise ValueError(
                    f"`{name}` must have {modality.ndim} dimensions, got {list(value.shape)}. "
                    "TheWorldProcessor returns 4 dimensions for `images` and 5 for `videos`."
                )


def lengths_of(features: torch.Tensor | Sequence[torch.Tensor]) -> list[int]:
    """The number of tokens of each item, of features [items, N, D] or of one [N_i, D] for each item."""
    if isinstance(features, torch.Tensor):
        return [features.shape[1]] * features.shape[0]
    return [len(of_item) for of_item in features]


def shown_lengths(lengths: list[int]) -> str:
    """Numbers of tokens as error messages show them."""
    return " or ".join(map(str, sorted(set(lengths))))


def check_placeholders_contiguous(mask: torch.Tensor, lengths: list[int], modality: Modality) -> None:
    """
    Checks that the placeholders of each image or video are in one prompt, and contiguous if the modality is.

    Args:
        mask: [batch, S], True at the modality's placeholders; tokens fill them in reading order.
        lengths: The number of tokens of each image or video, in order.

    Raises:
        ValueError: If an item's placeholders span two prompts, or are not contiguous.
    """
    number = mask.flatten().cumsum(0).view(mask.shape) - 1
    begins = torch.isin(number, torch.tensor([0, *accumulate(lengths[:-1])], device=mask.device))
    continues = F.pad(mask[:, :-1], (1, 0)) if modality.contiguous else mask.cumsum(1) > 1
    torch_compilable_check(
        ~(mask & ~begins & ~continues).any(),
        lambda: (
            f"Each {modality.item}'s {shown_lengths(lengths)} `{modality.token}` placeholders must be in one prompt"
            f"{' and contiguous' if modality.contiguous else ''}, but the prompts have {mask.sum(-1).tolist()}. "
            f"{EXPANDED_BY_PROCESSOR}"
        ),
    )


def create_block_masks(
    config: TheWorldConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    cache: Cache | None,
    position_ids: torch.LongTensor | None,
    token_type_ids: torch.Tensor | None,
) -> torch.Tensor | dict | None:
    """
    Gemma's attention masks: causal between blocks and bidirectional inside an image's block, as in Gemma 3.

    Args:
        inputs_embeds: [batch, S, ..]; only its shape, dtype and device are used.
        token_type_ids: [batch, S or more], 1 in blocks of Gemma's own image tokens, 2 in blocks of world tokens, 0
            elsewhere; the last S are used.

    Returns:
        Gemma's `attention_mask`: masks by layer type, or one for all layers; or `attention_mask` unchanged, if the
        model has no bidirectional blocks.

    Raises:
        ValueError: If the last token is inside a bidirectional block, or a bidirectional block meets flash attention,
            which takes no masks.
    """
    if token_type_ids is None or not config.has_bidirectional_blocks or isinstance(attention_mask, dict):
        return attention_mask
    bidirectional = token_type_ids == VISION_TYPE
    if config.world_attention == "bidirectional":
        bidirectional |= token_type_ids == WORLD_TYPE
    if is_flash_attention_requested(config.text_config):
        torch_compilable_check(
            ~bidirectional.any(),
            "FlashAttention does not support the bidirectional image blocks of this model. Load it with "
            '`attn_implementation="sdpa"`.',
        )
    torch_compilable_check(
        ~bidirectional[:, -1].any(),  # a block's end token follows it
        "The prompt, or a chunk of it, ends inside a bidirectional image block. Pass the whole block at once: "
        "increase or remove `prefill_chunk_size`.",
    )
    # Positions in the cache are in the past, which every token sees anyway.
    past = int(cache.get_seq_length()) if cache is not None else 0
    same_block = same_block_mask_function(F.pad(bidirectional[:, -inputs_embeds.shape[1] :], (past, 0)))
    arguments = {
        "config": config.text_config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cache": cache,
        "position_ids": position_ids,
    }
    full_mask = create_causal_mask(**arguments, or_mask_function=same_block)
    if not hasattr(config.text_config, "layer_types"):
        return full_mask
    # If a block is longer than the window, tokens see as far back as the window reaches.
    in_window = and_masks(sliding_window_overlay(config.text_config.sliding_window), same_block)
    sliding_mask = create_sliding_window_causal_mask(**arguments, or_mask_function=in_window)
    return {"full_attention": full_mask, "sliding_attention": sliding_mask}


def same_block_mask_function(in_block: torch.Tensor) -> Callable:
    """
    A mask function for `transformers.masking_utils`: True where two positions are in the same block.

    Args:
        in_block: [batch, S], True inside blocks. Adjacent positions are in the same block. Positions after S, which a
            static cache has, are in no block.
    """
    length = in_block.shape[1]
    starts = in_block & ~F.pad(in_block, (1, 0))[:, :-1]
    block_ids = F.pad(torch.where(in_block, starts.cumsum(1), 0), (0, 1))  # 0: in no block

    def same_block(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        block = block_ids[batch, query.clamp(max=length)]
        return (block == block_ids[batch, key.clamp(max=length)]) & (block > 0)

    return same_block
