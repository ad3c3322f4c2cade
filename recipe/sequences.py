# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Training rows of scenes and clips: all questions of a scene share one reading of its world tokens.

In most batches a question attends only to the picture and itself, as if it were asked alone. In the others it also
attends to earlier turns, so that the model learns conversations. Each world token that shows an object also has a
label, a word for that object, which links pictures and words long before answers could.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import hypot, isqrt
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedTokenizerBase

from theworld.evaluation.clips import FPS, FRAMES_PER_LATENT, NUM_FRAMES, Clip, Mover
from theworld.evaluation.scenes import SIZE, Question, Scene, Thing
from theworld.processing_theworld import time_stamp
from theworld.validation_theworld import IGNORE_INDEX


CHAT_TEMPLATE = (Path(__file__).parents[1] / "chat_template.jinja").read_text()
QUESTIONS_PER_ROW = 8
CONVERSATION_SHARE = 0.1
# Labels give the distance that an object moved in steps, as one digit.
PIXELS_PER_STEP = 1.5


@dataclass
class Segment:
    """Consecutive tokens with their labels; they attend to tokens of their own group and of group 0."""

    token_ids: list[int]
    labels: list[int]
    group: int = 0


class RowMaker:
    """
    Makes rows of scenes and clips.

    Args:
        tokenizer: Gemma's, with TheWorld's tokens if rows have pictures.
        num_world_tokens: World tokens per image or latent frame; 0 for rows without pictures.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_world_tokens: int):
        self.tokenizer = tokenizer
        self.grid = isqrt(num_world_tokens)
        self.opening = tokenizer("<start_of_turn>user\n").input_ids
        self.next_turn = tokenizer("\n<start_of_turn>user\n", add_special_tokens=False).input_ids
        self.encode = cache(self._encode)

    def _encode(self, question: Question) -> tuple[list[int], list[int]]:
        """Ids and labels of a question and its answer, from its first word to the end of the answer's turn."""
        encoded = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}],
            chat_template=CHAT_TEMPLATE,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        token_ids = encoded["input_ids"][len(self.opening) : -1]
        answered = encoded["assistant_masks"][len(self.opening) : -1]
        return token_ids, [token if said else IGNORE_INDEX for token, said in zip(token_ids, answered, strict=True)]

    def first_token(self, word: str) -> int:
        return self.tokenizer(word, add_special_tokens=False).input_ids[0]

    def block(self, token: str, words: Sequence[tuple[Thing, tuple[str, ...]]], random: Random) -> Segment:
        """The tokens of an image or a latent frame; the label of a token is one of the words for its object."""
        names = ["<start_of_world>", *[token] * self.grid**2, "<end_of_world>"]
        token_ids = self.tokenizer.convert_tokens_to_ids(names)
        labels = [IGNORE_INDEX] * len(names)
        pixels = SIZE / self.grid
        for place in range(self.grid**2):
            x, y = (place % self.grid + 0.5) * pixels, (place // self.grid + 0.5) * pixels
            for thing, names in words:
                if hypot(thing.x - x, thing.y - y) < thing.radius + pixels / 4:
                    labels[place + 2] = self.first_token(random.choice(names))
        return Segment(token_ids, labels)

    def motion(self, mover: Mover, frame: int) -> tuple[str, ...]:
        """Words for motion: the distance since the previous latent frame, and in the last one also the pace."""
        if frame == 0 or not any(mover.along):
            return ()
        steps = round(mover.at(frame).distance(mover.at(frame - FRAMES_PER_LATENT)) / PIXELS_PER_STEP)
        return (str(steps), mover.pace) if frame == NUM_FRAMES - 1 else (str(steps),)

    def world(self, scene: Scene | Clip, random: Random) -> list[Segment]:
        """The segments of an image or a clip; for a clip, the timestamp and the tokens of each latent frame."""
        if not self.grid:
            return []
        if isinstance(scene, Scene):
            words = [(thing, (thing.colour, thing.shape)) for thing in scene.things]
            return [self.block("<world>", words, random)]
        segments = []
        for frame in range(0, NUM_FRAMES, FRAMES_PER_LATENT):
            stamp = self.tokenizer(time_stamp(frame / FPS), add_special_tokens=False).input_ids
            segments.append(Segment(stamp, [IGNORE_INDEX] * len(stamp)))
            words = [
                (mover.at(frame), (mover.thing.colour, mover.thing.shape, *self.motion(mover, frame)))
                for mover in scene.movers
            ]
            segments.append(self.block("<world_video>", words, random))
        return segments

    def row(self, scene: Scene | Clip, conversation: bool, random: Random) -> list[Segment]:
        segments = [Segment(self.opening, [IGNORE_INDEX] * len(self.opening)), *self.world(scene, random)]
        questions = random.sample(scene.questions, min(QUESTIONS_PER_ROW, len(scene.questions)))
        for number, question in enumerate(questions):
            if conversation and number > 0:
                segments.append(Segment(self.next_turn, [IGNORE_INDEX] * len(self.next_turn)))
            segments.append(Segment(*self.encode(question), group=0 if conversation else number + 1))
        return segments

    def batch(self, scenes: Sequence[Scene | Clip], random: Random) -> dict[str, torch.Tensor]:
        """
        The rows of scenes or clips, padded on the right.

        Returns:
            `input_ids`, `labels`, `position_ids`: int64 [B, S]. `attention_mask`: bool [B, 1, S, S].
        """
        conversation = random.random() < CONVERSATION_SHARE
        rows = [self.row(scene, conversation, random) for scene in scenes]
        shape = (len(rows), max(sum(len(segment.token_ids) for segment in row) for row in rows))
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        position_ids = torch.zeros(shape, dtype=torch.long)
        groups = torch.full(shape, -1)
        for row, segments in enumerate(rows):
            start, position = 0, 0
            for segment in segments:
                length = len(segment.token_ids)
                stop = start + length
                input_ids[row, start:stop] = torch.tensor(segment.token_ids)
                labels[row, start:stop] = torch.tensor(segment.labels)
                position_ids[row, start:stop] = torch.arange(position, position + length)
                groups[row, start:stop] = segment.group
                start = stop
                if segment.group == 0:
                    position += length
        seen = (groups[:, None, :] == 0) | (groups[:, None, :] == groups[:, :, None])
        causal = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "attention_mask": (seen & causal).unsqueeze(1),
        }


class AnswerLoss(torch.nn.Module):
    """A language model's loss on the answers, and the share of answers whose first token is right."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, **inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        outputs = self.model(input_ids=input_ids, labels=labels, **inputs)
        in_answer = labels == input_ids  # labels of world tokens differ from the input
        starts = in_answer[:, 1:] & ~in_answer[:, :-1]
        right = (outputs.logits[:, :-1].argmax(-1) == labels[:, 1:])[starts]
        return {"loss": outputs.loss, "accuracy": right.float().mean()}
