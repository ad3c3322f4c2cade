"""Tests that LLaVA's format and a column `image` train as the columns `messages` and `images` do."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image

from tests.helpers import ROOT
from tests.helpers.training_runs import losses_of, run_train
from theworld.evaluation.scenes import draw_scene
from theworld.training.data import ConversationCollator, load_conversations
from theworld.training.precompute_latents import main as precompute


def said(role: str, *parts: str) -> dict:
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def turns(*values: str) -> list[dict]:
    """LLaVA's turns, of the human and the model."""
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


# The same rows in both formats: an image first, an image between texts, two images, none.
LLAVA = [
    {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat is it?", "a star", "Sure?", "yes")},
    {"id": "2", "image": "sub/b.png", "conversations": turns("What is <image> this?", "a circle")},
    {"id": "3", "image": ["a.png", "sub/b.png"], "conversations": turns("<image><image>\nThe same?", "no")},
    {"id": "4", "image": None, "conversations": turns("How many?", "3")},
]
IMAGES = [["a.png"], ["sub/b.png"], ["a.png", "sub/b.png"], []]
OURS = [
    [
        said("user", "<image>", "What is it?"),
        said("assistant", "a star"),
        said("user", "Sure?"),
        said("assistant", "yes"),
    ],
    [said("user", "What is", "<image>", "this?"), said("assistant", "a circle")],
    [said("user", "<image>", "<image>", "The same?"), said("assistant", "no")],
    [said("user", "How many?"), said("assistant", "3")],
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with images."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "sub/b.png")):
        draw_scene(seed).image.save(tmp_path / "images" / name)
    return tmp_path


@pytest.fixture
def collator(bundled_processor):
    return ConversationCollator(bundled_processor)


def write(file: Path, rows: list[dict]) -> str:
    text = json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text)
    return str(file)


def with_lists() -> list[dict]:
    """LLaVA's rows with `image` as a list in all, because `datasets` reads one type in a column."""
    return [{**row, "image": images} for row, images in zip(LLAVA, IMAGES, strict=True)]


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_llava_rows_make_the_batch_of_messages(folder, collator, name):
    ours = write(folder / "ours.jsonl", [{"messages": m, "images": i} for m, i in zip(OURS, IMAGES, strict=True)])
    llava = write(folder / name, with_lists())
    expected, batch = (
        collator(list(load_conversations(each, "train", collator, folder / "images"))) for each in (ours, llava)
    )
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_llava_rows_with_one_path_or_null_are_read(folder, collator):
    file = write(folder / "llava.json", [LLAVA[number] for number in (0, 1, 3)])
    rows = load_conversations(file, "train", collator, folder / "images")
    assert [len(images) for images in rows["images"]] == [1, 1, 0]


def test_a_column_of_images_is_read(folder, collator):
    """As an image folder, or a Parquet file with embedded images, has it."""
    paths = [str(folder / "images" / "a.png"), None]
    rows = Dataset.from_dict({"image": paths, "messages": [OURS[0], OURS[3]]}).cast_column("image", Image())
    (folder / "parquet").mkdir()
    rows.to_parquet(folder / "parquet" / "train.parquet")
    loaded = load_conversations(str(folder / "parquet"), "train", collator)
    assert [len(images) for images in loaded["images"]] == [1, 0]
    assert loaded[0]["images"][0].tobytes() == draw_scene(0).image.tobytes()


def test_training_and_latents_take_an_image_root(folder):
    dataset, root = write(folder / "llava.json", with_lists()), str(folder / "images")
    arguments = ["--model", str(ROOT), "--dataset", dataset, "--output-dir", str(folder / "latents")]
    assert precompute([*arguments, "--image-root", root, "--dtype", "float32"]) == 0
    pixels, latents = (
        losses_of(run_train(dataset=source, output_dir=folder / name, max_steps=2, **options).state.log_history)
        for name, source, options in (
            ("of pixels", dataset, {"image_root": root}),
            ("of latents", folder / "latents", {}),
        )
    )
    assert latents == pytest.approx(pixels, abs=1e-4)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "robot", "value": "a"}, "Row 1 .* Turn 1 must have `from`, one of human, gpt, system"),
        ({"from": "human", "value": None}, "Row 1 .* and a text as `value`"),
        ({"from": "human", "value": "<image><image>"}, "Row 1 "),
        ({"from": "human", "value": "<image><video>\nWhat?"}, "Row 1 .*<video>"),
    ],
    ids=["role", "no text", "more images", "video"],
)
def test_bad_turns_are_rejected_with_their_row(folder, collator, turn, message):
    bad = {"id": "5", "image": "a.png", "conversations": [turn, {"from": "gpt", "value": "yes"}]}
    with pytest.raises(ValueError, match=message):
        load_conversations(write(folder / "llava.json", [LLAVA[0], bad]), "train", collator, folder / "images")


def test_paths_stay_below_the_image_root(folder, collator):
    draw_scene(3).image.save(folder / "outside.png")
    file = write(folder / "llava.json", [{**LLAVA[0], "image": "../outside.png"}])
    with pytest.raises(ValueError, match="Row 0 .* outside the dataset's folder"):
        load_conversations(file, "train", collator, folder / "images")
