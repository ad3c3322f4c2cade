# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
The modalities: what may come beside text, where its tokens go in a prompt, and how attention reads their blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import Cache
from transformers.masking_utils import and_masks, sliding_window_overlay
from transformers.utils import torch_compilable_check
from transformers.utils.generic import is_flash_attention_requested

from .configuration_theworld import TheWorldConfig
from .versions_theworld import create_causal_mask, create_sliding_window_causal_mask


# `token_type_ids`, beside 0 for text: of blocks that Gemma 3 reads both ways, and of those that are read as
# `config.world_attention` says.
VISION_TYPE, WORLD_TYPE = 1, 2


@dataclass(frozen=True)
class Modality:
    """
    What may come beside text.

    Args:
        name: Its key in `mm_encoder_outputs`.
        item: What brings it: an image or a video.
        ndim: Dimensions of what the arguments bring.
        kind: What messages call its tokens.
        token: Its places in a prompt.
        type_id: Its `token_type_ids`.
        contiguous: Whether the places of an image stand side by side; between a video's are times.
        inputs: Arguments of `forward` that bring it, each with the method of TheWorldModel that makes tokens of it.
    """

    name: str
    item: str
    ndim: int
    kind: str
    token: str
    type_id: int
    contiguous: bool
    inputs: dict[str, str]

    def token_id(self, config: TheWorldConfig) -> int | None:
        """The id of its places; None if a model with this config has none."""
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
        inputs={"pixel_values": "get_image_features", "world_latents": "get_latent_features"},
    ),
    Modality(
        "vision",
        item="image",
        ndim=4,
        kind="Gemma's own",
        token="<image_soft_token>",
        type_id=VISION_TYPE,
        contiguous=True,
        inputs={"vision_pixel_values": "get_vision_features"},
    ),
    Modality(
        "video",
        item="video",
        ndim=5,
        kind="world",
        token="<world_video>",
        type_id=WORLD_TYPE,
        contiguous=False,
        inputs={"pixel_values_videos": "get_video_features", "world_latents_videos": "get_latent_features"},
    ),
)


def check_placeholders_contiguous(mask: torch.Tensor, tokens_per_item: int, modality: Modality) -> None:
    """
    Checks that each image or video has its places in one prompt, so that none reaches into another prompt.

    Args:
        mask: [batch, S], True at the modality's places; its tokens fill them in reading order.
        tokens_per_item: Tokens an image or a video.

    Raises:
        ValueError: If the places of one are in two prompts, or apart where they are to be side by side.
    """
    number_in_item = (mask.flatten().cumsum(0).view(mask.shape) - 1) % tokens_per_item
    goes_on = F.pad(mask[:, :-1], (1, 0)) if modality.contiguous else mask.cumsum(1) > 1
    torch_compilable_check(
        ~(mask & (number_in_item > 0) & ~goes_on).any(),
        lambda: (
            f"Each {modality.item}'s {tokens_per_item} `{modality.token}` places must be in one prompt, but the prompts "
            f"have {mask.sum(-1).tolist()}{', not all of one side by side' if modality.contiguous else ''}. "
            "TheWorldProcessor makes them of one `<world>` an image and one `<world_video>` a video."
        ),
    )


def create_block_masks(
    config: TheWorldConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    cache: Cache | None,
    position_ids: torch.LongTensor | None,
    token_type_ids: torch.LongTensor | None,
) -> torch.Tensor | dict | None:
    """
    Gemma's attention masks: causal between blocks and bidirectional inside an image's block, as in Gemma 3.

    Args:
        inputs_embeds: [batch, S, ..]; only its shape, dtype and device count.
        token_type_ids: [batch, S or more], 1 in blocks of Gemma's own image tokens, 2 in blocks of world tokens, 0
            elsewhere; the last S count.

    Returns:
        What Gemma takes as `attention_mask`: masks by kind of layer, or one for all; or `attention_mask` as it came,
        if no block is read both ways.

    Raises:
        ValueError: If the last token is inside a block that is read both ways, or flash attention, which has no masks,
            would read one.
    """
    if token_type_ids is None or not config.has_bidirectional_blocks or isinstance(attention_mask, dict):
        return attention_mask
    bidirectional = token_type_ids == VISION_TYPE
    if config.world_attention == "bidirectional":
        bidirectional |= token_type_ids == WORLD_TYPE
    if is_flash_attention_requested(config.text_config):
        torch_compilable_check(
            ~bidirectional.any(),
            "Flash attention reads no image's block both ways, which this model does. Load it with "
            '`attn_implementation="sdpa"`.',
        )
    torch_compilable_check(
        ~bidirectional[:, -1].any(),  # a block's end token follows it
        "The prompt, or the chunk of it, ends inside an image's block, whose tokens see each other both ways. Give "
        "the whole block at once: with a greater `prefill_chunk_size`, or none.",
    )
    # Positions that the cache holds are in the past, which every token sees anyway.
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
    # A block longer than the window is seen as far back as the window reaches.
    in_window = and_masks(sliding_window_overlay(config.text_config.sliding_window), same_block)
    sliding_mask = create_sliding_window_causal_mask(**arguments, or_mask_function=in_window)
    return {"full_attention": full_mask, "sliding_attention": sliding_mask}


def same_block_mask_function(in_block: torch.BoolTensor) -> Callable:
    """
    A mask function as `transformers.masking_utils` composes them: True where two positions are in the same block.

    Args:
        in_block: [batch, S], True inside blocks. Positions that follow one another are in one block. Later positions,
            which a static cache has, are in none.
    """
    length = in_block.shape[1]
    starts = in_block & ~F.pad(in_block, (1, 0))[:, :-1]
    block_ids = F.pad(torch.where(in_block, starts.cumsum(1), 0), (0, 1))  # 0: in no block

    def same_block(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        block = block_ids[batch, query.clamp(max=length)]
        return (block == block_ids[batch, key.clamp(max=length)]) & (block > 0)

    return same_block
