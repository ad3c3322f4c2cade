# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Public benchmarks, and held-out scenes, as questions of one form; the task files in `tasks/` name what is here.

Pictures stay encoded, or paths or URLs, until their question is asked.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List, concatenate_datasets, load_dataset
from PIL import Image as Pictures
from PIL import ImageDraw

from theworld.evaluation.held_out import QUESTIONS_PER_KIND, held_out_cases
from theworld.evaluation.judge import LETTERS, RULES, judge
from theworld.evaluation.scenes import KINDS


IMAGE, VIDEO = "<image>", "<video>"
SHUFFLE_SEED = 0  # so that the first N questions are of all categories, and the same for everyone
LETTER_ONLY = "Answer with the option's letter from the given choices directly."
BLINK_TASKS = (
    "Art_Style",
    "Counting",
    "Forensic_Detection",
    "Functional_Correspondence",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Object_Localization",
    "Relative_Depth",
    "Relative_Reflectance",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Visual_Correspondence",
    "Visual_Similarity",
)
# The categories of relations in VSR's paper (2205.00363).
VSR_CATEGORIES = {
    "adjacency": "adjacent to, alongside, at the side of, at the right side of, at the left side of, attached to, "
    "at the back of, ahead of, against, at the edge of",
    "directional": "off, past, toward, down, deep down, up, away from, along, around, from, into, to, across, across "
    "from, through, down from",
    "orientation": "facing, facing away from, parallel to, perpendicular to",
    "projective": "on top of, beneath, beside, behind, left of, right of, under, in front of, below, above, over, "
    "in the middle of",
    "proximity": "by, close to, near, far from, far away from",
    "topological": "connected to, detached from, has as a part, part of, contains, within, at, on, in, with, "
    "surrounding, among, consists of, out of, between, inside, outside, touching",
}
VSR_CATEGORY_OF = {relation: name for name, listed in VSR_CATEGORIES.items() for relation in listed.split(", ")}


@dataclass(frozen=True)
class Question:
    """
    Args:
        id: Its name in the dataset.
        text: The prompt, after its pictures.
        images: Its pictures, in order: encoded files, paths, URLs or PIL images.
        videos: Its videos instead: paths.
        choices: The possible answers, if they are listed.
        answer: The expected answer, as `rule` gives it.
        category: What the dataset says that it tests.
        rule: The name of a rule of `judge.RULES`.
    """

    id: str
    text: str
    images: list
    choices: list[str]
    answer: str
    category: str
    rule: str
    videos: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Benchmark:
    """
    Args:
        repo: Hub id of the dataset.
        split: Split that is evaluated.
        read: Makes a row a `Question`; its second argument is the dataset's local folder, if it has one.
        configs: Configurations to join; empty for the default.
        files: The split's files, if the repo does not say.
        videos: Whether it asks about videos, which must be in a local folder.
    """

    repo: str
    split: str
    read: Callable[[dict, Path | None], Question]
    configs: tuple[str, ...] = ()
    files: str | None = None
    videos: bool = False


def letter_of(answer: str) -> str:
    """The letter in an answer such as "(A)"."""
    return answer.strip().strip("()")


def list_choices(choices: list[str]) -> str:
    return "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def read_blink(row: dict, folder: Path | None) -> Question:
    images = [row[f"image_{number}"] for number in range(1, 5) if row[f"image_{number}"] is not None]
    text = f"{row['prompt']}\n{LETTER_ONLY}"
    return Question(row["idx"], text, images, row["choices"], letter_of(row["answer"]), row["sub_task"], "letter")


def read_cv_bench(row: dict, folder: Path | None) -> Question:
    text = f"{row['prompt']}\n{LETTER_ONLY}"
    category = f"{row['type']} {row['task']}"
    return Question(
        str(row["idx"]), text, [row["image"]], row["choices"], letter_of(row["answer"]), category, "letter"
    )


def read_embspatial(row: dict, folder: Path | None) -> Question:
    choices = row["answer_options"]
    text = f"{row['question']}\n{list_choices(choices)}\n{LETTER_ONLY}"
    answer = LETTERS[row["answer"]]
    return Question(str(row["question_id"]), text, [row["image"]], choices, answer, row["relation"], "letter")


