"""
What a user does, in a new process: Auto classes and a folder, nothing else.

    python tests/helpers/user_route.py answer FOLDER         generates from text, images and batches
    python tests/helpers/user_route.py tune FOLDER OUTPUT    trains a step, saves in several forms, notes the logits
    python tests/helpers/user_route.py check OUTPUT          loads each saved form and compares the logits bit for bit
"""

import sys


sys.modules["theworld"] = None  # as on a machine where the package is not installed

from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)


# How a model may be saved: dtype, and the largest shard.
FORMS = {"float32": (torch.float32, "5GB"), "bfloat16": (torch.bfloat16, "5GB"), "sharded": (torch.float32, "200KB")}


def load(folder: Path, **options):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return model, processor


def make_inputs(processor):
    noise = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 80, 50), generator=noise, dtype=torch.uint8) for _ in range(2)]
    return {
        "text": processor(text="what is it?", return_tensors="pt"),
        "one image": processor(text="<world>what is it?", images=images[0], return_tensors="pt"),
        "two images": processor(text="<world>and<world>what is it?", images=images, return_tensors="pt"),
        "batch": processor(
            text=["what is it?", "<world>what is it?", "<world>and<world>what is it?"],
            images=[[], images[:1], images],
            padding=True,
            return_tensors="pt",
        ),
    }


def answer(folder: Path):
    model, processor = load(folder)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "theworld"
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto_class.from_pretrained(folder, trust_remote_code=True)) is type(model)

    answers = {}
    for name, inputs in make_inputs(processor).items():
        length = inputs["input_ids"].shape[1]
        answers[name], uncached = (
            model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache)[:, length:]
            for use_cache in (True, False)
        )
        assert torch.equal(answers[name], uncached), name
    for row, name in enumerate(("text", "one image", "two images")):
        assert torch.equal(answers["batch"][row, : answers[name].shape[1]], answers[name][0]), name
    assert isinstance(processor.decode(answers["one image"][0]), str)


def tune(folder: Path, output: Path):
    model, processor = load(folder)
    inputs = make_inputs(processor)["one image"]
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(output / "tuned")
    processor.save_pretrained(output / "tuned")
    for form, (dtype, max_shard_size) in FORMS.items():
        model, processor = load(output / "tuned", dtype=dtype)
        model.save_pretrained(output / form, max_shard_size=max_shard_size)
        processor.save_pretrained(output / form)
        with torch.no_grad():
            torch.save(model(**inputs).logits, output / f"{form}.logits")


def check(output: Path):
    for form, (dtype, _) in FORMS.items():
        model, processor = load(output / form)
        assert model.dtype == dtype
        with torch.no_grad():
            logits = model(**make_inputs(processor)["one image"]).logits
        assert torch.equal(logits, torch.load(output / f"{form}.logits")), form


if __name__ == "__main__":
    step, *folders = sys.argv[1:]
    {"answer": answer, "tune": tune, "check": check}[step](*map(Path, folders))
