# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Loads conversations about images, checks them row by row, and makes batches with labels."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Image, Json, List, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from PIL import UnidentifiedImageError
from tqdm import tqdm
from trl import prepare_multimodal_messages

from theworld import TheWorldProcessor
from theworld.images_theworld import read_image
from theworld.training.formats import read_formats, row_errors
from theworld.validation_theworld import IGNORE_INDEX


COLUMNS = ("messages", "images")
# Columns of other formats that contain a part of a conversation. They may exist, but must be empty.
OTHER_CONTENT = ("image", "video", "videos", "audio", "audios", "tools")
# Placeholders for an image, a video or a sound in other formats, such as LLaVA's.
FOREIGN_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
FORMAT = (
    "A row needs `messages`, a list of {role, content} whose roles are system, user and assistant, and `images`, a "
    'list of images. An image replaces {"type": "image"} in a list as content. If all content is text, images come '
    "before the first question. LLaVA's `conversations` and `image` are read as well."
)


def load_conversations(
    name: str, split: str, collator: "ConversationCollator", image_root: str | Path | None = None
) -> Dataset:
    """
    Conversations in TRL's vision format: `messages`, and `images`, a list with one image for each placeholder.

    LLaVA's format is read too: `conversations` in place of `messages`, and `image` in place of `images`.

    Renders every row and decodes every image, so that a bad row ends a run before its first step.

    Args:
        name: A JSONL file, a folder that `datasets` can load, or a dataset on the Hub. Image paths are relative to
            the file or the folder.
        split: A split or a part of one, such as "train[:90%]". The only split of a file is "train".
        collator: The collator that will make batches of the rows.
        image_root: A folder to which image paths are relative instead, and which they may not leave.

    Raises:
        ValueError: If the dataset has no such split, a column is missing or would be ignored, or a row cannot be
            trained on. The message has the row's number, starting at 0.
    """
    path = Path(name)
    if path.is_file():
        dataset, folder = load_file(path, split), path.parent
    else:
        dataset, folder = load_rows(name, split), path
    folder = folder if image_root is None else Path(image_root)
    dataset = read_formats(dataset)
    check_columns(dataset, name)
    dataset = dataset.select_columns(list(COLUMNS))
    if not isinstance(getattr(dataset.features["images"], "feature", None), Image):
        dataset = dataset.map(
            lambda row, number: {"images": resolve_image_paths(folder, row, number)}, with_indices=True
        )
    dataset = dataset.cast_column("images", List(Image()))
    stored = dataset.cast_column("images", List(Image(decode=False)))
    for number, row in enumerate(tqdm(stored, desc=f"checking {split}", unit="row", disable=None)):
        with row_errors(number):
            collator.check(row["messages"], [size_of(image) for image in check_list(row["images"])])
    return dataset


def load_file(path: Path, split: str) -> Dataset:
    """The rows of a JSONL file, or a part of them."""
    if split.partition("[")[0] != "train":
        raise ValueError(
            f"{path} is one file, whose only split is 'train', got {split!r}. Use parts of it, such as "
            "'train[:90%]' and 'train[90%:]', or give a folder with a file for each split."
        )
    return load_rows("json", split, data_files={"train": str(path)})


def load_rows(source: str, split: str, **options) -> Dataset:
    """Like `load_dataset`, but answers such as "3" or "null" stay text if other content is a list."""
    try:
        dataset = load_dataset(source, split=split, **options)
    except DatasetGenerationError as error:
        files = options.get("data_files", {}).get("train", source)
        raise ValueError(f"{files} cannot be read as a dataset: {error.__cause__ or error}") from error
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no file or folder {source}, and no dataset of that name could be loaded from the Hub: {error}"
        ) from error
    message = getattr(dataset.features.get("messages"), "feature", None)
    if isinstance(message, dict) and isinstance(message.get("content"), Json):
        # `datasets` stores mixed content as JSON, and then parses text that is valid JSON. Not in whole messages.
        features = Features({**dataset.features, "messages": List(Json())})
        dataset = load_dataset(source, split=split, features=features, **options)
    return dataset


def check_columns(dataset: Dataset, name: str) -> None:
    """Raises a `ValueError` if a column is missing, or an ignored column contains a part of a conversation."""
    columns = dataset.column_names
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise ValueError(f"{name} has the columns {', '.join(columns)}, but no {' and no '.join(missing)}. {FORMAT}")
    for column in sorted(set(OTHER_CONTENT) & set(columns)):
        number = first_filled(dataset, column)
        if number is not None:
            raise ValueError(
                f"Row {number} of the dataset has `{column}`, but training reads only `messages` and `images`. Remove "
                "such rows, or empty the column."
            )
    unread = sorted(set(columns) - set(COLUMNS) - set(OTHER_CONTENT))
    if unread:
        warnings.warn(f"Training does not read the column(s) {', '.join(unread)} of {name}.", stacklevel=2)


