"""What the tests of training share: a small dataset, and runs of `theworld train`."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers import TrainerCallback

from recipe.lora_new_question import scenes_with_a_smallest
from tests.helpers import ROOT
from theworld.training.train import Trainer, prepare, train_and_save


def write_conversations(folder: Path, number: int = 16) -> Path:
    """A JSONL file of conversations of two turns, the first a question that the bundled model does not know."""
    (folder / "images").mkdir(parents=True)
    with (folder / "train.jsonl").open("w") as file:
        for seed, scene, unknown in scenes_with_a_smallest("train", number):
            scene.image.save(folder / "images" / f"{seed}.png")
            messages = []
            for question in (unknown, scene.questions[0]):
                messages += [
                    {"role": "user", "content": question.text},
                    {"role": "assistant", "content": question.answer},
                ]
            file.write(json.dumps({"messages": messages, "images": [f"images/{seed}.png"]}) + "\n")
    return folder / "train.jsonl"


def turn(role: str, *parts: str | Image.Image) -> dict:
    """A message of texts and images."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    return {"role": role, "content": content}


def options_of(**options) -> list[str]:
    """Command-line options of `theworld train`: short runs on the bundled model in float32, by default."""
    defaults = {
        "model": ROOT,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "disable_tqdm": True,
    }
    return [word for name, value in {**defaults, **options}.items() for word in (f"--{name}", str(value))]


def run_train(callbacks: Sequence[TrainerCallback] = (), **options) -> Trainer:
    """`theworld train`, in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train_and_save(prepare(options_of(**options), callbacks))


def losses_of(history: list[dict]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]
