# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Padding: of prompts, and of images and videos of several sizes.

Prompts are truncated and padded in Python. A fast tokenizer stores both as settings of one Rust object. Threads that
share it overwrite each other's settings, and fail if one thread changes them while another encodes or decodes.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
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


def pad_together(items: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Tensors of several shapes as one, with zeros after the end of each axis.

    Args:
        items: Images or latents [C, h, w], or videos [T, C, h, w], which differ in any axis but C.

    Returns:
        [items, C, Hmax, Wmax] or [items, Tmax, C, Hmax, Wmax]; and the sizes, int64 [items, 2] (h, w) or
        [items, 3] (T, h, w).
    """
    shapes = torch.tensor([item.shape for item in items])
    axes = [axis for axis in range(shapes.shape[1]) if axis != shapes.shape[1] - 3]
    if (shapes == shapes[0]).all():
        return torch.stack(list(items)) if len(items) > 1 else items[0].unsqueeze(0), shapes[:, axes]
    padded = items[0].new_zeros(len(items), *shapes.amax(0).tolist())
    for row, item in zip(padded, items, strict=True):
        row[tuple(slice(length) for length in item.shape)] = item
    return padded, shapes[:, axes]


def unpad(
    padded: torch.Tensor | Sequence[torch.Tensor], sizes: torch.Tensor | Sequence, name: str, cell: Sequence[int]
) -> list[torch.Tensor]:
    """
    The items that `pad_together` padded, as views.

    Args:
        padded: [items, .., Hmax, Wmax]; or a list of items, already without padding.
        sizes: In pixels, [items, 2] (h, w), or [items, 3] (T, h, w).
        name: What the sizes are called in error messages.
        cell: Frames (of videos), rows and columns of pixels for each entry of `padded`; 1 for pixels themselves.

    Raises:
        ValueError: If there is not one size for each item, or one does not fit into `padded`.
    """
    rows = torch.as_tensor(sizes).tolist()
    axes = "(T, h, w)" if len(cell) == 3 else "(h, w)"
    if len(rows) != len(padded) or any(not isinstance(row, list) or len(row) != len(cell) for row in rows):
        raise ValueError(
            f"`{name}` must be [{len(padded)}, {len(cell)}], one {axes} in pixels for each item, got "
            f"{list(torch.as_tensor(sizes).shape)}. TheWorldProcessor returns it."
        )
    first = (1, 0, 0)[-len(cell) :]  # the first frame of a video has a latent of its own
    items = []
    for item, row in zip(padded, rows, strict=True):
        lengths = [start + (length - start) // step for length, start, step in zip(row, first, cell, strict=True)]
        whole = all((length - start) % step == 0 for length, start, step in zip(row, first, cell, strict=True))
        held = [item.shape[axis] for axis in (0, -2, -1)[-len(cell) :]]
        fits = all(0 < length <= most for length, most in zip(lengths, held, strict=True))
        if not (whole and fits and (isinstance(padded, torch.Tensor) or held == lengths)):
            raise ValueError(
                f"`{name}` has {axes} = {tuple(row)}, which an item of shape {list(item.shape)} does not hold. Give "
                "the sizes that TheWorldProcessor returned with it."
            )
        frames = item[: lengths[0]] if len(cell) == 3 else item
        items.append(frames[..., : lengths[-2], : lengths[-1]])
    return items


def map_by_shape(
    function: Callable[[torch.Tensor], torch.Tensor], items: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """`function` of each item, in order; it is called once for all items of one shape, stacked."""
    numbers: dict[torch.Size, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        numbers[item.shape].append(number)
    results: dict[int, torch.Tensor] = {}
    for group in numbers.values():
        results |= zip(group, function(torch.stack([items[number] for number in group])), strict=True)
    return [results[number] for number in range(len(items))]