def first_filled(dataset: Dataset, column: str) -> int | None:
    """The number of the first row in which a column is not empty."""
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    filled = values.is_valid()
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        filled = pc.fill_null(pc.greater(pc.list_value_length(values), 0), False)
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        filled = pc.fill_null(pc.greater(pc.binary_length(values), 0), False)
    number = pc.index(filled, True).as_py()
    return None if number < 0 else number


def check_list(images: Any) -> list:
    """A row's images; raises a `ValueError` for null, which could be a list that was lost."""
    if not isinstance(images, list):
        raise ValueError(f"`images` must be a list of images, got {images!r:.60}. A row without images has [].")
    return images


def resolve_image_paths(folder: Path, row: dict, number: int) -> list[str]:
    """The paths of a row's images in a dataset's folder."""
    with row_errors(number):
        return [resolve_image_path(folder, image) for image in check_list(row["images"])]


def resolve_image_path(folder: Path, image: str) -> str:
    """The path of an image; raises a `ValueError` if it leaves the dataset's folder, also through a symlink."""
    if not isinstance(image, str):
        raise ValueError(f"An image must be a path, got {image!r:.60}.")
    path = (folder / image).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"The image {image} is outside the dataset's folder {folder}. Put it there.")
    if not path.is_file():
        raise ValueError(f"The image {path} does not exist. Image paths are relative to the dataset's file or folder.")
    return str(path)


def size_of(stored: dict | None) -> tuple[int, int]:
    """Height and width in pixels of an image in the storage format of `datasets`, decoded as in training."""
    if stored is None:
        raise ValueError("An image is null. Remove it, and its placeholder in the messages.")
    try:
        image = Image().decode_example(stored)
    except Exception as error:  # Pillow's decoders raise many types; the text of one contains a memory address
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"The image {stored['path'] or 'in this row'} cannot be decoded: {reason}.") from None
    image = read_image(image)
    return image.height, image.width


