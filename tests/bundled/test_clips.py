"""Tests the drawn clips: equal on every machine, and with answers that need more than the last frame."""

import hashlib
from collections import Counter, defaultdict
from statistics import mean

import numpy as np
import pytest
from PIL import Image, ImageSequence

from tests.helpers import ROOT
from theworld.evaluation.clips import CLIP_KINDS, GAP, NUM_FRAMES, WAYS, make_clip
from theworld.evaluation.scenes import COLOURS, SIZE, SPLITS


@pytest.fixture(scope="module")
def clips():
    return [make_clip(seed) for seed in SPLITS["validation"][:2000]]


@pytest.fixture(scope="module")
def by_kind(clips):
    """Clips and their questions that no single frame answers, by kind."""
    pairs = defaultdict(list)
    for clip in clips:
        for question in clip.questions:
            if question.kind in CLIP_KINDS:
                pairs[question.kind].append((clip, question))
    return pairs


def test_a_seed_gives_the_same_clip_on_every_machine():
    clips = [make_clip(seed) for seed in range(10)]
    digest = hashlib.sha256(b"".join(frame.tobytes() for clip in clips for frame in clip.frames))
    digest.update(repr([clip.questions for clip in clips]).encode())
    assert digest.hexdigest() == "d070d199096c8b8361c55b1e9df01c7a96494c5432bbe2a05c03755ed17d0b93"


def test_the_docs_clip_is_held_out():
    with Image.open(ROOT / "assets" / "clip.png") as shown:
        frames = [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(shown)]
    assert frames == [frame.tobytes() for frame in make_clip(SPLITS["test"][2]).frames]


def test_the_commonest_answer_scores_at_chance(by_kind):
    assert set(by_kind) == set(CLIP_KINDS)
    for kind, answers in CLIP_KINDS.items():
        counts = Counter(question.answer for _, question in by_kind[kind])
        assert set(counts) == set(answers), kind
        total, chance = sum(counts.values()), 1 / len(answers)
        assert max(counts.values()) / total < chance + 4 * np.sqrt(chance * (1 - chance) / total), kind


def test_end_positions_do_not_reveal_the_answer(by_kind):
    """For each answer, the mean position of the object is the same: the middle of the picture."""
    for kind, pairs in by_kind.items():
        places = defaultdict(list)
        for clip, question in pairs:
            thing = clip.things_at(NUM_FRAMES - 1)[0]
            places[question.answer].append((thing.x, thing.y))
        for answer, ends in places.items():
            for axis in (0, 1):
                values = [end[axis] for end in ends]
                slack = 4 * np.std(values) / np.sqrt(len(values))
                assert abs(mean(values) - SIZE / 2) < slack, (kind, answer)


def test_things_stay_inside_and_apart(clips):
    for clip in clips[:300]:
        for frame in range(NUM_FRAMES):
            things = clip.things_at(frame)
            for thing in things:
                assert thing.radius <= min(thing.x, thing.y, SIZE - thing.x, SIZE - thing.y)
                assert all(
                    thing is other or thing.distance(other) > thing.radius + other.radius + GAP for other in things
                )


def centre(frame: Image.Image, colour: str) -> tuple[float, float]:
    """The mean position of the pixels of a color."""
    near = np.abs(np.asarray(frame, dtype=int) - COLOURS[colour]).max(-1) < 25
    rows, columns = near.nonzero()
    return columns.mean(), rows.mean()


def test_answers_match_the_frames(by_kind):
    for clip, question in by_kind["direction"][:60] + by_kind["speed"][:60]:
        colour = next(word for word in question.text.split() if word in COLOURS)
        ends = [np.array(centre(clip.frames[number], colour)) for number in (0, 4, 8)]
        first, second = ends[1] - ends[0], ends[2] - ends[1]
        if question.kind == "direction":
            assert np.dot(first + second, WAYS[question.answer]) > 6, question
        else:
            ratio = np.linalg.norm(second) / max(np.linalg.norm(first), 1e-6)
            assert question.answer == ("faster" if ratio > 1.7 else "slower" if ratio < 0.6 else "neither"), question
    for clip, question in by_kind["meet"][:60]:
        colours = [word for word in question.text.split() if word in COLOURS]
        gaps = [np.subtract(*(centre(clip.frames[number], colour) for colour in colours)) for number in (0, 8)]
        closing = np.linalg.norm(gaps[1]) < np.linalg.norm(gaps[0])
        assert closing == (question.answer == "yes"), question
