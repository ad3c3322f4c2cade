# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Synthetic clips, drawn from a seed and identical on every machine, with questions that no single frame answers.

    clip = make_clip(SPLITS["test"][0])
    clip.frames                      nine PIL images of 64 x 64 pixels, an eighth of a second apart
    clip.questions[0]                Question(kind="direction", text="Which way does the red star move?", answer="up")

A clip is built backwards from its last frame. That frame is kept only if the motion of every answer could lead to it.
Then the answer is chosen at random, so the last frame does not reveal it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from PIL import Image

from theworld.evaluation.scenes import (
    COLOURS,
    SHAPES,
    SIZE,
    Canvas,
    Question,
    Thing,
    ask_colour,
    ask_existence,
    ask_shape,
)


NUM_FRAMES = 9
FPS = 8
FRAMES_PER_LATENT = 4  # after the first
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# The share of its path that an object has covered, by the share of the time.
PACES: dict[str, Callable[[float], float]] = {
    "neither": lambda time: time,
    "faster": lambda time: time**2,
    "slower": lambda time: 1 - (1 - time) ** 2,
}
# Kinds of questions, and the answers of each, all equally frequent.
CLIP_KINDS: dict[str, tuple[str, ...]] = {
    "direction": tuple(WAYS),
    "speed": tuple(PACES),
    "meet": ("yes", "no"),
    "next": ("hit", "leave", "stop"),
}
# Pixels between objects, and from an object to the edge.
GAP = 2


@dataclass(frozen=True)
class Mover:
    """An object at its final position, and the path to it: `along` x and y in pixels, at a pace."""

    thing: Thing
    along: tuple[float, float] = (0.0, 0.0)
    pace: str = "neither"

    def at(self, frame: int) -> Thing:
        """The object in a frame."""
        left = 1 - PACES[self.pace](frame / (NUM_FRAMES - 1))
        return replace(self.thing, x=self.thing.x - left * self.along[0], y=self.thing.y - left * self.along[1])


@dataclass(frozen=True)
class Clip:
    movers: tuple[Mover, ...]
    questions: tuple[Question, ...]
    canvas_seed: int

    def things_at(self, frame: int) -> tuple[Thing, ...]:
        return tuple(mover.at(frame) for mover in self.movers)

    @property
    def frames(self) -> tuple[Image.Image, ...]:
        """The frames, drawn at each access, all with the background, the shades and the noise of one seed."""
        frames = []
        for frame in range(NUM_FRAMES):
            canvas = Canvas(Random(self.canvas_seed))
            for thing in self.things_at(frame):
                canvas.add_thing(thing)
            frames.append(canvas.finish())
        return tuple(frames)


def fits(movers: Sequence[Mover]) -> bool:
    """Whether objects stay inside the picture and apart from each other in all frames."""
    for frame in range(NUM_FRAMES):
        things = [mover.at(frame) for mover in movers]
        for number, thing in enumerate(things):
            reach = thing.radius * 1.25 + GAP
            if not all(reach <= place <= SIZE - reach for place in (thing.x, thing.y)):
                return False
            if any(thing.distance(other) < 1.25 * (thing.radius + other.radius) + GAP for other in things[:number]):
                return False
    return True


def scaled(way: tuple[float, float], distance: float) -> tuple[float, float]:
    return way[0] * distance, way[1] * distance


def scatter(random: Random, number: int) -> list[Thing]:
    """Objects of different colors anywhere in the picture."""
    return [
        Thing(random.choice(SHAPES), colour, random.uniform(0, SIZE), random.uniform(0, SIZE), random.uniform(4, 6))
        for colour in random.sample(list(COLOURS), number)
    ]


def line_up(random: Random) -> tuple[Thing, Thing, tuple[int, int]]:
    """Two objects in a row or a column, and the direction from the first to the second."""
    one, other = scatter(random, 2)
    way = random.choice(list(WAYS.values()))
    distance = random.uniform(0, SIZE)
    return one, replace(other, x=one.x + way[0] * distance, y=one.y + way[1] * distance), way


def make_travel(random: Random) -> tuple[list[Mover], list[Question]] | None:
    """One object moves, up to two others do not."""
    thing, *others = scatter(random, random.randint(1, 3))
    distance, still = random.uniform(9, 16), [Mover(other) for other in others]
    possible = {name: Mover(thing, scaled(way, distance)) for name, way in WAYS.items()}
    if not all(fits([mover, *still]) for mover in possible.values()):
        return None
    way, pace = random.choice(list(WAYS)), random.choice(list(PACES))
    return [replace(possible[way], pace=pace), *still], [
        Question("direction", f"Which way does the {thing.name} move?", way),
        Question("speed", f"Does the {thing.name} get faster or slower?", pace),
    ]


def make_meeting(random: Random) -> tuple[list[Mover], list[Question]] | None:
    """Two objects move on one line; the reversed motion opens the gap that this one closes."""
    one, other, way = line_up(random)
    first, second = (random.choice((-1, 1)) * random.uniform(4, 14) for _ in range(2))
    if abs(first - second) < 7:
        return None
    possible = [[Mover(one, scaled(way, sign * first)), Mover(other, scaled(way, sign * second))] for sign in (1, -1)]
    if not all(fits(movers) for movers in possible):
        return None
    movers, closing = random.choice(list(zip(possible, (first > second, first < second), strict=True)))
    return movers, [Question("meet", f"Will the {one.name} meet the {other.name}?", "yes" if closing else "no")]


def make_ending(random: Random) -> tuple[list[Mover], list[Question]] | None:
    """One object moves toward another or away from it, or stops."""
    one, other, way = line_up(random)
    distance = random.uniform(9, 14)
    towards, away = (Mover(one, scaled(way, sign * distance)) for sign in (1, -1))
    if not (fits([towards, Mover(other)]) and fits([away, Mover(other)])):
        return None
    answer = random.choice(CLIP_KINDS["next"])
    if answer == "stop":
        mover = replace(random.choice((towards, away)), pace="slower")
    else:
        mover = replace(towards if answer == "hit" else away, pace=random.choice(("neither", "faster")))
    return [mover, Mover(other)], [Question("next", f"Will the {one.name} hit, leave or stop?", answer)]


def make_clip(seed: int) -> Clip:
    """The clip of a seed: one object travels, two objects may meet, or one object may hit another."""
    random = Random(seed)
    make = random.choice((make_travel, make_meeting, make_ending))
    while (made := make(random)) is None:
        pass
    movers, questions = made
    things = [mover.thing for mover in movers]
    asked = [ask(random, things) for ask in (ask_shape, ask_colour, ask_existence)]
    questions += [question for question in asked if question is not None]
    canvas_seed = random.getrandbits(64)
    return Clip(tuple(movers), tuple(random.sample(questions, len(questions))), canvas_seed)
