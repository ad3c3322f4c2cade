"""Pins the bundled model: it loads from the root as it is, answers right, and from its world tokens alone."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import chat
from transformers import AutoModel, AutoProcessor

from recipe.evaluate import CONDITIONS, LAST_FRAME, answer, held_out_cases, held_out_clips, score, table
from tests.helpers.fresh import run_fresh
from theworld.evaluation.clips import CLIP_KINDS
from theworld.evaluation.scenes import KINDS, SPLITS, draw_scene


ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "results" / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def cases():
    """207 questions that the model was not trained on, as many of each kind."""
    return held_out_cases(23)


def share_right(model, processor, cases, condition: str) -> float:
    return score(cases, answer(model, processor, cases, CONDITIONS[condition]))["overall"]["share"]


def test_it_answers_what_it_never_saw(model, processor, cases):
    assert share_right(model, processor, cases, "world tokens") >= 0.93


@pytest.mark.parametrize("condition", ["zeroed", "of another image", "no image"])
def test_without_its_world_tokens_it_is_as_good_as_blind(condition, model, processor, cases):
    blind = RESULTS["scores"]["blind Gemma"]["overall"]["share"]
    without = share_right(model, processor, cases, condition)
    spread = (blind * (1 - blind) / len(cases)) ** 0.5
    assert abs(without - blind) < 4 * spread


@pytest.fixture(scope="module")
def clips():
    """80 questions about clips that it was not trained on, as many of each kind."""
    return held_out_clips(20)


def test_it_answers_about_clips_it_never_saw(model, processor, clips):
    answers = answer(model, processor, clips, CONDITIONS["world tokens"])
    assert score(clips, answers)["clips"]["share"] >= 0.8
    assert RESULTS["scores"]["world tokens"]["clips"]["share"] >= 0.9


def test_of_a_clips_last_frame_alone_it_knows_little_more_than_chance(model, processor, clips):
    chance = sum(1 / len(answers) for answers in CLIP_KINDS.values()) / len(CLIP_KINDS)
    assert RESULTS["scores"][LAST_FRAME]["clips"]["interval"][0] < chance + 0.05
    answers = answer(model, processor, [clip.last_frame for clip in clips], CONDITIONS["world tokens"])
    assert score(clips, answers)["clips"]["share"] < chance + 4 * (chance * (1 - chance) / len(clips)) ** 0.5


def test_the_published_scores_are_of_these_weights():
    weights = (ROOT / "model.safetensors").read_bytes()
    for run in (*CONDITIONS, LAST_FRAME):
        assert RESULTS["weights"][run] == hashlib.sha256(weights).hexdigest()
    assert len(weights) < 10e6
    assert RESULTS["questions"] == {"scenes": 2700, "clips": 1200}
    assert RESULTS["test scenes seen in training"] == RESULTS["test clips seen in training"] == 0
    readme = (ROOT / "README.md").read_text()
    assert table(RESULTS["scores"]) == (ROOT / "results" / "evaluation.md").read_text().strip()
    assert table(RESULTS["scores"]) in readme


def test_blind_guessing_earns_chance():
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


def test_it_answers_a_second_question_after_a_first(model, processor, conversations):
    right = 0
    for scene, first, second in conversations:
        inputs = chat(processor, scene.image, first.text, first.answer, second.text)
        right += say(model, processor, inputs) == [second.answer]
    assert right / len(conversations) >= 0.85


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=lambda o: next(iter(o)),
)
def test_every_way_of_generating_gives_the_right_answer(options, model, processor, conversations):
    right = 0
    for scene, question, _ in conversations[:20]:
        inputs = chat(processor, scene.image, question.text)
        right += say(model, processor, inputs, **options) == [question.answer]
    assert right >= 17


def test_in_bfloat16_it_answers_as_well(processor, cases):
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.bfloat16).eval()
    assert share_right(model, processor, cases, "world tokens") >= 0.92


def test_a_fresh_process_asks_it_with_nothing_installed_or_built(shown_scene, tmp_path, monkeypatch):
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
