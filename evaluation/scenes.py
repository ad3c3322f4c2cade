# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Synthetic scenes with questions and exact answers, drawn from a seed and identical on every machine.

    scene = draw_scene(SPLITS["test"][0])
    scene.image                      a PIL image of 64 x 64 pixels
    scene.questions[0]               Question(kind="shape", text="What shape is the red object?", answer="star")

Two kinds of scenes: objects of different shapes, colors and sizes on a plain background, and a ball with a platform or
a ramp. Every answer is chosen before its question, or is symmetric by construction, so that the answers of each kind
of question are equally frequent. The questions are in British English ("colour").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw


SIZE = 64
# Shapes are drawn this many times larger and then reduced, for smooth edges.
OVERSAMPLING = 4

# Seeds of the scenes of each split.
SPLITS = {
    "train": range(0, 100_000_000),
    "validation": range(100_000_000, 101_000_000),
    "test": range(101_000_000, 102_000_000),
}

COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 80, 205),
    "yellow": (225, 195, 30),
    "purple": (140, 50, 170),
    "orange": (240, 130, 25),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = ("left of", "right of", "above", "below")
# Kinds of questions, and the answers of each, all equally frequent.
KINDS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "count": ("0", "1", "2", "3"),
    "existence": ("yes", "no"),
    "relation": DIRECTIONS,
    "largest": tuple(COLOURS),
    "nearest": tuple(COLOURS),
    "fall": ("rest", "fall"),
    "roll": ("left", "right"),
}
# If a question compares distances, sizes or positions, the winner leads by this factor.
MARGIN = 1.3


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Thing:
    """An object; its center and radius are in pixels, y downward."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def distance(self, other: "Thing") -> float:
        return math.hypot(self.x - other.x, self.y - other.y)


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    questions: tuple[Question, ...]
    things: tuple[Thing, ...]


def polygon(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a square, a triangle or a star of about the given radius."""
    angles_and_radii = {
        "square": [(45 + 90 * corner, 1.15) for corner in range(4)],
        "triangle": [(-90 + 120 * corner, 1.25) for corner in range(3)],
        "star": [(-90 + 36 * corner, 1.25 if corner % 2 == 0 else 0.5) for corner in range(10)],
    }[shape]
    return [
        (x + radius * scale * math.cos(math.radians(angle)), y + radius * scale * math.sin(math.radians(angle)))
        for angle, scale in angles_and_radii
    ]


class Canvas:
    """An image being drawn; takes coordinates in pixels."""

    def __init__(self, random: Random):
        ground = tuple(random.randint(200, 245) for _ in range(3))
        self.random = random
        self.image = Image.new("RGB", (SIZE * OVERSAMPLING,) * 2, ground)
        self.draw = ImageDraw.Draw(self.image)

    def add_polygon(self, corners: list[tuple[float, float]], colour: str) -> None:
        # Integers, so that the last bit of a cosine does not matter.
        self.draw.polygon([(round(x * OVERSAMPLING), round(y * OVERSAMPLING)) for x, y in corners], self.shade(colour))

    def add_thing(self, thing: Thing) -> None:
        if thing.shape == "circle":
            box = [thing.x - thing.radius, thing.y - thing.radius, thing.x + thing.radius, thing.y + thing.radius]
            self.draw.ellipse([round(edge * OVERSAMPLING) for edge in box], self.shade(thing.colour))
        else:
            self.add_polygon(polygon(thing.shape, thing.x, thing.y, thing.radius), thing.colour)

    def shade(self, colour: str) -> tuple[int, ...]:
        """The color with a small random offset."""
        return tuple(channel + self.random.randint(-12, 12) for channel in COLOURS[colour])

    def finish(self) -> Image.Image:
        """The image at its final size, with slight noise."""
        reduced = np.asarray(self.image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.int16)
        noise = np.random.Generator(np.random.PCG64(self.random.getrandbits(64))).integers(-4, 5, reduced.shape)
        return Image.fromarray((reduced + noise).clip(0, 255).astype(np.uint8))


def place_things(random: Random, shapes: list[str]) -> list[Thing]:
    """Objects with the given shapes and different colors, apart from each other; half the time one is the largest."""
    while True:
        radii = [random.uniform(5, 10) for _ in shapes]
        if random.random() < 0.5:
            largest = random.uniform(5 * MARGIN, 10)
            radii = [largest] + [random.uniform(5, largest / MARGIN) for _ in shapes[1:]]
        things: list[Thing] = []
        for shape, colour, radius in zip(shapes, random.sample(list(COLOURS), len(shapes)), radii, strict=True):
            reach = radius * 1.25 + 1
            x, y = (random.uniform(reach, SIZE - reach) for _ in range(2))
            thing = Thing(shape, colour, x, y, radius)
            if any(thing.distance(other) < 1.25 * (radius + other.radius) + 1 for other in things):
                break
            things.append(thing)
        else:
            return things


def ask_shape(random: Random, things: list[Thing]) -> Question:
    thing = random.choice(things)
    return Question("shape", f"What shape is the {thing.colour} object?", thing.shape)


def ask_colour(random: Random, things: list[Thing]) -> Question | None:
    shapes = [thing.shape for thing in things]
    unique = [thing for thing in things if shapes.count(thing.shape) == 1]
    if not unique:
        return None
    thing = random.choice(unique)
    return Question("colour", f"What colour is the {thing.shape}?", thing.colour)


