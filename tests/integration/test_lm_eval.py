"""Tests lm-eval (`make test-harness`): the docs' own lines score held-out scenes, and prompts are those of a chat."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import ROOT
from tests.helpers.docs import sentences, snippet
from theworld import TheWorldProcessor


pytestmark = pytest.mark.harness


def test_the_docs_commands_score_the_bundled_model(tmp_path):
    _install, write, score = map(shlex.split, snippet("docs/evaluation.md", "lm_eval ", "bash").commands)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (write, [*score, "--device", "cpu", "--output_path", str(tmp_path)]):
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    (report,) = tmp_path.rglob("results_*.json")
    right = json.loads(report.read_text())["results"]["theworld_scenes"]["exact_match,none"]
    page = sentences("docs/evaluation.md")
    stated, total = map(int, re.search(r"(\d+) of (\d+) right \(`make test-harness`\)", page).groups())
    assert round(right * total) == stated


def test_lm_evals_prompts_are_those_of_a_chat():
    from lm_eval.models.hf_vlms import HFMultimodalLM

    image = Image.open(ROOT / "assets" / "scene.png")
    harness = HFMultimodalLM(pretrained=str(ROOT), trust_remote_code=True, device="cpu")
    text = harness.apply_chat_template([{"role": "user", "content": "<image>How many circles are there?"}])
    inputs = harness.tok_batch_multimodal_encode([text, text], [[image], [image]])
    content = [{"type": "image", "image": image}, {"type": "text", "text": "How many circles are there?"}]
    expected = TheWorldProcessor.from_pretrained(ROOT).apply_chat_template(
        [[{"role": "user", "content": content}]] * 2,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs.keys() == expected.keys() and (inputs["input_ids"][:, :2] == 2).sum(-1).tolist() == [1, 1]
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
