# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Held-out questions about scenes and clips: the same for every model, and as many of each kind."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from PIL import Image

from theworld.evaluation.clips import CLIP_KINDS, Clip, make_clip
from theworld.evaluation.scenes import KINDS, SPLITS, Question, Scene, draw_scene


QUESTIONS_PER_KIND = 300
NUM_TEST_SCENES = 4000  # enough for the questions of each kind, of scenes and of clips


@dataclass(frozen=True)
class Case:
    """A question about an image or about the frames of a clip, with its answer."""

    seen: Image.Image | tuple[Image.Image, ...]
    question: Question

    @property
    def modality(self) -> str:
        return "image" if isinstance(self.seen, Image.Image) else "video"

    @property
    def last_frame(self) -> "Case":
        """The same question about the last frame, as an image."""
        if isinstance(self.seen, Image.Image):
            return self
        return Case(self.seen[-1], self.question)


def held_out(per_kind: int, kinds: Iterable[str], make: Callable[[int], Scene | Clip]) -> list[Case]:
    """The first questions of each kind in the test split, at most one per kind and seed, sorted by kind."""
    cases: dict[str, list[Case]] = {kind: [] for kind in kinds}
    for seed in SPLITS["test"][:NUM_TEST_SCENES]:
        made = make(seed)
        for kind, question in {question.kind: question for question in made.questions}.items():
            if len(cases.get(kind, range(per_kind))) < per_kind:
                cases[kind].append(Case(made.image if isinstance(made, Scene) else made.frames, question))
        if all(len(of_kind) == per_kind for of_kind in cases.values()):
            break
    return [case for of_kind in cases.values() for case in of_kind]


def held_out_cases(per_kind: int) -> list[Case]:
    """Held-out questions about scenes."""
    return held_out(per_kind, KINDS, draw_scene)


def held_out_clips(per_kind: int) -> list[Case]:
    """Held-out questions about clips."""
    return held_out(per_kind, CLIP_KINDS, make_clip)
