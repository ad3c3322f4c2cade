# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Checks of tensors and texts that raise clear errors and work under `torch.compile`."""

import torch
from transformers import Cache
from transformers.utils import torch_compilable_check


# Label value ignored by the loss.
IGNORE_INDEX = -100


def check_floating(tensor: torch.Tensor, expected: str, remedy: str) -> None:
    """Raises a `TypeError` unless `tensor` is floating point; `expected` and `remedy` are parts of the message."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{expected}, got {getattr(tensor, 'dtype', type(tensor).__name__)}. {remedy}")


def check_text(text: str | list[str] | None) -> None:
    """Raises a `TypeError` unless `text` is None, a string or a list of strings, and a `ValueError` if it is empty."""
    prompts = [text or ""] if text is None or isinstance(text, str) else text
    if not isinstance(prompts, list | tuple) or not all(isinstance(each, str) for each in prompts):
        raise TypeError(f"`text` must be a string or a list of strings, got {type(text).__name__}: {text!r:.60}.")
    if not prompts:
        raise ValueError("`text` is an empty list. Give at least one prompt.")


def check_conversation(conversation: list[dict] | list[list[dict]]) -> None:
    """Raises a `ValueError` for conversations on which transformers fails before the chat template can reject them."""
    batched = isinstance(conversation, list | tuple) and conversation and isinstance(conversation[0], list | tuple)
    for messages in conversation if batched else [conversation]:
        if not messages or isinstance(messages, str | dict):
            raise ValueError(
                "A conversation must be a list of at least one message, {'role': ..., 'content': ...}, got "
                f"{messages!r:.60}."
            )
        for message in messages if isinstance(messages, list | tuple) else []:
            if not isinstance(message, dict):
                raise ValueError(f"A message must be {{'role': ..., 'content': ...}}, got {message!r:.60}.")
            parts = message.get("content")
            for part in parts if isinstance(parts, list | tuple) else []:
                if not isinstance(part, dict) or "type" not in part:
                    raise ValueError(
                        "A part of a message must have a type, as {'type': 'text', 'text': ...} or {'type': 'image', "
                        f"'image': ...}}, got {part!r:.60}."
                    )


def check_prompts(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    vocab_size: int,
) -> None:
    """
    Checks the inputs of `forward` other than images and videos.

    Ids are range-checked at prefill only: checking each decoded token would force a GPU sync.

    Raises:
        TypeError: If the ids are not integers.
        ValueError: If both or neither of ids and embeddings are given; if ids are outside the vocabulary; if a mask
            [batch, tokens so far] does not cover the prompts [batch, S].
    """
    prompts = inputs_embeds if input_ids is None else input_ids
    if prompts is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is not None:
        check_ids_shape(input_ids, "input_ids")
        if cache is None or input_ids.shape[1] > 1:
            check_ids_range(input_ids, vocab_size, "input_ids")
    batch, length = prompts.shape[:2]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        rows, columns = attention_mask.shape
        if rows != batch or columns < length:
            raise ValueError(
                f"`attention_mask` must cover the prompts, {[batch, length]}, and the tokens in the cache, got "
                f"{[rows, columns]}. The processor returns both together."
            )


def check_generation_inputs(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int) -> None:
    """Raises a `ValueError` if prompts [batch, S] for `generate` have unknown ids, or end in padding."""
    if input_ids.numel():  # else the prompts are embeddings
        check_ids_range(input_ids, vocab_size, "input_ids")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        torch_compilable_check(
            attention_mask[:, -1:].all(),
            "`generate` needs left padding, but some prompts end in padding. The processor pads on the left unless "
            "`padding_side` says otherwise.",
        )


def check_context(length: int, context: int) -> None:
    """Raises a `ValueError` if a prompt of `length` tokens leaves no room in the context for an answer."""
    if length >= context:
        raise ValueError(
            f"The prompt has {length} tokens, and with an answer the model reads {context}. Shorten the prompt, give "
            "fewer or smaller images, or, if its rope is scaled, raise `max_position_embeddings`."
        )


def check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises a `TypeError` or `ValueError` unless labels are ids or -100, one for each of logits [batch, S, ids]."""
    check_ids_shape(labels, "labels")
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"`labels` must be {list(logits.shape[:2])}, one for each position that has logits, got "
            f"{list(labels.shape)}. Do not pass `logits_to_keep` in training."
        )
    check_ids_range(labels, logits.shape[-1], "labels", ignored=IGNORE_INDEX)


def check_ids_shape(ids: torch.Tensor, name: str) -> None:
    """Raises a `TypeError` unless `name` holds integers, and a `ValueError` unless it is [batch, S] and not empty."""
    if getattr(ids, "dtype", None) not in (torch.int64, torch.int32):
        found = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"`{name}` must be an int64 tensor of token ids, got {found}. Pass return_tensors='pt'.")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"`{name}` must be [batch, S] with at least one token, got {list(ids.shape)}. For one prompt, batch is 1."
        )


def check_ids_range(ids: torch.Tensor, vocab_size: int, name: str, ignored: int | None = None) -> None:
    """Raises a `ValueError` for ids outside the vocabulary other than `ignored`, which would crash CUDA."""
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


def check_latents(latents: torch.Tensor | list[torch.Tensor]) -> None:
    """
    Checks latents of any shape, or a list of them.

    Raises:
        TypeError: If they are not a floating-point tensor.
        ValueError: If some values are NaN or infinite, or the list is empty.
    """
    items = latents if isinstance(latents, list | tuple) else [latents]
    if not items:
        raise ValueError("`world_latents` is an empty list. Give the latents of at least one image or video.")
    for each in items:
        check_floating(each, "`world_latents` must be a floating-point tensor", "`get_world_latents` returns one.")
        torch_compilable_check(
            each.isfinite().all(),
            "`world_latents` must be finite, but some are NaN or infinite. Encode the images again.",
        )
