# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
The model type `theworld` of lm-eval: a checkpoint that reads pictures through one of its arms.

An arm says what reaches Gemma of a question's pictures: world tokens, Gemma 3's own image tokens, both, or neither; or
both of another question's pictures.
"""

import hashlib
import re
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

from theworld.evaluation.questions import IMAGE, VIDEO, open_picture


NUM_FRAMES = 33
# The processor's switches in each arm; None: the prompt has no picture or video.
ARMS: dict[str, dict[str, bool] | None] = {
    "both": {"world": True, "vision": True},
    "world": {"world": True, "vision": False},
    "vision": {"world": False, "vision": True},
    "neither": None,
    "shuffled": {},
}
# The arms of a checkpoint without Gemma 3's tower.
WITHOUT_VISION = ("world", "neither", "shuffled")


def arms_of(config: Any) -> tuple[str, ...]:
    """The arms that a checkpoint with this config can have."""
    return WITHOUT_VISION if config.vision_config is None else tuple(ARMS)


def fingerprint(image: Any) -> str:
    """A hash that is equal for equal pictures."""
    image = image.get("bytes") or image["path"] if isinstance(image, dict) else image
    content = image.tobytes() if isinstance(image, Image.Image) else image
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def shows_videos(request: Instance) -> bool:
    return bool(request.doc.get("videos"))


def pictures_of(request: Instance) -> list:
    """A request's pictures or videos."""
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
        num_frames: Frames that are read of a video, evenly.
        kwargs: Arguments of lm-eval's `HFMultimodalLM`.
    """

    def __init__(
        self, pretrained: str, arm: str | None = None, seed: int = 0, num_frames: int = NUM_FRAMES, **kwargs: Any
    ) -> None:
        super().__init__(pretrained, **{"trust_remote_code": True, **kwargs})
        if (accelerator := getattr(self, "accelerator", None)) is not None:  # lm-eval's are of one node with GPUs
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.arm = arm or arms_of(self.config)[0]
        self.seed = seed
        self.num_frames = num_frames
        vocabulary = self.tokenizer.get_vocab()
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.end_ids = sorted({*ends, *(vocabulary[end] for end in ("<eos>", "<end_of_turn>") if end in vocabulary)})

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat's prompt; each `<image>` or `<video>` in it is one, or nothing in the arm `neither`."""
        seen = {} if ARMS[self.arm] is None else {IMAGE: {"type": "image"}, VIDEO: {"type": "video"}}
        conversation = []
        for message in chat_history:
            texts = re.split(f"({IMAGE}|{VIDEO})", message["content"])
            kept = [text for text in texts if text and (text in seen or text not in (IMAGE, VIDEO))]
            parts = [seen.get(text, {"type": "text", "text": text}) for text in kept]
            conversation.append({"role": message["role"], "content": parts})
        return self.processor.apply_chat_template(
            conversation, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def encode(self, prompts: list[str], pictures: list[list], room: int, videos: bool = False) -> Any:
        """
        The model's inputs for prompts and their pictures or `videos`.

        Raises:
            ValueError: If they and an answer of `room` tokens are longer than the model's context.
        """
        switches, seen = ARMS[self.arm], {}
        if switches is not None and videos:
            seen = {"videos": pictures, "num_frames": self.num_frames, **switches}
        elif switches is not None:
            seen = {"images": [[open_picture(picture) for picture in each] for each in pictures], **switches}
        inputs = self.processor(text=prompts, padding=True, padding_side="left", return_tensors="pt", **seen)
        length = inputs["input_ids"].shape[1]
        if length + room > self.max_length:
            raise ValueError(
                f"A question has {length} tokens and its answer may have {room}, but the model's context is "
                f"{self.max_length}. Convert with a larger --latent-merge-size, or read fewer frames of a video."
            )
        return inputs.to(self.device, self.model.dtype)

    def answer(self, requests: list[Instance], pictures: list[list]) -> list[str]:
        """The greedy answers to a batch, up to the end of the turn."""
        settings = requests[0].args[1]
        room = settings.get("max_gen_toks", self.max_gen_toks)
        prompts = [request.args[0] for request in requests]
        inputs = self.encode(prompts, pictures, room, videos=shows_videos(requests[0]))
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
        """Indices of requests with the same settings and the same number of pictures or videos, the longest first."""

        def kind(index: int) -> tuple:
            request = requests[index]
            return str(request.args[1]), shows_videos(request), len(pictures_of(request))

        ordered = sorted(range(len(requests)), key=lambda index: (kind(index), -len(requests[index].args[0])))
        for _, group in groupby(ordered, kind):
            of_kind = list(group)
            for start in range(0, len(of_kind), self.batch_size):
                yield of_kind[start : start + self.batch_size]
