"""Loads saved folders as users do: in a new process, with an empty cache, without the package."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch


LOAD = """
import sys

sys.modules["theworld"] = None  # as on a machine where the package is not installed
import torch
from transformers import AutoModel, AutoProcessor

folder, *saved = sys.argv[1:]
inputs, logits = torch.load(f"{folder}/inputs.pt"), []
for each in saved:
    model = AutoModel.from_pretrained(each, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(each, trust_remote_code=True)
    assert type(processor).__name__ == "TheWorldProcessor", processor
    with torch.no_grad():
        logits.append(model(**inputs).logits)
torch.save(logits, f"{folder}/logits.pt")
"""


def run_fresh(*arguments, cache: Path) -> str:
    """What Python prints for these arguments, in a new process with this cache."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def load_fresh(inputs: Mapping[str, torch.Tensor], *folders: Path) -> list[torch.Tensor]:
    """Loads saved models with their processors by the Auto classes; gives the logits of each for `inputs`."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dict(inputs), f"{folder}/inputs.pt")
        run_fresh("-c", LOAD, folder, *folders, cache=Path(folder) / "cache")
        return torch.load(f"{folder}/logits.pt")
