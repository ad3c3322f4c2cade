"""Pins the demo: right answers about the shown picture, counts and times, the picture it saves, clear refusals."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.films import write_film
from theworld.evaluation.clips import make_clip
from theworld.evaluation.scenes import SPLITS, draw_scene


ROOT = Path(__file__).parents[2]


def run_demo(*arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_demo_shows_prompt_counts_answer_and_times(convert):
    printed = run_demo(str(ROOT / "assets" / "grace_hopper.jpg"), "who?", "--model", str(convert("gemma2")))
    assert "512x600 pixels" in printed
    assert "<start_of_world><world> x 64<end_of_world>who?" in printed
    assert re.search(r"Tokens    \d+ in the prompt, 64 of them world tokens; \d+ in the answer", printed)
    assert re.search(r"^Answer    ", printed, flags=re.MULTILINE)
    for stage in (
        "load the model",
        "process the picture",
        "encode the picture",
        "the first token",
        "each further token",
    ):
        assert re.search(rf"{stage}.* \d+\.\d ms", printed), stage


def test_a_photograph_is_shown_and_read_upright(convert, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30), "red").save(tmp_path / "turned.jpg", exif=turned)
    arguments = ["--model", str(convert("gemma2")), "--save", str(tmp_path / "drawn.png")]
    assert "30x40 pixels" in run_demo(str(tmp_path / "turned.jpg"), "who?", *arguments)
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.width > 2 * 256


def test_make_demo_gives_three_right_answers(shown_scene, tmp_path):
    command = re.search(r"demo.py assets/scene.png (.*?) --save", (ROOT / "Makefile").read_text()).group(1)
    questions = re.findall(r'"([^"]*)"', command)
    printed = run_demo(str(ROOT / "assets" / "scene.png"), *questions, "--save", str(tmp_path / "demo.png"))
    right = {question.text: question.answer for question in shown_scene.questions}
    assert re.findall("^Answer    (.*)", printed, flags=re.MULTILINE) == [right[question] for question in questions]
    assert len(questions) == 3
    with Image.open(tmp_path / "demo.png") as drawn, Image.open(ROOT / "assets" / "demo.png") as shown:
        assert drawn.size == shown.size


def test_a_clip_is_read_as_one(tmp_path):
    clip = make_clip(SPLITS["test"][2])
    right = next(question for question in clip.questions if question.kind == "direction")
    printed = run_demo(str(ROOT / "assets" / "clip.png"), right.text, "--save", str(tmp_path / "clip.png"))
    assert "9 frames of 64x64 pixels, read as [1, 9, 3, 64, 64]" in printed and "[1, 3, 16, 8, 8]" in printed
    assert "0.000s<start_of_world><world_video> x 64<end_of_world>0.500s<start_of_world>" in printed
    assert "192 of them world tokens" in printed and f"Answer    {right.answer}\n" in printed
    with Image.open(tmp_path / "clip.png") as drawn:
        assert drawn.width > 2 * 256


def test_an_mp4_is_read_as_a_clip(tmp_path):
    clip = make_clip(SPLITS["test"][2])
    right = next(question for question in clip.questions if question.kind == "direction")
    frames = [np.asarray(frame) for frame in clip.frames]
    film = write_film(frames, [number / 8 for number in range(9)], codec="libx264rgb", pixels="rgb24")
    (tmp_path / "clip.mp4").write_bytes(film)
    printed = run_demo(str(tmp_path / "clip.mp4"), right.text, "--save", str(tmp_path / "clip.png"))
    assert (
        "9 frames of 64x64 pixels, read as [1, 9, 3, 64, 64]" in printed and f"Answer    {right.answer}\n" in printed
    )
    with Image.open(tmp_path / "clip.png") as drawn:
        assert drawn.width > 2 * 256


def test_the_shown_picture_is_a_scene_kept_from_training(shown_scene):
    with Image.open(ROOT / "assets" / "scene.png") as shown:
        assert shown.tobytes() == shown_scene.image.tobytes()


def test_the_demo_draws_a_scene_and_says_what_it_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run_demo("--scene", "7")
    expected = [question.answer for question in draw_scene(7).questions[:3]]
    assert re.findall("^Expected  (.*)", printed, flags=re.MULTILINE) == expected
    with Image.open(tmp_path / "scene-7.png") as drawn:
        assert drawn.width > 4 * 256


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([str(ROOT / "LICENSE"), "who?"], "LICENSE cannot be read as a picture"),
        ([str(ROOT / "LICENSE")], "give a PICTURE and a QUESTION"),
        ([str(ROOT / "LICENSE"), "who?", "--scene", "1"], "give --scene alone"),
    ],
)
def test_the_demo_refuses_what_it_cannot_show(arguments, message):
    finished = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), *arguments], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode and not finished.stdout
    assert re.search(rf"^demo.py: error: .*{message}", finished.stderr, flags=re.MULTILINE)
