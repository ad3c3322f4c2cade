"""Small copies of public benchmarks, in the schemas of their Hub repos; every picture has its own color."""

import json
from collections.abc import Iterator
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from tests.helpers.films import write_film


def pictures() -> Iterator[Pictures.Image]:
    for number in count():
        yield Pictures.new("RGB", (96, 64), (40 * number % 256, 90 * number % 256, 170 * number % 256))


def write_parquet(rows: list[dict], features: dict, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(file)


def write_card(folder: Path, configs: dict[str, tuple[str, str]]) -> None:
    """The repo's README.md: split and files of each configuration."""
    lines = ["---", "configs:"]
    for name, (split, path) in configs.items():
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}", f"    path: {path}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_blink(folder: Path, tasks: tuple[str, ...]) -> None:
    """A row for each of the 14 tasks, about one to four pictures."""
    strings = ("idx", "question", "sub_task", "answer", "prompt", "explanation")
    images, features = pictures(), {name: Value("string") for name in strings}
    features |= {"choices": List(Value("string"))} | {f"image_{number}": Image() for number in range(1, 5)}
    for number, task in enumerate(tasks):
        shown = {f"image_{each}": next(images) if each <= 1 + number % 4 else None for each in range(1, 5)}
        row = {
            **dict.fromkeys(strings, ""),
            "idx": f"val_{task}_1",
            "sub_task": task,
            "question": "Which?",
            "choices": ["this", "that"],
            "answer": "(AB"[:1] + "AB"[number % 2] + ")",
            "prompt": "Which of them is it?\nSelect from the following choices.\n(A) this\n(B) that",
            **shown,
        }
        write_parquet([row], features, folder / task / "val-00000-of-00001.parquet")
    write_card(folder, {task: ("val", f"{task}/val-*") for task in tasks})


def write_cv_bench(folder: Path) -> None:
    images, strings = pictures(), ("type", "task", "question", "answer", "prompt", "filename", "source")
    features = {"idx": Value("int64"), "image": Image(), "choices": List(Value("string"))}
    features |= {name: Value("string") for name in strings}
    for kind, tasks, source in (("2D", ("Count", "Relation"), "COCO"), ("3D", ("Depth", "Distance"), "Omni3D")):
        rows = [
            {
                **dict.fromkeys(strings, ""),
                "idx": number,
                "type": kind,
                "task": task,
                "image": next(images),
                "question": "How many chairs are there?",
                "choices": ["0", "3", "2"],
                "answer": "(C)",
                "prompt": "How many chairs are there? Select from the following choices.\n(A) 0\n(B) 3\n(C) 2",
                "source": source,
            }
            for number, task in enumerate(tasks)
        ]
        write_parquet(rows, features, folder / f"test_{kind.lower()}.parquet")
    write_card(folder, {"default": ("test", "test*.parquet")})


def write_embspatial(folder: Path) -> None:
    images, strings = pictures(), ("question_id", "question", "relation", "data_source")
    features = {name: Value("string") for name in strings}
    features |= {"image": Image(), "answer_options": List(Value("string")), "answer": Value("int64")}
    rows = [
        {
            "question_id": f"mp3d_{number}",
            "question": "What is the position of the bed relative to the lamp?",
            "relation": relation,
            "answer": number,
            "answer_options": ["above", "below", "left", "right"],
            "image": next(images),
            "data_source": "mp3d",
        }
        for number, relation in enumerate(("above", "under", "left", "right"))
    ]
    write_parquet(rows, features, folder / "data" / "test-00000-of-00001.parquet")
    write_card(folder, {"default": ("test", "data/test-*")})


def write_mmsi(folder: Path) -> None:
    """Pictures as bytes in a list."""
    images, strings = pictures(), ("question_type", "question", "answer", "thought")
    features = {"id": Value("int64"), "images": List(Value("binary"))} | {name: Value("string") for name in strings}
    rows = []
    for number, kind in enumerate(("MSR", "Motion (Cam.)", "Positional Relationship (Cam.–Obj.)")):
        encoded = []
        for _ in range(2 + number % 2):
            next(images).save(file := BytesIO(), "JPEG")
            encoded.append(file.getvalue())
        question = "Where does the camera turn?\nOptions: A: Left, B: Right, C: Up, D: Down"
        row = {"id": number, "images": encoded, "question_type": kind, "question": question}
        rows.append({**row, "answer": "ABCD"[number], "thought": ""})
    write_parquet(rows, features, folder / "MMSI_Bench.parquet")
    write_card(folder, {"default": ("test", "MMSI_Bench.parquet")})


