"""Tests `theworld ask`: right answers about a picture, counts and times, the picture it saves, clear errors."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import ROOT
from tests.helpers.commands import run_theworld
from theworld.evaluation.clips import make_clip
from theworld.evaluation.scenes import SPLITS, draw_scene


def ask(*words: str | Path) -> str:
    """What `theworld ask` prints."""
    finished = run_theworld("ask", *words)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_report_has_prompt_counts_answer_and_times(convert):
    printed = ask(ROOT / "assets" / "grace_hopper.jpg", "who?", "--model", convert("gemma2"))
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


def test_exif_orientation_is_applied(convert, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30), "red").save(tmp_path / "turned.jpg", exif=turned)
    arguments = ["--model", convert("gemma2"), "--save", tmp_path / "drawn.png"]
    assert "30x40 pixels" in ask(tmp_path / "turned.jpg", "who?", *arguments)
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.width > 2 * 256


def test_a_wide_picture_keeps_its_shape(convert, tmp_path):
    draw_scene(1).image.resize((200, 80)).save(tmp_path / "wide.png")
    arguments = ["--model", convert("gemma2", "--max-pixels", "16384"), "--save", tmp_path / "drawn.png"]
    printed = ask(tmp_path / "wide.png", "what?", *arguments)
    assert "200x80 pixels, read as [1, 3, 80, 200]" in printed and "250 of them world tokens" in printed
    with Image.open(tmp_path / "drawn.png") as drawn:
        picture = drawn.crop((16, 16, 16 + 256, 16 + 256))
    below = picture.crop((0, round(256 * 80 / 200), 256, 256)).getextrema()
    assert below == ((255, 255),) * 3 and picture.getextrema() != below


def test_make_demo_gives_three_right_answers(shown_scene, tmp_path):
    command = re.search(r"theworld ask assets/scene.png (.*?) --save", (ROOT / "Makefile").read_text()).group(1)
    questions = re.findall(r'"([^"]*)"', command)
    printed = ask(ROOT / "assets" / "scene.png", *questions, "--save", tmp_path / "demo.png")
    right = {question.text: question.answer for question in shown_scene.questions}
    assert re.findall("^Answer    (.*)", printed, flags=re.MULTILINE) == [right[question] for question in questions]
    assert len(questions) == 3
    with Image.open(tmp_path / "demo.png") as drawn, Image.open(ROOT / "assets" / "demo.png") as shown:
        assert drawn.size == shown.size


def test_an_animation_is_read_as_a_video(tmp_path):
    clip = make_clip(SPLITS["test"][2])
    right = next(question for question in clip.questions if question.kind == "direction")
    printed = ask(ROOT / "assets" / "clip.png", right.text, "--save", tmp_path / "clip.png")
    assert "9 frames of 64x64 pixels, read as [1, 9, 3, 64, 64]" in printed and "[1, 3, 16, 8, 8]" in printed
    assert "0.000s<start_of_world><world_video> x 64<end_of_world>0.500s<start_of_world>" in printed
    assert "192 of them world tokens" in printed and f"Answer    {right.answer}\n" in printed
    with Image.open(tmp_path / "clip.png") as drawn:
        assert drawn.width > 2 * 256


def test_the_docs_picture_is_a_held_out_scene(shown_scene):
    with Image.open(ROOT / "assets" / "scene.png") as shown:
        assert shown.tobytes() == shown_scene.image.tobytes()


def test_a_drawn_scene_comes_with_expected_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = ask("--scene", "7")
    expected = [question.answer for question in draw_scene(7).questions[:3]]
    assert re.findall("^Expected  (.*)", printed, flags=re.MULTILINE) == expected
    with Image.open(tmp_path / "scene-7.png") as drawn:
        assert drawn.width > 4 * 256


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([ROOT / "LICENSE", "who?"], "LICENSE cannot be read as a picture"),
        ([ROOT / "LICENSE"], "give a PICTURE and a QUESTION"),
        ([ROOT / "LICENSE", "who?", "--scene", "1"], "give --scene alone"),
    ],
)
def test_bad_arguments_are_rejected(arguments, message):
    finished = run_theworld("ask", *arguments)
    assert finished.returncode and not finished.stdout
    assert re.search(rf"^theworld ask: error: .*{message}", finished.stderr, flags=re.MULTILINE)
