"""Pins lm-eval (`make test-harness`): the README's own lines score held-out scenes; prompts are those of a chat."""

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

from theworld import TheWorldProcessor


pytestmark = pytest.mark.harness

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readmes_commands_score_the_bundled_model(tmp_path):
    (block,) = (block for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) if "lm_eval " in block)
    _install, write, score = map(shlex.split, block.strip().splitlines())
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (write, [*score, "--device", "cpu", "--output_path", str(tmp_path)]):
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    (report,) = tmp_path.rglob("results_*.json")
    right = json.loads(report.read_text())["results"]["theworld_scenes"]["exact_match,none"]
    stated, total = map(int, re.search(r"(\d+) of (\d+) right \(`make test-harness`\)", README).groups())
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
