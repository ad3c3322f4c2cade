# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Compares converting, loading, processing and importing with the minimal work on the same bytes."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, Gemma2Config

from theworld.checkpoints.sources import Source
from theworld.convert_weights import convert

from .measure import MEMORY, REPEATS, Row, in_turns, run_fresh
from .sources import ROOT, make_sources


LOADING_PEAK = (
    MEMORY
    + """
from transformers import AutoModel
from theworld import TheWorldForConditionalGeneration
before = memory("VmRSS")
model = AutoModel.from_pretrained({folder!r}, trust_remote_code=True)
for parameter in model.parameters():
    parameter.sum()
print((memory("VmHWM") - before) / 1e6)
"""
)

IMPORTS = """
import transformers.generation
import transformers.modeling_utils
import diffusers.models.autoencoders.autoencoder_kl_wan
"""
FIRST_TOKEN = f"""
from PIL import Image
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
picture = Image.open({str(ROOT / "assets" / "scene.png")!r})
inputs = processor(text="<world>What shape is the blue object?", images=picture, return_tensors="pt")
model.generate(**inputs, max_new_tokens=1)
"""


def touch(tensors: Iterable[torch.Tensor]) -> None:
    """Reads every number, because a memory-mapped file is only read on access."""
    for tensor in tensors:
        tensor.sum()


def measure_files() -> Iterator[Row]:
    """Files of real size: a VAE and a Gemma 2 2B, in bfloat16."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_sources(folder, Gemma2Config())
        sources = Source(folder / "vae", "vae"), Source(folder / "gemma", "gemma")
        converted, copied = folder / "theworld", folder / "copied"

        def remake(target: Path, make: Callable, *arguments) -> None:
            shutil.rmtree(target, ignore_errors=True)
            make(*arguments, target)

        convert(*sources, converted)
        times = in_turns(
            lambda: remake(converted, convert, *sources), lambda: remake(copied, shutil.copytree, converted), repeats=3
        )
        shards = sorted(converted.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in shards) / 1e6
        note = f"{size:,.0f} MB; it checks every number and the latents"
        yield Row("convert_weights.py", "copying its output", *times, goal=1.5, note=note)

        def load() -> None:
            touch(AutoModel.from_pretrained(converted, trust_remote_code=True).parameters())

        def load_gemma() -> None:
            touch(AutoModelForCausalLM.from_pretrained(folder / "gemma").parameters())

        def read() -> None:
            for file in shards:
                touch(load_file(file).values())

        note = f"{size:,.0f} MB, every number read once"
        yield Row("from_pretrained", "safetensors into tensors", *in_turns(load, read), goal=1.15, note=note)
        yield Row("from_pretrained", "Gemma 2 2B alone, by transformers", *in_turns(load, load_gemma), note=note)
        peak = float(run_fresh(LOADING_PEAK.format(folder=str(converted))))
        yield Row("peak memory of from_pretrained", "bytes of the weights", [peak], [size], "MB", goal=1.1)


def measure_processing() -> Iterator[Row]:
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    picture, side = ROOT / "assets" / "grace_hopper.jpg", {"height": 512, "width": 512}
    times = in_turns(
        lambda: processor.image_processor(Image.open(picture), size=side, return_tensors="pt"),
        lambda: Image.open(picture).convert("RGB").resize((512, 512), Image.Resampling.BICUBIC),
        4 * REPEATS,
    )
    yield Row("image to `pixel_values`, 512 px", "PIL's decoding and resizing", *times, goal=1.2)
    places = processor.image_token * 4096
    times = in_turns(lambda: processor.tokenizer(places), lambda: processor.tokenizer(places[: len(places) // 16]))
    note = "16 if linear; the requirement is under 10 ms"
    yield Row("tokenize 4096 `<world>`", "256 of them", *times, note=note)


def measure_start() -> Iterator[Row]:
    """From a cold process to the first token of the bundled model."""
    times = in_turns(lambda: run_fresh(FIRST_TOKEN), lambda: run_fresh(IMPORTS), repeats=3)
    yield Row("a new process to its first token", "importing transformers and diffusers", *times)
