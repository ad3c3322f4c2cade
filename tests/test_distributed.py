"""Pins training on two processes, by the README's own commands: the losses of one, and who holds which weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file
from training import options_of, write_conversations
from transformers import AutoModel


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
needs_5_23 = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="the Trainer takes models that from_pretrained shared out from transformers 5.23 on",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("dataset"))


def run(command: str, dataset: Path, output: Path, rows: int) -> list[dict]:
    """Runs a command of the README for 20 steps, with a script that reports afterwards; the reports by rank."""
    launcher = command.split()[0]
    words = command.replace("train.py", str(ROOT / "tests" / "reporting_train.py")).split()
    words[0] = str(Path(sys.executable).parent / launcher)
    options = {"train": "all", "max_steps": 20, "per_device_train_batch_size": rows, "learning_rate": 1e-4}
    words += options_of(dataset=dataset, output_dir=output, **options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(words, cwd=output.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in sorted(output.glob("report-*.json"))]


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of the same 20 steps in one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    (report,) = run("python train.py", dataset, output, rows=4)
    return report["losses"], load_file(output / "model.safetensors")


def command_of(pattern: str) -> str:
    (command,) = re.findall(rf"^(?:accelerate launch|torchrun) .*{pattern}.*$", README, flags=re.MULTILINE)
    return command


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        ("--num_processes 2", 2),
        pytest.param("--fsdp_size 2", 2, marks=needs_5_23),
        pytest.param("--tp_size 2", 4, marks=needs_5_23),
    ],
    ids=["DDP", "FSDP2", "TP"],
)
def test_two_processes_have_the_losses_of_one(pattern, rows, alone, dataset, tmp_path):
    reports = run(command_of(pattern), dataset, tmp_path / "run", rows)
    losses, weights = alone
    assert len(reports) == 2 and len(losses) == 20
    for report in reports:
        assert report["losses"] == pytest.approx(losses, abs=1e-4)

    held = reports[0]["held"]
    if "num_processes" in pattern:
        assert reports[0]["wrapper"] == "DistributedDataParallel" and not held
    elif "fsdp" in pattern:
        assert held.keys() == set(reports[0]["parameters"])
        assert sum(share <= 0.51 for share in held.values()) > 0.9 * len(held)  # but vectors of one number
    else:
        sharded = {name for name, share in held.items() if share == 0.5}
        for matrix in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            assert (
                f"model.language_model.layers.3.{'self_attn' if matrix[1] == '_' else 'mlp'}.{matrix}.weight"
                in sharded
            )

    # What they saved is an ordinary checkpoint.
    model = AutoModel.from_pretrained(tmp_path / "run", trust_remote_code=True)
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.language_model.embed_tokens.weight"].data_ptr()
    for name, tensor in weights.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-3, rtol=1e-2, msg=name)
