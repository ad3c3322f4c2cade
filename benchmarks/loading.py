# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Converting, loading, processing, importing: against doing as much with the bytes, and nothing else."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from theworld.convert_weights import Source, convert

from .language import GEMMA
from .measure import MEMORY, REPEATS, Row, in_fresh_process, in_turns
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

FIRST_TOKEN = """
from time import perf_counter
start = perf_counter()
{imports}
{more}
print(perf_counter() - start)
"""
IMPORTS = "from transformers import AutoModel, AutoProcessor"
ANSWER = f"""
model = AutoModel.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
from PIL import Image
picture = Image.open({str(ROOT / "assets" / "scene.png")!r})
inputs = processor(text="<world>What shape is the blue object?", images=picture, return_tensors="pt")
model.generate(**inputs, max_new_tokens=1)
"""


def touch(tensors) -> None:
    """Reads every number, because tensors of a mapped file cost nothing before."""
    for tensor in tensors:
        tensor.sum()


def measure_files() -> Iterator[Row]:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_sources(folder, GEMMA)
        sources = Source(folder / "vae", "vae"), Source(folder / "gemma", "gemma")
        converted = folder / "theworld"

        def remake(make: Callable, *arguments, **options) -> None:
            shutil.rmtree(converted, ignore_errors=True)
            make(*arguments, **options)

        convert(*sources, converted)
        shutil.copytree(converted, folder / "copied")
        size = (converted / "model.safetensors").stat().st_size / 1e6
        note = f"{size:.0f} MB; conversion checks the latents too"
        times = in_turns(
            lambda: remake(convert, *sources, converted),
            lambda: remake(shutil.copytree, folder / "copied", converted),
        )
        yield Row("convert_weights.py", "copying its output", *times, goal=1.5, note=note)

        def load() -> None:
            touch(AutoModel.from_pretrained(converted, trust_remote_code=True).parameters())

        times = in_turns(load, lambda: touch(load_file(converted / "model.safetensors").values()))
        yield Row(
            "from_pretrained", "safetensors into tensors", *times, goal=1.15, note=f"{size:.0f} MB, each read once"
        )
        peak = in_fresh_process(LOADING_PEAK.format(folder=str(converted)))
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
    note = "16 if linear; asked is under 10 ms"
    yield Row("tokenise 4096 `<world>`", "256 of them", *times, note=note)


def measure_start() -> Iterator[Row]:
    """From a cold process to the first token of the bundled model."""
    cold = [
        [in_fresh_process(FIRST_TOKEN.format(imports=IMPORTS, more=more)) for _ in range(REPEATS)]
        for more in (ANSWER, "import diffusers.models.autoencoders.autoencoder_kl_wan, transformers.modeling_utils")
    ]
    yield Row("a new process to its first token", "importing transformers and diffusers", *cold)
