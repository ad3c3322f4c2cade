"""Pins that a pair of real size (Cosmos VAE, Gemma 2 2B, random weights) converts in little memory, and loads."""

import itertools
import json
import string
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_sources import make_tokenizer
from transformers import AutoModel, AutoProcessor, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerBase


pytestmark = pytest.mark.real_size

ROOT = Path(__file__).parent.parent
MEMORY_LIMIT = 3_000_000_000

# The kernel's own count; `ru_maxrss` of a child would include what the parent held when it started the child.
CONVERT_AND_TELL_PEAK = """
import sys, convert_weights
status = convert_weights.main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), end="")
sys.exit(status)
"""


def fill_with_noise(module: torch.nn.Module) -> torch.nn.Module:
    """Fills a module from the meta device with repeated noise, which is much faster than fresh noise."""
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for tensor in module.parameters():
        repeats = -(-tensor.numel() // len(noise))
        tensor.data.copy_(noise.repeat(repeats)[: tensor.numel()].view(tensor.shape))
    return module


def make_large_tokenizer() -> PreTrainedTokenizerBase:
    """A Gemma tokenizer of Gemma 2's dimensions: 256,000 entries, 480,000 merges, a tokenizer.json of 30 MB."""
    small = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    letters = string.ascii_letters + string.digits
    words = ["".join(word) for length in (2, 3) for word in itertools.product(letters, repeat=length)]
    vocabulary = dict.fromkeys([*small, *letters, *words])
    vocabulary = {token: index for index, token in enumerate(itertools.islice(vocabulary, 256_000))}
    merges = [(word[:cut], word[cut:]) for word in words if word in vocabulary for cut in range(1, len(word))]
    tokenizer = make_tokenizer()
    tokenizer = type(tokenizer)(vocab=vocabulary, merges=merges, add_bos_token=True)
    tokenizer.add_tokens([token for token in vocabulary if token.startswith("<unused")])
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def real_size_sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real-size")
    with torch.device("meta"):
        vae, gemma = AutoencoderKLWan(), Gemma2ForCausalLM(Gemma2Config())
    fill_with_noise(vae).save_pretrained(folder / "pipeline" / "vae")
    gemma = fill_with_noise(gemma)
    gemma.tie_weights()
    gemma.save_pretrained(folder / "gemma", max_shard_size="2GB")
    make_large_tokenizer().save_pretrained(folder / "gemma")
    return folder


def test_conversion_at_real_size_stays_under_3_gb_and_loads(real_size_sources, tmp_path):
    output = tmp_path / "theworld"
    arguments = ["--vae", str(real_size_sources / "pipeline"), "--gemma", str(real_size_sources / "gemma")]
    arguments += ["--output", str(output)]
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

    inputs = processor(text="<world>what is it", images=torch.zeros(3, 64, 64, dtype=torch.uint8), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4096  # 512 x 512 pixels by default
    small = processor(
        text="<world>what is it",
        images=torch.zeros(3, 64, 64, dtype=torch.uint8),
        size={"height": 64, "width": 64},
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**small, logits_to_keep=1).logits
    assert logits.shape == (1, 1, 256_000) and logits.isfinite().all()