def read_mmsi(row: dict, folder: Path | None) -> Question:
    """The choices are in the question's text."""
    text = f"{row['question'].strip()}\n{LETTER_ONLY}"
    images = [image if isinstance(image, dict) else {"bytes": image} for image in row["images"]]
    return Question(str(row["id"]), text, images, [""] * 4, letter_of(row["answer"]), row["question_type"], "letter")


def read_vsr(row: dict, folder: Path | None) -> Question:
    """A picture is that of the local folder's `images`, or the one that the row links to."""
    local = folder and folder / "images" / row["image"]
    image = str(local) if local and local.is_file() else row["image_link"]
    text = f"Is this statement about the picture true? {row['caption']}\nAnswer yes or no."
    category = VSR_CATEGORY_OF.get(row["relation"], "unallocated")
    answer = "yes" if row["label"] == 1 else "no"
    return Question(f"{row['image']} {row['caption']}", text, [image], ["yes", "no"], answer, category, "yes or no")


def parsed(value: Any) -> Any:
    """A nested value that the dataset stores as text."""
    return ast.literal_eval(value) if isinstance(value, str) else value


def draw_regions(picture: Pictures.Image, boxes: list[list[float]]) -> Pictures.Image:
    """The picture with the boxes [left, top, right, bottom] that the question calls Region [0], Region [1], ..."""
    picture = picture.convert("RGB")
    draw, size = ImageDraw.Draw(picture), max(12, max(picture.size) // 40)
    for number, (box, color) in enumerate(zip(boxes, cycle(("red", "blue", "lime", "yellow")))):  # noqa: B905
        left, top, right, bottom = (
            min(max(edge, 0), side - 1) for edge, side in zip(box, picture.size * 2, strict=True)
        )
        draw.rectangle((left, top, right, bottom), outline=color, width=max(2, size // 6))
        draw.text((left + 4, top + 4), f"Region [{number}]", fill=color, font_size=size)
    return picture


def open_picture(image: Any) -> Any:
    """A picture of a `Question` in a form that the processor reads; with its regions, if it has some."""
    if not isinstance(image, dict):
        return image
    picture = Pictures.open(image["path"] if image.get("bytes") is None else BytesIO(image["bytes"]))
    return draw_regions(picture, image["regions"]) if image.get("regions") else picture


REGION_PROMPTS = {
    "yes or no": "Answer yes or no.",
    "region": "Answer with the region only, such as Region [0].",
    "hour": "Answer with a direction on a clock, such as 3 o'clock.",
    "length": "Answer with a number and a unit, such as 1.5 meters.",
}


def rule_of_regions(kind: str, category: str) -> str:
    if kind == "quantitative":
        return "hour" if category == "direction" else "length"
    return "region" if category.endswith("choice") else "yes or no"


def read_spatialrgpt(row: dict, folder: Path | None) -> Question:
    info, boxes = parsed(row["qa_info"]), parsed(row["bbox"])
    rule = rule_of_regions(info["type"], info["category"])
    said = parsed(row["conversations"])[1]["value"]
    expected = RULES[rule][0](said, [])
    if expected is None:
        raise ValueError(
            f"SpatialRGPT-Bench's question {row['id']} has the answer {said!r}, in which there is no {rule}."
        )
    text = f"{row['text_q']} The picture shows each region as a box.\n{REGION_PROMPTS[rule]}"
    return Question(row["id"], text, [{**row["image"], "regions": boxes}], [], expected, info["category"], rule)


def read_vsibench(row: dict, folder: Path | None) -> Question:
    """A video is `DATASET/SCENE.mp4` in the local folder, where the repo's zip files unpack it."""
    video = Path(folder or "") / row["dataset"] / f"{row['scene_name']}.mp4"
    if not video.is_file():
        raise ValueError(f"There is no {video}. Unpack the zip files of {folder} there.")
    options = row["options"] or []
    rule, instruction = ("letter", LETTER_ONLY) if options else ("number", "Answer with a number only.")
    text = "\n".join([row["question"], *options, instruction])
    choices = [option.partition(". ")[2] for option in options]
    answer = str(row["ground_truth"])
    return Question(str(row["id"]), text, [], choices, answer, row["question_type"], rule, [str(video)])


def read_scene(row: dict, folder: Path | None) -> Question:
    kind = row["kind"]
    return Question(row["id"], row["question"], [row["image"]], list(KINDS[kind]), row["answer"], kind, "word")


BENCHMARKS = {
    "blink": Benchmark("BLINK-Benchmark/BLINK", "val", read_blink, configs=BLINK_TASKS),
    "cv_bench": Benchmark("nyu-visionx/CV-Bench", "test", read_cv_bench),
    "embspatial": Benchmark("FlagEval/EmbSpatial-Bench", "test", read_embspatial),
    "mmsi_bench": Benchmark("RunsenXu/MMSI-Bench", "test", read_mmsi),
    "spatialrgpt_bench": Benchmark("a8cheng/SpatialRGPT-Bench", "val", read_spatialrgpt),
    "vsibench": Benchmark("nyu-visionx/VSI-Bench", "test", read_vsibench, videos=True),
    "vsr": Benchmark("cambridgeltl/vsr_zeroshot", "test", read_vsr, files="test.jsonl"),
}


def find_dataset(repo: str, data_dir: str | None, videos: bool) -> tuple[str, Path | None]:
    """Where `load_dataset` finds a dataset, and its local folder; raises a `ValueError` if `data_dir` lacks it."""
    if data_dir is None and videos:
        raise ValueError(f"{repo} has videos in zip files. Download and unpack it, and give --data-dir.")
    if data_dir is None:
        return repo, None
    folder = Path(data_dir) / repo
    if not folder.is_dir():
        raise ValueError(
            f"{data_dir} has no {repo}. Omit --data-dir, or download it with `hf download --repo-type dataset {repo} "
            f"--local-dir {folder}`."
        )
    return str(folder), folder


def keep_encoded(dataset: Dataset) -> Dataset:
    """The dataset with pictures as files, which take a tenth of the memory."""
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def as_questions(dataset: Dataset, read: Callable[[dict, Path | None], Question], folder: Path | None) -> Dataset:
    """The dataset, which makes each row a `Question` when it is read."""

    def transform(batch: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        questions = [vars(read(row, folder)) for row in rows]
        return {name: [question[name] for question in questions] for name in questions[0]}

    return dataset.with_transform(transform)


def load(name: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """
    The questions of a benchmark, in an order that is the same everywhere, for a task file's `custom_dataset`.

    Args:
        name: A key of `BENCHMARKS`.
        data_dir: A folder with local copies of datasets, each in a folder named like its Hub repo; None: the Hub.
    """
    benchmark = BENCHMARKS[name]
    source, folder = find_dataset(benchmark.repo, data_dir, benchmark.videos)
    files = {benchmark.split: benchmark.files} if benchmark.files else None
    parts = [
        load_dataset(source, config, split=benchmark.split, data_files=files) for config in benchmark.configs or [None]
    ]
    dataset = keep_encoded(concatenate_datasets(parts)).shuffle(seed=SHUFFLE_SEED)
    return {"test": as_questions(dataset, benchmark.read, folder)}


def load_scenes(limit: int | None = None, **_: Any) -> dict[str, Dataset]:
    """
    Held-out questions about scenes, one of each kind after the other, for a task file's `custom_dataset`.

    Args:
        limit: How many are needed; None: all, `QUESTIONS_PER_KIND` of each kind.
    """
    per_kind = min(QUESTIONS_PER_KIND, -(-(limit or len(KINDS) * QUESTIONS_PER_KIND) // len(KINDS)))
    sorted_by_kind = held_out_cases(per_kind)
    cases = [case for number in range(per_kind) for case in sorted_by_kind[number::per_kind]]
    columns = {
        "id": [f"{case.question.kind} {number // len(KINDS)}" for number, case in enumerate(cases)],
        "image": [case.seen for case in cases],
        "question": [case.question.text for case in cases],
        "answer": [case.question.answer for case in cases],
        "kind": [case.question.kind for case in cases],
    }
    return {"test": as_questions(Dataset.from_dict(columns), read_scene, None)}


# What the task files name


def doc_to_text(doc: dict) -> str:
    text = doc["text"].replace(IMAGE, "").replace(VIDEO, "")
    return IMAGE * len(doc["images"]) + VIDEO * len(doc["videos"]) + text


def doc_to_image(doc: dict) -> list:
    return doc["images"] or doc["videos"]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    found, score = judge(results[0], doc["choices"], doc["answer"], doc["rule"])
    return {"acc": score, "parsed": float(found is not None)}
