"""Tests the bundled model: it loads from the root, answers right, and depends on its world tokens."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModel

from recipe.evaluate import CONDITIONS, LAST_FRAME, answer, score, table
from tests.helpers import ROOT
from tests.helpers.docs import read
from tests.helpers.fresh import run_fresh
from tests.helpers.generation import chat
from theworld.evaluation.clips import CLIP_KINDS
from theworld.evaluation.held_out import held_out_cases, held_out_clips
from theworld.evaluation.scenes import KINDS, SPLITS, draw_scene


RESULTS = json.loads((ROOT / "results" / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def cases():
    """207 questions that the model was not trained on, as many of each kind."""
    return held_out_cases(23)


def share_right(model, processor, cases, condition: str) -> float:
    return score(cases, answer(model, processor, cases, CONDITIONS[condition]))["overall"]["share"]


def test_held_out_scenes_are_answered(bundled_model, bundled_processor, cases):
    assert share_right(bundled_model, bundled_processor, cases, "world tokens") >= 0.93


@pytest.mark.parametrize("condition", ["zeroed", "of another image", "no image"])
def test_without_world_tokens_it_answers_like_blind_gemma(condition, bundled_model, bundled_processor, cases):
    blind = RESULTS["scores"]["blind Gemma"]["overall"]["share"]
    without = share_right(bundled_model, bundled_processor, cases, condition)
    spread = (blind * (1 - blind) / len(cases)) ** 0.5
    assert abs(without - blind) < 4 * spread


@pytest.fixture(scope="module")
def clips():
    """80 questions about clips that it was not trained on, as many of each kind."""
    return held_out_clips(20)


def test_held_out_clips_are_answered(bundled_model, bundled_processor, clips):
    answers = answer(bundled_model, bundled_processor, clips, CONDITIONS["world tokens"])
    assert score(clips, answers)["clips"]["share"] >= 0.8
    assert RESULTS["scores"]["world tokens"]["clips"]["share"] >= 0.9


def test_the_last_frame_alone_gives_chance_on_clips(bundled_model, bundled_processor, clips):
    chance = sum(1 / len(answers) for answers in CLIP_KINDS.values()) / len(CLIP_KINDS)
    assert RESULTS["scores"][LAST_FRAME]["clips"]["interval"][0] < chance + 0.05
    answers = answer(bundled_model, bundled_processor, [clip.last_frame for clip in clips], CONDITIONS["world tokens"])
    assert score(clips, answers)["clips"]["share"] < chance + 4 * (chance * (1 - chance) / len(clips)) ** 0.5


def test_the_published_scores_are_of_these_weights():
    weights = (ROOT / "model.safetensors").read_bytes()
    for run in (*CONDITIONS, LAST_FRAME):
        assert RESULTS["weights"][run] == hashlib.sha256(weights).hexdigest()
    assert len(weights) < 10e6
    assert RESULTS["questions"] == {"scenes": 2700, "clips": 1200}
    assert RESULTS["test scenes seen in training"] == RESULTS["test clips seen in training"] == 0
    assert table(RESULTS["scores"]) == (ROOT / "results" / "evaluation.md").read_text().strip()
    assert table(RESULTS["scores"]) in read("docs/evaluation.md")


def test_blind_gemma_answers_at_chance():
    chance = sum(1 / len(answers) for answers in KINDS.values()) / len(KINDS)
    low, high = RESULTS["scores"]["blind Gemma"]["overall"]["interval"]
    assert low - 0.02 < chance < high + 0.02


def say(model, processor, inputs, **options) -> list[str]:
    output = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]


@pytest.fixture(scope="module")
def conversations():
    """Scenes that it was not trained on, two questions each."""
    scenes = [draw_scene(seed) for seed in SPLITS["test"][-200:]]
    return [(scene, *scene.questions[:2]) for scene in scenes if len(scene.questions) > 1][:60]


def test_a_second_question_is_answered(bundled_model, bundled_processor, conversations):
    right = 0
    for scene, first, second in conversations:
        inputs = chat(bundled_processor, scene.image, first.text, first.answer, second.text)
        right += say(bundled_model, bundled_processor, inputs) == [second.answer]
    assert right / len(conversations) >= 0.85


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=lambda o: next(iter(o)),
)
def test_every_way_of_generating_gives_the_right_answer(options, bundled_model, bundled_processor, conversations):
    right = 0
    for scene, question, _ in conversations[:20]:
        inputs = chat(bundled_processor, scene.image, question.text)
        right += say(bundled_model, bundled_processor, inputs, **options) == [question.answer]
    assert right >= 17


def test_bfloat16_answers_as_well(bundled_processor, cases):
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.bfloat16).eval()
    assert share_right(model, bundled_processor, cases, "world tokens") >= 0.92


def test_a_fresh_process_answers_without_the_package(shown_scene, tmp_path, monkeypatch):
    code = """
import sys
sys.modules["theworld"] = None  # as where the package is not installed
from PIL import Image
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
for question in sys.argv[1:]:
    content = [{"type": "image", "image": Image.open("assets/scene.png")}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    output = model.generate(**inputs)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
    right = {question.text: question.answer for question in shown_scene.questions}
    monkeypatch.chdir(ROOT)
    printed = run_fresh("-c", code, *right, cache=tmp_path)
    assert printed.split("\n")[:-1] == list(right.values())
