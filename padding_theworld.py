# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Truncation and padding of prompts, in Python.

A fast tokenizer keeps both as settings of its one Rust object. Threads that share it change each other's settings, and
fail where one changes them while another encodes or decodes.
"""

import copy
from functools import partial

from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy


def without_shared_settings(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A shallow copy of a tokenizer whose batches are truncated and padded in Python; `tokenizer` is left as it is."""
    own = copy.copy(tokenizer)
    own._encode_plus = partial(encode, tokenizer)
    return own


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: list[str],
    padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
    truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_tensors: str | None = None,
    return_special_tokens_mask: bool = False,
    **kwargs,
) -> BatchEncoding:
    """
    As the tokenizer's own `_encode_plus`, to the same tokens.

    Raises:
        ValueError: If the prompts are to be truncated, and what overflows is to be returned.
    """
    truncate = truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE
    if truncate and kwargs.get("return_overflowing_tokens"):
        raise ValueError("A truncated prompt's overflow cannot be returned. Leave `return_overflowing_tokens` out.")
    with_mask = truncate or return_special_tokens_mask
    encoded = tokenizer._encode_plus(text=text, max_length=max_length, return_special_tokens_mask=with_mask, **kwargs)
    columns = dict(encoded)
    if truncate:
        masks = columns.get("special_tokens_mask") or [[0] * len(ids) for ids in columns["input_ids"]]
        kept = [kept_positions(mask, max_length, tokenizer.truncation_side) for mask in masks]
        for name in columns.keys() & fills(tokenizer).keys():
            rows = zip(columns[name], kept, strict=True)
            columns[name] = [[row[position] for position in positions] for row, positions in rows]
    if not return_special_tokens_mask:
        columns.pop("special_tokens_mask", None)
    if padding_strategy != PaddingStrategy.DO_NOT_PAD:
        longest = max_length if padding_strategy == PaddingStrategy.MAX_LENGTH else max(map(len, columns["input_ids"]))
        pad(tokenizer, columns, longest + -longest % (pad_to_multiple_of or 1), padding_side or tokenizer.padding_side)
    return BatchEncoding(columns, encoded.encodings, tensor_type=return_tensors)


def fills(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None | tuple[int, int]]:
    """What stands at padding, by column."""
    return {
        "input_ids": tokenizer.pad_token_id,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
        "special_tokens_mask": 1,
        "offset_mapping": (0, 0),
    }


def kept_positions(special: list[int], max_length: int, side: str) -> list[int]:
    """The positions of a prompt that truncation on `side` leaves; special tokens around it all stay."""
    start = next((position for position, added in enumerate(special) if not added), len(special))
    end = len(special) - next((position for position, added in enumerate(special[::-1]) if not added), 0)
    excess = max(0, len(special) - max_length)
    body = list(range(start, end))
    body = body[: max(0, len(body) - excess)] if side == "right" else body[excess:]
    return [*range(start), *body, *range(end, len(special))]


def pad(tokenizer: PreTrainedTokenizerBase, columns: dict[str, list], length: int, side: str) -> None:
    """Lengthens the rows of `columns` to `length`, in place."""
    for name, fill in fills(tokenizer).items():
        if name in columns:
            gaps = [[fill] * (length - len(row)) for row in columns[name]]
            pairs = zip(columns[name], gaps, strict=True)
            columns[name] = [gap + row if side == "left" else row + gap for row, gap in pairs]