def read_messages(messages: Any, images: list) -> list[dict]:
    """
    Messages for the chat template: lists of parts, without the nulls that `datasets` adds, and with the row's images.

    Raises:
        ValueError: If a message or a part of one has another format or is empty, or the numbers of images and
            placeholders differ.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"`messages` must be a list of {{role, content}}, got {messages!r:.60}.")
    read = [read_message(message, turn) for turn, message in enumerate(messages, start=1)]
    placeholders = [part for message in read for part in message["content"] if part["type"] == "image"]
    for number, part in enumerate(placeholders):  # some datasets number them; images are used in order
        if part.pop("index", number) != number:
            raise ValueError(f"Image placeholder {number} has another `index`. List images in order of placeholders.")
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if questions and not placeholders and all(isinstance(question, str) for question in questions):
        first = next(message for message in read if message["role"] == "user")
        first["content"] = [{"type": "image"} for _ in images] + first["content"]
    return prepare_multimodal_messages(read, images=images)


def read_message(message: dict, turn: int) -> dict:
    """One message of a conversation, its content as a list of parts."""
    message = without_nulls(message)
    if message.keys() != {"role", "content"}:
        raise ValueError(f"Message {turn} must have `role` and `content`, got {', '.join(message) or 'nothing'}.")
    content = message["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"The content of message {turn} must be text or a list of parts, got {content!r:.60}.")
    parts = [without_nulls(part) for part in content]
    for part in parts:
        of_text = part.keys() == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str)
        if not of_text and (part.get("type") != "image" or not part.keys() <= {"type", "index"}):
            raise ValueError(
                f'A part of message {turn} must be {{"type": "text", "text": ...}} or {{"type": "image"}}, with the '
                f"image in `images`, got {part!r:.100}."
            )
    said = text_of(parts).strip()
    if not said and (message["role"] != "user" or all(part["type"] == "text" for part in parts)):
        raise ValueError(f"Message {turn}, of the {message['role']}, is empty. Complete it, or remove the row.")
    return {"role": message["role"], "content": parts}


def without_nulls(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if value is not None}


def text_of(parts: list[dict]) -> str:
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


@dataclass
class ConversationCollator:
    """
    Makes batches of conversations; only the assistant's messages count in the loss.

    TRL's collator does the same for pixels from transformers 5.18 on. This one also supports latents, and masks
    correctly on 5.17.

    Args:
        processor: The model's processor. Its settings `world` and `vision` say how the model reads images.
        max_length: Maximum number of tokens in a conversation, those of images included; None for no limit.
    """

    processor: TheWorldProcessor
    max_length: int | None = None

    def __post_init__(self):
        tokenizer = self.processor.tokenizer
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_ids = special - {tokenizer.unk_token_id}
        self.turn_id = tokenizer.convert_tokens_to_ids("<start_of_turn>")
        _, self.reads_vision = self.processor._switches(None, None)
        _, [self.image_text] = self.processor._process_images([PIL.Image.new("RGB", (64, 64))])

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: Each with `messages`, and `images` or `world_latents`, one [z, h, w] for each image.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 [B, S], padded on the right; `pixel_values` or
            `world_latents` of all images, in order, with their `image_sizes` if they are padded; and for a checkpoint
            with Gemma 3's tower `token_type_ids` and `vision_pixel_values`.

        Raises:
            ValueError: If a conversation is longer than `max_length`, or has another format.
        """
        processor_kwargs = {"padding": True, "padding_side": "right", "add_special_tokens": False}
        if "world_latents" in rows[0]:
            images = [[None] * len(row["world_latents"]) for row in rows]
            processor_kwargs["world_latents"] = [row["world_latents"] for row in rows]
        else:
            images = [row["images"] for row in rows]
        conversations = [read_messages(row["messages"], of_row) for row, of_row in zip(rows, images, strict=True)]
        batch: Any = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=processor_kwargs
        )
        self.check_length(batch["input_ids"].shape[1])
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for row, messages in enumerate(conversations):
            self.label(messages, batch["input_ids"][row], batch["labels"][row])
        return dict(batch)

    def check(self, messages: list[dict], image_sizes: Sequence[Sequence[int]], **options) -> None:
        """
        Checks a row by rendering it.

        Args:
            messages: A row's conversation.
            image_sizes: Height and width in pixels of each of its images.
            options: Of the image processor; `do_resize=False` if these are the sizes after resizing.

        Raises:
            ValueError, TemplateError: If a call with this row would raise, or would train on something else than
                answers.
        """
        conversation = read_messages(messages, [None] * len(image_sizes))
        if not conversation or conversation[-1]["role"] != "assistant":
            raise ValueError(
                f"The conversation ends without an answer: the last of its {len(conversation)} message(s) must be the "
                "assistant's. Complete it, or remove it."
            )
        text = self.processor.apply_chat_template(conversation)
        for turn, message in enumerate(conversation, start=1):
            self.check_typed(message, turn, bool(image_sizes))
        if self.max_length is not None:
            text = text.replace(self.processor.image_token, self.image_text)
            length = len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
            if image_sizes and self.processor.world:
                counts = self.processor._get_num_multimodal_tokens(list(image_sizes), **options)["num_image_tokens"]
                length += sum(number - self.image_text.count(self.processor.image_token) for number in counts)
            self.check_length(length)

    def check_typed(self, message: dict, turn: int, has_images: bool) -> None:
        """Raises a `ValueError` for a special token or foreign placeholder in a text, or an image in an answer."""
        has_image = any(part["type"] == "image" for part in message["content"])
        if self.reads_vision and message["role"] == "assistant" and has_image:
            raise ValueError(
                f"Message {turn} is the assistant's and has an image, but Gemma's tower reads those of the user only."
            )
        text, tokenizer = text_of(message["content"]).strip(), self.processor.tokenizer
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        typed = tokenizer.convert_ids_to_tokens([each for each in token_ids if each in self.control_ids])
        if message["role"] == "user":
            typed += [token for token in FOREIGN_PLACEHOLDERS if text.startswith(token) or text.endswith(token)]
            typed += ["<image>"] if has_images and "<image>" in text else []
        if typed:
            raise ValueError(
                f"The text of message {turn} contains {typed[0]!r}, a special token or a placeholder of another "
                'format. Remove it; for an image, use {"type": "image"} in a list as content.'
            )

    def check_length(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"A conversation has {length} tokens, more than max_length={self.max_length}. Cutting it would lose "
                "world tokens or answers. Raise max_length, or remove such conversations."
            )

    def tokenize(self, messages: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [S] of a conversation, with one `<world>` for each image, and a mask [S] of the assistant's tokens."""
        # The tokenizer does not expand images; all other tokens are equal to the processor's.
        tokenized = self.processor.tokenizer.apply_chat_template(
            messages,
            chat_template=self.processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        return tokenized["input_ids"][0], torch.as_tensor(tokenized["assistant_masks"])[0].bool()

    def label(self, messages: list[dict], input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Copies the assistant's tokens from `input_ids` [S] to `labels` [S], turn by turn."""
        unexpanded, said = self.tokenize(messages)
        for turn, expanded in zip(self.turns(unexpanded), self.turns(input_ids), strict=True):
            answers = expanded[: len(turn)][said[turn]]
            labels[answers] = input_ids[answers]

    def turns(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """The positions of each turn in `input_ids` [S], from its `<start_of_turn>` on, without world tokens."""
        of_images = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(list(self.processor.world_tokens)))
        number = (input_ids == self.turn_id).cumsum(0)
        number[torch.isin(input_ids, of_images)] = 0
        return [(number == turn).nonzero().flatten() for turn in range(1, int(number.max()) + 1)]
