"""Tests the drawn scenes: equal on every machine, with balanced answers that match the picture."""

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from theworld.evaluation.scenes import COLOURS, KINDS, SPLITS, draw_scene


@pytest.fixture(scope="module")
def questions() -> dict[str, list]:
    """The questions of 3,000 validation scenes, by kind."""
    by_kind = defaultdict(list)
    for seed in SPLITS["validation"][:3000]:
        for question in draw_scene(seed).questions:
            by_kind[question.kind].append(question)
    return by_kind


def fingerprint(seed: int) -> str:
    return hashlib.sha256(draw_scene(seed).image.tobytes()).hexdigest()


def test_a_seed_gives_the_same_scene_on_every_machine():
    scenes = [draw_scene(seed) for seed in range(20)]
    digest = hashlib.sha256(b"".join(scene.image.tobytes() for scene in scenes))
    digest.update(repr([scene.questions for scene in scenes]).encode())
    assert digest.hexdigest() == "386afab8275f5f974f306a28d955e8a465dd72291b908487345c128a2e30d995"


def test_splits_share_no_seed_and_no_scene():
    seeds = [(split.start, split.stop) for split in SPLITS.values()]
    assert all(one[1] <= other[0] for one, other in zip(seeds, seeds[1:], strict=False))
    fingerprints = {name: {fingerprint(seed) for seed in split[:500]} for name, split in SPLITS.items()}
    assert all(len(each) == 500 for each in fingerprints.values())
    assert not fingerprints["train"] & fingerprints["test"] and not fingerprints["validation"] & fingerprints["test"]


def test_the_commonest_answer_scores_at_chance(questions):
    assert set(questions) == set(KINDS)
    for kind, answers in KINDS.items():
        counts = Counter(question.answer for question in questions[kind])
        assert set(counts) == set(answers), kind
        total, chance = sum(counts.values()), 1 / len(answers)
        slack = 4 * np.sqrt(chance * (1 - chance) / total)  # four standard deviations
        assert max(counts.values()) / total < chance + slack, kind


def test_wording_does_not_reveal_the_answer(questions):
    """For all wordings and for the commonest of each kind, no answer is more frequent than chance and its spread."""
    for kind in ("existence", "relation", "count"):
        wordings = defaultdict(Counter)
        for question in questions[kind]:
            words = question.text.rstrip("?").split()
            for word in words:
                wordings[word][question.answer] += 1
        for word, counts in wordings.items():
            total, chance = sum(counts.values()), 1 / len(KINDS[kind])
            slack = 5 * np.sqrt(chance * (1 - chance) / total)
            assert max(counts.values()) / total < chance + slack, (kind, word)


def near(pixels: np.ndarray, colour: str) -> np.ndarray:
    """A mask of the pixels that have about this color."""
    return np.abs(pixels.astype(int) - np.array(COLOURS[colour])).max(-1) < 20


@pytest.mark.parametrize("seed", SPLITS["validation"][:200])
def test_answers_match_the_picture(seed):
    """The colors, positions and sizes are read from the pixels."""
    scene = draw_scene(seed)
    pixels = np.asarray(scene.image)
    assert pixels.shape == (64, 64, 3) and scene.image.mode == "RGB"
    masks = {colour: near(pixels, colour) for colour in COLOURS}
    seen = {colour: mask for colour, mask in masks.items() if mask.sum() > 20}
    centres = {colour: np.argwhere(mask).mean(0)[::-1] for colour, mask in seen.items()}
    for question in scene.questions:
        words = question.text.rstrip("?").split()
        named = [word for word in words if word in COLOURS]
        if question.kind in ("colour", "largest", "nearest"):
            assert question.answer in seen
        if question.kind == "nearest":
            distances = {c: np.hypot(*(centres[c] - centres[named[0]])) for c in centres if c != named[0]}
            assert min(distances, key=distances.get) == question.answer
        if question.kind == "relation":
            x, y = centres[named[0]] - centres[named[1]]
            horizontal = "left of" if x < 0 else "right of"
            assert question.answer == (horizontal if abs(x) > abs(y) else ("above" if y < 0 else "below"))
        if question.kind == "existence" and question.answer == "yes":
            assert named[0] in seen
        if question.kind == "shape":
            assert named[0] in seen
