# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Truncation and padding of prompts, in Python.

A fast tokenizer stores both as settings of one Rust object. Threads that share it overwrite each other's settings, and
fail if one thread changes them while another encodes or decodes.
"""

import copy
from functools import partial
from typing import cast

from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy


def without_shared_settings(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A shallow copy of `tokenizer` that truncates and pads in Python; `tokenizer` stays unchanged."""
    own = copy.copy(tokenizer)
    own._encode_plus = partial(encode, tokenizer)  # type: ignore[method-assign] # on the copy only
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
    As the tokenizer's own `_encode_plus`, with the same tokens.

    Raises:
        ValueError: If overflowing tokens are to be returned.
    """
    limit = cast(int, max_length)  # transformers sets it whenever it is used
    truncate = truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE
    if truncate and kwargs.get("return_overflowing_tokens"):
        raise ValueError("Overflowing tokens cannot be returned. Remove `return_overflowing_tokens`.")
    with_mask = truncate or return_special_tokens_mask
    encoded = tokenizer._encode_plus(text=text, max_length=max_length, return_special_tokens_mask=with_mask, **kwargs)
    columns = dict(encoded)
    if truncate:
        masks = columns.get("special_tokens_mask") or [[0] * len(ids) for ids in columns["input_ids"]]
        kept = [kept_positions(mask, limit, tokenizer.truncation_side) for mask in masks]
        for name in columns.keys() & fills(tokenizer).keys():
            rows = zip(columns[name], kept, strict=True)
            columns[name] = [[row[position] for position in positions] for row, positions in rows]
    if not return_special_tokens_mask:
        columns.pop("special_tokens_mask", None)
    if padding_strategy != PaddingStrategy.DO_NOT_PAD:
        longest = limit if padding_strategy == PaddingStrategy.MAX_LENGTH else max(map(len, columns["input_ids"]))
        pad(tokenizer, columns, longest + -longest % (pad_to_multiple_of or 1), padding_side or tokenizer.padding_side)
    return BatchEncoding(columns, encoded.encodings, tensor_type=return_tensors)


def fills(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None | tuple[int, int]]:
    """The padding value of each column."""
    return {
        "input_ids": tokenizer.pad_token_id,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
        "special_tokens_mask": 1,
        "offset_mapping": (0, 0),
    }


def kept_positions(special: list[int], max_length: int, side: str) -> list[int]:
    """The positions of a prompt that remain after truncation on `side`; special tokens around it are kept."""
    start = next((position for position, added in enumerate(special) if not added), len(special))
    end = len(special) - next((position for position, added in enumerate(special[::-1]) if not added), 0)
    excess = max(0, len(special) - max_length)
    body = list(range(start, end))
    body = body[: max(0, len(body) - excess)] if side == "right" else body[excess:]
    return [*range(start), *body, *range(end, len(special))]


def pad(tokenizer: PreTrainedTokenizerBase, columns: dict[str, list], length: int, side: str) -> None:
    """Pads the rows of `columns` to `length`, in place."""
    for name, fill in fills(tokenizer).items():
        if name in columns:
            gaps = [[fill] * (length - len(row)) for row in columns[name]]
            pairs = zip(columns[name], gaps, strict=True)
            columns[name] = [gap + row if side == "left" else row + gap for row, gap in pairs]