REGIONS = (
    (
        "qualitative",
        "below_predicate",
        "Is Region [0] below Region [1]?",
        "Incorrect, Region [0] is not below Region [1].",
    ),
    ("qualitative", "left_choice", "Which is more to the left?", "Region [1] is more to the left."),
    ("quantitative", "width_data", "How wide is Region [0]?", "Region [0] is 35.9 inches wide."),
    (
        "quantitative",
        "direction",
        "Where is Region [1]?",
        "Region [0] will find Region [1] around the 10 o'clock direction.",
    ),
)


def write_spatialrgpt(folder: Path) -> None:
    """Nested columns as text, as the repo has them."""
    images, strings = pictures(), ("id", "image_info", "text_q", "qa_info", "conversations", "bbox", "rle")
    features = {"image": Image()} | {name: Value("string") for name in strings}
    rows = [
        {
            "id": f"{kind}_{number}",
            "image": next(images),
            "image_info": str({"file_path": "a.jpg", "height": 64, "width": 96}),
            "text_q": question,
            "qa_info": str({"type": kind, "category": category, "class": ["bed", "lamp"]}),
            "conversations": str([{"from": "human", "value": question}, {"from": "gpt", "value": answer}]),
            "bbox": str([[-3, 0, 40.5, 30], [50, 10, 120, 60]]),
            "rle": "[]",
        }
        for number, (kind, category, question, answer) in enumerate(REGIONS)
    ]
    write_parquet(rows, features, folder / "data" / "val-00000-of-00001.parquet")
    write_card(folder, {"default": ("val", "data/val-*")})


def write_vsr(folder: Path) -> None:
    """JSONL files, and a folder with the pictures that the rows link to."""
    (folder / "images").mkdir(parents=True)
    relations, lines = ("in front of", "touching", "facing", "next to"), []
    for number, (relation, image) in enumerate(zip(relations, pictures(), strict=False)):
        name = f"{number:012}.jpg"
        image.save(folder / "images" / name)
        row = {"image": name, "image_link": f"http://example.com/{name}", "relation": relation, "label": number % 2}
        validators = {"annotator_id": 31, "vote_true_validator_id": "[2, 6]", "vote_false_validator_id": "[]"}
        lines.append(json.dumps({**row, "caption": f"The cat is {relation} the bed.", **validators}) + "\n")
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(lines))


VIDEO_QUESTIONS = (
    ("object_counting", "How many chair(s) are in this room?", None, "4"),
    ("room_size_estimation", "What is the size of this room (in square meters)?", None, "23.5"),
    ("object_rel_distance", "Which object is the closest?", ["A. bed", "B. lamp", "C. door", "D. sofa"], "B"),
    ("object_rel_direction_hard", "Where is the lamp?", ["A. left", "B. right", "C. back"], "C"),
)


def write_vsibench(folder: Path) -> None:
    """Also the videos, as the repo's zip files unpack them; they differ in length and size."""
    strings = ("dataset", "scene_name", "question_type", "question", "ground_truth")
    features = {"id": Value("int64"), "options": List(Value("string"))} | {name: Value("string") for name in strings}
    rows = []
    for number, (kind, question, options, answer) in enumerate(VIDEO_QUESTIONS):
        row = {"id": number, "dataset": "scannet", "scene_name": f"scene{number}", "question_type": kind}
        rows.append({**row, "question": question, "options": options, "ground_truth": answer})
        length, width = 6 + number, 64 + 16 * number
        frames = [np.full((64, width, 3), 20 * each + number, dtype=np.uint8) for each in range(length)]
        film = write_film(frames, [each / 8 for each in range(length)])
        (folder / "scannet").mkdir(parents=True, exist_ok=True)
        (folder / "scannet" / f"scene{number}.mp4").write_bytes(film)
    write_parquet(rows, features, folder / "test.parquet")
    write_card(folder, {"full": ("test", "test.parquet")})
