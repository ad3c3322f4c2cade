"""Pins the bundled model: it loads from the root as it is, answers right, and from its world tokens alone."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor

from recipe.evaluate import CONDITIONS, answer, held_out_cases, score, table
from recipe.scenes import KINDS


ROOT = Path(__file__).parent.parent
RESULTS = json.loads((ROOT / "results" / "evaluation.json").read_text())


def share(of_run: dict) -> float:
    return of_run["overall"]["right"] / of_run["overall"]["total"]


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


def test_it_answers_what_it_never_saw(model, processor, cases):
    assert share(score(cases, answer(model, processor, cases, CONDITIONS["world tokens"]))) >= 0.93


@pytest.mark.parametrize("condition", ["zeroed", "of another image", "no image"])
def test_without_its_world_tokens_it_is_as_good_as_blind(condition, model, processor, cases):
    blind = share(RESULTS["scores"]["blind Gemma"])
    without = share(score(cases, answer(model, processor, cases, CONDITIONS[condition])))
    spread = (blind * (1 - blind) / len(cases)) ** 0.5
    assert abs(without - blind) < 4 * spread


def test_the_published_scores_are_of_these_weights():
    weights = (ROOT / "model.safetensors").read_bytes()
    assert RESULTS["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert len(weights) < 10e6
    assert RESULTS["questions"] >= 2000 and RESULTS["test scenes seen in training"] == 0
    readme = (ROOT / "README.md").read_text()
    assert table(RESULTS["scores"]) == (ROOT / "results" / "evaluation.md").read_text().strip()
    assert table(RESULTS["scores"]) in readme


def test_blind_guessing_earns_chance():
    chance = sum(1 / len(answers) for answers in KINDS.values()) / len(KINDS)
    low, high = RESULTS["scores"]["blind Gemma"]["overall"]["interval"]
    assert low - 0.02 < chance < high + 0.02


def test_a_fresh_process_asks_it_with_nothing_installed_or_built(tmp_path):
    code = """
import sys
sys.modules["theworld"] = None  # as where the package is not installed
from PIL import Image
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
content = [{"type": "image", "image": Image.open("assets/scene.png")}, {"type": "text", "text": sys.argv[1]}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for question, right in json.loads((ROOT / "assets" / "scene.json").read_text()):
        finished = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, question],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.strip() == right
