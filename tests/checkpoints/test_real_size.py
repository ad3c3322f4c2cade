"""Tests that a pair of real size (Cosmos VAE, Gemma 2 2B, random weights) converts in little memory, and loads."""

import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
import torch
from transformers import AutoModel, AutoProcessor, Gemma2Config

from benchmarks.sources import make_sources
from tests.helpers import ROOT


pytestmark = pytest.mark.real_size

MEMORY_LIMIT = 3_000_000_000

# The kernel's own count; `ru_maxrss` of a child would include what the parent held when it started the child.
CONVERT_AND_TELL_PEAK = """
import sys, convert_weights
status = convert_weights.main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), end="")
sys.exit(status)
"""


@pytest.fixture(scope="module")
def real_size_sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real-size")
    make_sources(folder, Gemma2Config())
    return folder


def test_real_size_converts_under_3_gb_and_loads(real_size_sources, tmp_path):
    output = tmp_path / "theworld"
    arguments = ["--vae", str(real_size_sources), "--gemma", str(real_size_sources / "gemma")]
    arguments += ["--output-dir", str(output)]
    start = perf_counter()
    finished = subprocess.run(
        [sys.executable, "-c", CONVERT_AND_TELL_PEAK, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = perf_counter() - start
    *report, peak_line = finished.stdout.splitlines()
    peak = int(peak_line.split()[1]) * 1024  # VmHWM: the largest resident size in kB, mapped files included
    print(*report, f"converted in {seconds:.0f} s, peak memory {peak:,} bytes", sep="\n")
    assert peak < MEMORY_LIMIT
    assert any(line.split() == ["total", "2,667,977,984", "5,335,955,968"] for line in report)

    model = AutoModel.from_pretrained(output, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    encoder = model.model.world_encoder
    assert sum(parameter.numel() for parameter in encoder.encoder.parameters()) == 53_595_872
    assert model.get_input_embeddings().weight.shape == (256_000, 2304)

    large = torch.zeros(3, 1024, 1024, dtype=torch.uint8)
    inputs = processor(text="<world>what is it", images=large, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4096  # at most 512 x 512 pixels by default
    small = processor(
        text="<world>what is it",
        images=torch.zeros(3, 64, 64, dtype=torch.uint8),
        size={"height": 64, "width": 64},
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**small, logits_to_keep=1).logits
    assert logits.shape == (1, 1, 256_000) and logits.isfinite().all()
