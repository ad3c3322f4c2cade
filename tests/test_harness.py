"""Pins lm-eval (`make test-harness`): the README's own lines score held-out scenes, with the score it states."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.harness

ROOT = Path(__file__).parent.parent
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
