# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""What the model refuses in tensors before it computes with them; all of it compiles."""

import torch
from transformers.utils import torch_compilable_check


def check_floating(tensor: torch.Tensor, expected: str, remedy: str) -> None:
    """Raises a `TypeError` unless it is a floating-point tensor; the arguments are the message's sentences."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{expected}, got {getattr(tensor, 'dtype', type(tensor).__name__)}. {remedy}")


def check_token_ids(ids: torch.Tensor, vocab_size: int, name: str, ignored: int | None = None) -> None:
    """
    Checks token ids [batch, S]. On a GPU an id outside the vocabulary would end the process.

    Args:
        ids: What came as `name`.
        vocab_size: Rows of the embedding.
        ignored: An id that is admitted besides, such as the -100 of labels.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they have another rank, or are outside the vocabulary.
    """
    if getattr(ids, "dtype", None) not in (torch.int64, torch.int32):
        found = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"`{name}` must be an int64 tensor of token ids, got {found}. Pass return_tensors='pt'.")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"`{name}` must be [batch, S] with one token or more, got {list(ids.shape)}. For one prompt, batch is 1."
        )
    inside = (ids >= 0) & (ids < vocab_size)
    if ignored is not None:
        inside = inside | (ids == ignored)
    torch_compilable_check(
        inside.all(),
        lambda: (
            f"`{name}` must be in 0..{vocab_size - 1}{f' or {ignored}' if ignored is not None else ''}, got "
            f"{ids[~inside][:3].tolist()}. Tokenizer and model must be of the same checkpoint."
        ),
    )


def check_whole_images(mask: torch.Tensor, tokens_per_image: int) -> None:
    """
    Checks that each image's places stand side by side in one prompt, so that no image reaches into another prompt.

    Args:
        mask: [batch, S], True at the places of world tokens; images fill them in reading order.
        tokens_per_image: World tokens an image.

    Raises:
        ValueError: If an image's places are apart.
    """
    number_in_image = (mask.flatten().cumsum(0).view(mask.shape) - 1) % tokens_per_image
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    torch_compilable_check(
        ~(mask & (number_in_image > 0) & ~before).any(),
        lambda: (
            f"An image's {tokens_per_image} `<world>` places must be in one prompt, but the prompts have "
            f"{mask.sum(-1).tolist()}, not all of an image's side by side. TheWorldProcessor expands one `<world>` an "
            "image."
        ),
    )


def check_attention_mask(attention_mask: torch.Tensor | None, batch: int, length: int) -> None:
    """Raises a `ValueError` if a mask [batch, tokens so far] does not cover a prompt [batch, length]."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        rows, columns = attention_mask.shape
        if rows != batch or columns < length:
            raise ValueError(
                f"`attention_mask` must cover the prompts, {[batch, length]}, and what the cache holds, got "
                f"{[rows, columns]}. The processor returns both together."
            )


def check_padded_on_the_left(attention_mask: torch.Tensor | None) -> None:
    """Raises a `ValueError` if a prompt [batch, S] ends in padding, which an answer would go on from."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        torch_compilable_check(
            attention_mask[:, -1:].all(),
            "To be answered, prompts must be padded on the left, but some end in padding. The processor does it, "
            "unless told otherwise by `padding_side`.",
        )


def check_latents(latents: torch.Tensor) -> None:
    """
    Checks latents that were computed elsewhere, of any shape.

    Raises:
        TypeError: If they are no floating-point tensor.
        ValueError: If some are NaN or infinite.
    """
    check_floating(latents, "`world_latents` must be a floating-point tensor", "`get_world_latents` returns it so.")
    torch_compilable_check(
        latents.isfinite().all(),
        "`world_latents` must be finite, but some are NaN or infinite. Encode the images again.",
    )
