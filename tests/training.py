"""What the tests of training share: a small dataset, and runs of train.py."""

import contextlib
import io
import json
from pathlib import Path

from recipe.new_kind import ask_smallest
from recipe.scenes import draw_scene
from train import Trainer, main


ROOT = Path(__file__).parent.parent


def write_conversations(folder: Path, number: int = 16) -> Path:
    """A JSONL file of conversations of two turns, the first a question that the bundled model does not know."""
    (folder / "images").mkdir(parents=True)
    scenes = {seed: scene for seed in range(5 * number) if ask_smallest(scene := draw_scene(seed))}
    with (folder / "train.jsonl").open("w") as file:
        for seed, scene in list(scenes.items())[:number]:
            scene.image.save(folder / "images" / f"{seed}.png")
            questions = [ask_smallest(scene), scene.questions[0]]
            messages = []
            for question in questions:
                messages += [
                    {"role": "user", "content": question.text},
                    {"role": "assistant", "content": question.answer},
                ]
            file.write(json.dumps({"messages": messages, "images": [f"images/{seed}.png"]}) + "\n")
    return folder / "train.jsonl"


def options_of(**options) -> list[str]:
    """Command-line options of train.py; short runs on the bundled model in float32, unless they say otherwise."""
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


def run_train(**options) -> Trainer:
    """train.py's main, in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        return main(options_of(**options))


def losses_of(history: list[dict]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]
