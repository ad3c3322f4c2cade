# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
The model type `theworld` of lm-eval: a checkpoint that reads pictures through one of its arms.

An arm says what reaches Gemma of a question's pictures: world tokens, Gemma 3's own image tokens, both, or neither; or
both of another question's pictures.
"""

import hashlib
from collections.abc import Iterator
from itertools import cycle, groupby, islice
from random import Random
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import HFMultimodalLM
from PIL import Image
from tqdm import tqdm

from theworld.evaluation.questions import PLACEHOLDER, open_picture


# The processor's switches in each arm; None: the prompt has no picture.
ARMS: dict[str, dict[str, bool] | None] = {
    "both": {"world": True, "vision": True},
    "world": {"world": True, "vision": False},
    "vision": {"world": False, "vision": True},
    "neither": None,
    "shuffled": {},
}
WITHOUT_VISION = ("world", "neither", "shuffled")


def arms_of(config: Any) -> tuple[str, ...]:
    """The arms that a checkpoint with this config can have."""
    return tuple(ARMS) if config.vision_config is not None else WITHOUT_VISION


def fingerprint(image: Any) -> str:
    """A hash that is equal for equal pictures."""
    image = image.get("bytes") or image["path"] if isinstance(image, dict) else image
    content = image.tobytes() if isinstance(image, Image.Image) else image
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def pictures_of(request: Instance) -> list:
    return request.args[2]["visual"] if len(request.args) > 2 else []


def pictures_of_others(requests: list[Instance], seed: int) -> list[list]:
    """
    For each request, the pictures of another one, which are not its own: if possible of a question of its category.

    Raises:
        ValueError: If all have the same pictures.
    """
    pictures = [pictures_of(request) for request in requests]
    keys = [tuple(map(fingerprint, of_request)) for of_request in pictures]
    kinds = [
        (len(of_request), request.doc.get("category")) for of_request, request in zip(pictures, requests, strict=True)
    ]
    order = list(range(len(requests)))
    Random(seed).shuffle(order)
    swapped: list[list] = [[] for _ in requests]
    for position, index in enumerate(order):
        others = [other for other in order[position + 1 :] + order[:position] if keys[other] != keys[index]]
        if not others:
            raise ValueError("The arm shuffled needs questions about two pictures or more. Raise --limit.")
        other = next((other for other in others if kinds[other] == kinds[index]), others[0])
        swapped[index] = list(islice(cycle(pictures[other]), len(pictures[index])))
    return swapped


@register_model("theworld")
class TheWorldLM(HFMultimodalLM):
    """
    A TheWorld checkpoint in lm-eval.

    Args:
        pretrained: Folder or Hub repo of a checkpoint.
        arm: A key of `ARMS`; by default all that the checkpoint has.
        seed: Which other pictures the questions get in the arm `shuffled`.
        kwargs: Arguments of lm-eval's `HFMultimodalLM`.
    """

    def __init__(self, pretrained: str, arm: str | None = None, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(pretrained, **{"trust_remote_code": True, **kwargs})
        self.arm = arm or arms_of(self.config)[0]
        self.seed = seed
        vocabulary = self.tokenizer.get_vocab()
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.end_ids = sorted({*ends, *(vocabulary[end] for end in ("<eos>", "<end_of_turn>") if end in vocabulary)})

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat's prompt; each `<image>` in it is a picture, or nothing in the arm `neither`."""
        picture = [] if ARMS[self.arm] is None else [{"type": "image"}]
        conversation = []
        for message in chat_history:
            texts = message["content"].split(PLACEHOLDER)
            parts = [part for text in texts for part in (*picture, {"type": "text", "text": text})][len(picture) :]
            kept = [part for part in parts if part.get("text") != ""]
            conversation.append({"role": message["role"], "content": kept})
        return self.processor.apply_chat_template(
            conversation, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def encode(self, prompts: list[str], pictures: list[list], room: int) -> Any:
        """
        The model's inputs for prompts and their pictures.

        Raises:
            ValueError: If they and an answer of `room` tokens are longer than the model's context.
        """
        switches = ARMS[self.arm]
        images = None if switches is None else [[open_picture(picture) for picture in each] for each in pictures]
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt", **(switches or {})}
        inputs = self.processor(text=prompts, images=images, **options)
        length = inputs["input_ids"].shape[1]
        if length + room > self.max_length:
            raise ValueError(
                f"A question has {length} tokens and its answer may have {room}, but the model's context is "
                f"{self.max_length}. Give pictures of a smaller size."
            )
        return inputs.to(self.device, self.model.dtype)

    def answer(self, requests: list[Instance], pictures: list[list]) -> list[str]:
        """The greedy answers to a batch, up to the end of the turn."""
        settings = requests[0].args[1]
        room = settings.get("max_gen_toks", self.max_gen_toks)
        inputs = self.encode([request.args[0] for request in requests], pictures, room)
        output = self.model.generate(
            **inputs,
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=self.end_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        replies = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in settings.get("until", []):
            replies = [reply.split(stop)[0] for reply in replies]
        return [reply.strip() for reply in replies]

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers to questions, in batches of prompts of like length."""
        if self.arm == "shuffled":
            pictures = pictures_of_others(requests, self.seed)
        else:
            pictures = [pictures_of(request) for request in requests]
        replies = [""] * len(requests)
        progress = tqdm(total=len(requests), desc=self.arm, disable=disable_tqdm or self.rank != 0)
        for batch in self.batches(requests):
            answers = self.answer([requests[index] for index in batch], [pictures[index] for index in batch])
            for index, reply in zip(batch, answers, strict=True):
                replies[index] = reply
            progress.update(len(batch))
        progress.close()
        return replies

    def batches(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Indices of requests with the same settings and the same number of pictures, the longest first."""

        def kind(index: int) -> tuple:
            return str(requests[index].args[1]), len(pictures_of(requests[index]))

        ordered = sorted(range(len(requests)), key=lambda index: (kind(index), -len(requests[index].args[0])))
        for _, group in groupby(ordered, kind):
            of_kind = list(group)
            for start in range(0, len(of_kind), self.batch_size):
                yield of_kind[start : start + self.batch_size]
