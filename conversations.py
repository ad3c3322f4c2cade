# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Conversations about images to train on: loaded and checked, and made into batches whose labels are the answers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List, load_dataset
from transformers import ProcessorMixin
from trl import prepare_multimodal_messages

from theworld.checks_theworld import IGNORED


def load_conversations(name: str, split: str) -> Dataset:
    """
    Conversations in TRL's vision format: `messages`, and `images`, a list of as many as the messages have places.

    Args:
        name: A JSONL file, a folder that `datasets` can load, or a dataset of the Hub. Images that are paths are
            relative to the file or the folder.
        split: Which split of it.

    Raises:
        ValueError: If a column is missing, an image file is missing, or a conversation cannot be trained on.
    """
    path = Path(name)
    if path.is_file():
        dataset, folder = load_dataset("json", data_files={split: str(path)}, split=split), path.parent
    else:
        dataset, folder = load_dataset(name, split=split), path
    missing = {"messages", "images"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name} has the columns {', '.join(dataset.column_names)}, but no {' and no '.join(sorted(missing))}. "
            "A row needs `messages`, a list of {role, content}, and `images`, a list of images; rename the columns."
        )
    dataset = dataset.select_columns(["messages", "images"])
    if dataset.features["images"] != List(Image()):
        dataset = dataset.map(lambda row: {"images": [existing(folder, image) for image in row["images"]]})
        dataset = dataset.cast_column("images", List(Image()))
    check_conversations(dataset["messages"], (len(images) for images in dataset.with_format("arrow")["images"]))
    return dataset


def existing(folder: Path, image: str) -> str:
    """The path of an image in a dataset's folder; a dataset is not to read what lies elsewhere, by links neither."""
    path = (folder / image).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"The image {image} is outside the dataset's folder {folder}. Put it there.")
    if not path.is_file():
        raise ValueError(f"The image {path} does not exist. Image paths are relative to the dataset's file or folder.")
    return str(path)


def check_conversations(conversations: Iterable[list[dict]], image_counts: Iterable[int]) -> None:
    """Raises a `ValueError` for the first conversation that does not fit its images, or does not end in an answer."""
    for number, (messages, count) in enumerate(zip(conversations, image_counts, strict=True)):
        try:
            prepare_multimodal_messages(messages, images=[None] * count)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Row {number} of the dataset cannot be read: {error}") from error
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"Row {number} of the dataset ends without an answer: the last of its {len(messages)} message(s) must "
                "be the assistant's. Complete it, or leave it out."
            )


@dataclass
class ConversationCollator:
    """
    Makes batches of conversations; what the assistant says counts in the loss, and nothing else does.

    TRL's own collator does the same for pixels from transformers 5.18 on; this one also reads latents, and masks
    right on 5.17.

    Args:
        processor: The model's.
        max_length: Tokens that a conversation may have, world tokens included; None for no limit.

    Raises:
        ValueError: If the processor is that of a checkpoint with Gemma 3's own vision.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __post_init__(self):
        if getattr(self.processor, "vision_settings", None) is not None:
            raise ValueError(
                "Conversations become labels for world tokens alone, and this checkpoint keeps Gemma 3's own vision. "
                "Train one that was converted without --vision."
            )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: Each with `messages`, and `images` or `world_latents`: [z, h, w] for each image.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 [batch, S], padded on the right; and `pixel_values` or
            `world_latents`, of all images in their order.

        Raises:
            ValueError: If a conversation is longer than `max_length`.
        """
        processor_kwargs = {"padding": True, "padding_side": "right", "add_special_tokens": False}
        if "world_latents" in rows[0]:
            images = [[None] * len(row["world_latents"]) for row in rows]
            processor_kwargs["world_latents"] = [row["world_latents"] for row in rows]
        else:
            images = [row["images"] for row in rows]
        conversations = [
            prepare_multimodal_messages(row["messages"], images=of_row)
            for row, of_row in zip(rows, images, strict=True)
        ]
        batch = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=processor_kwargs
        )
        length = batch["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"A conversation has {length} tokens, more than max_length={self.max_length}. Cutting it would lose "
                "world tokens or answers: raise max_length, or leave such conversations out."
            )
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for row, messages in enumerate(conversations):
            self.label(messages, batch["input_ids"][row], batch["labels"][row])
        return dict(batch)

    def label(self, messages: list[dict], input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Writes the ids of what the assistant says into `labels` [S], at their places in `input_ids` [S]."""
        tokenizer = self.processor.tokenizer
        # The tokenizer knows no images, so that its text has one `<world>` for each. The other tokens are the same.
        unexpanded = tokenizer.apply_chat_template(
            messages,
            chat_template=self.processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        if self.processor.video_token_id in unexpanded["input_ids"]:
            raise ValueError("Conversations become labels about images alone, and this one has a video. Leave it out.")
        of_images = torch.tensor(tokenizer.convert_tokens_to_ids(list(self.processor.world_tokens)))
        said = torch.as_tensor(unexpanded["assistant_masks"])[0].bool()
        said = said[~torch.isin(unexpanded["input_ids"][0], of_images)]
        places = torch.isin(input_ids, of_images, invert=True).nonzero().flatten()[: len(said)][said]
        labels[places] = input_ids[places]