def ask_existence(random: Random, things: list[Thing]) -> Question:
    """Yes for an object of the scene; no for a color of the scene with a shape that it does not have there."""
    if random.random() < 0.5:
        return Question("existence", f"Is there a {random.choice(things).name}?", "yes")
    present = {thing.name for thing in things}
    names = [f"{thing.colour} {shape}" for thing in things for shape in SHAPES]
    absent = [name for name in names if name not in present]
    return Question("existence", f"Is there a {random.choice(absent)}?", "no")


def ask_relation(random: Random, things: list[Thing]) -> Question | None:
    """The position of one object relative to another, for a pair that differs clearly along one axis."""
    pairs = [
        (one, other)
        for one in things
        for other in things
        if one is not other
        and max(abs(one.x - other.x), abs(one.y - other.y)) > MARGIN * min(abs(one.x - other.x), abs(one.y - other.y))
    ]
    if not pairs:
        return None
    one, other = random.choice(pairs)
    if abs(one.x - other.x) > abs(one.y - other.y):
        answer = "left of" if one.x < other.x else "right of"
    else:
        answer = "above" if one.y < other.y else "below"
    return Question("relation", f"Where is the {one.name} from the {other.name}?", answer)


def ask_largest(random: Random, things: list[Thing]) -> Question | None:
    *_, second, largest = sorted(things, key=lambda thing: thing.radius)
    if largest.radius < MARGIN * second.radius:
        return None
    return Question("largest", "What colour is the largest object?", largest.colour)


def ask_nearest(random: Random, things: list[Thing]) -> Question | None:
    if len(things) < 3:
        return None
    origin = random.choice(things)
    near, second, *_ = sorted((thing for thing in things if thing is not origin), key=origin.distance)
    if origin.distance(second) < MARGIN * origin.distance(near):
        return None
    return Question("nearest", f"What colour is nearest to the {origin.name}?", near.colour)


ASKERS: tuple[Callable[[Random, list[Thing]], Question | None], ...] = (
    ask_shape,
    ask_colour,
    ask_existence,
    ask_relation,
    ask_largest,
    ask_nearest,
)


def draw_objects(random: Random) -> Scene:
    """Two to five objects, with up to two questions of each kind that they allow; the count is chosen first."""
    count = random.randint(0, 3)
    counted, *others = random.sample(SHAPES, len(SHAPES))
    shapes = [counted] * count + [random.choice(others) for _ in range(random.randint(max(2 - count, 1), 5 - count))]
    things = place_things(random, random.sample(shapes, len(shapes)))

    canvas = Canvas(random)
    for thing in things:
        canvas.add_thing(thing)
    questions = {Question("count", f"How many {counted}s are there?", str(count)): None}
    for ask in (*ASKERS, *ASKERS):
        if (question := ask(random, things)) is not None:
            questions[question] = None  # a dict, unlike a set, has the same order everywhere
    return Scene(canvas.finish(), tuple(random.sample(list(questions), len(questions))), tuple(things))


def draw_fall(random: Random) -> Scene:
    """A ball on a platform, above it, or beside it: it rests, or it falls."""
    canvas = Canvas(random)
    colour, platform_colour = random.sample(list(COLOURS), 2)
    radius, thickness, width = random.uniform(5, 9), random.uniform(3, 6), random.uniform(22, 36)
    left, top = random.uniform(2, SIZE - 2 - width), random.uniform(34, SIZE - 8)
    canvas.add_polygon(
        [(left, top), (left + width, top), (left + width, top + thickness), (left, top + thickness)], platform_colour
    )
    x, y = random.uniform(left + 3, left + width - 3), top - radius
    answer = random.choice(("rest", "fall"))
    if answer == "fall":
        room_left, room_right = left - radius - 3, SIZE - (left + width) - radius - 3
        if random.random() < 0.5 and max(room_left, room_right) > radius:  # beside the platform
            on_left = room_left > room_right
            x = random.uniform(radius, room_left) if on_left else SIZE - random.uniform(radius, room_right)
        else:
            y -= random.uniform(5, max(y - radius, 5.5))
    canvas.add_thing(ball := Thing("circle", colour, x, y, radius))
    return Scene(canvas.finish(), (Question("fall", "Will the ball fall or rest?", answer),), (ball,))


def draw_roll(random: Random) -> Scene:
    """A ball on a ramp: it rolls to the lower end."""
    canvas = Canvas(random)
    colour, ramp_colour = random.sample(list(COLOURS), 2)
    answer = random.choice(("left", "right"))
    height, bottom = random.uniform(12, 30), random.uniform(50, 62)
    left, right = random.uniform(3, 14), random.uniform(50, 61)
    low, high = (left, right) if answer == "left" else (right, left)
    canvas.add_polygon([(low, bottom), (high, bottom), (high, bottom - height)], ramp_colour)
    radius, along = random.uniform(4, 8), random.uniform(0.3, 0.8)
    slope = math.atan2(height, abs(high - low))
    away = -1 if high > low else 1
    x = low + along * (high - low) + away * radius * math.sin(slope)
    y = bottom - along * height - radius * math.cos(slope)
    canvas.add_thing(ball := Thing("circle", colour, x, y, radius))
    return Scene(canvas.finish(), (Question("roll", "Which way will the ball roll?", answer),), (ball,))


def draw_scene(seed: int) -> Scene:
    """The scene of a seed: 8 in 10 show objects, 1 a ball and a platform, 1 a ball and a ramp."""
    random = Random(seed)
    draw = random.choice((draw_objects,) * 8 + (draw_fall, draw_roll))
    return draw(random)
