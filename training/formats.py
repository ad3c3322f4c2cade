# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Reads other formats of conversations as the columns `messages` and `images`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from jinja2 import TemplateError


# LLaVA's names of roles, and its placeholder of an image.
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
PLACEHOLDER = "<image>"
PART = {"type": Value("string"), "text": Value("string")}
MESSAGES = List({"role": Value("string"), "content": List(PART)})


@contextmanager
def row_errors(number: int) -> Iterator[None]:
    """Adds the row's number to errors."""
    try:
        yield
    except (ValueError, TypeError, OSError, TemplateError) as error:
        raise ValueError(f"Row {number} of the dataset cannot be trained on: {error}") from error


def read_formats(dataset: Dataset) -> Dataset:
    """
    LLaVA's column `conversations` as `messages`, and a column `image` as `images`; other columns stay.

    Raises:
        ValueError: If a turn of a conversation has another format; the message has the row's number.
    """
    columns = set(dataset.column_names)
    if "messages" not in columns and "conversations" in columns:
        features = Features({name: dataset.features[name] for name in columns - {"conversations"}})
        features["messages"] = MESSAGES
        dataset = dataset.map(
            read_conversation, with_indices=True, remove_columns=["conversations"], features=features
        )
    if "images" not in columns and "image" in columns:
        dataset = read_image_column(dataset)
    return dataset


def read_conversation(row: dict, number: int) -> dict:
    """The `messages` of LLaVA's turns, with an image where `<image>` is in a text."""
    with row_errors(number):
        return {"messages": [read_turn(turn, place) for place, turn in enumerate(row["conversations"], start=1)]}


def read_turn(turn: dict, number: int) -> dict:
    """A message of one of LLaVA's turns."""
    role, value = turn.get("from"), turn.get("value")
    if role not in ROLES or not isinstance(value, str):
        raise ValueError(
            f"Turn {number} must have `from`, one of {', '.join(ROLES)}, and a text as `value`, got {turn!r:.80}."
        )
    pieces = filter(None, (piece.strip() for piece in re.split(f"({PLACEHOLDER})", value)))
    parts = [{"type": "image"} if piece == PLACEHOLDER else {"type": "text", "text": piece} for piece in pieces]
    return {"role": ROLES[role], "content": parts or [{"type": "text", "text": ""}]}


def read_image_column(dataset: Dataset) -> Dataset:
    """The column `image`, an image, a list of them or null, as lists in `images`."""
    holds_images = isinstance(dataset.features["image"], Image)
    if holds_images:
        dataset = dataset.cast_column("image", Image(decode=False))
    features = Features({name: feature for name, feature in dataset.features.items() if name != "image"})
    features["images"] = List(Image(decode=False) if holds_images else Value("string"))
    dataset = dataset.map(
        lambda row: {"images": list_of_images(row["image"])}, remove_columns=["image"], features=features
    )
    return dataset.cast_column("images", List(Image())) if holds_images else dataset


def list_of_images(image: Any) -> list:
    if image is None:
        return []
    return image if isinstance(image, list) else [image]
