# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Compares training steps from latents and from pixels, on the bundled model, alternately in one process.

    python -m benchmarks.training

writes `results/training.json`.
"""

import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

from recipe.lora_new_question import write_conversations
from theworld.training import precompute_latents, train


ROOT = Path(__file__).parents[1]
TURNS = 3
STEPS = 20


def seconds(dataset: Path, output: Path, parts: str) -> float:
    """Seconds of the training steps of a run, without loading and saving."""
    options = {
        "model": ROOT,
        "dataset": dataset,
        "train": parts,
        "output_dir": output,
        "overwrite": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_steps": STEPS,
        "gradient_checkpointing": False,
        "bf16": False,
        "disable_tqdm": True,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.train_and_save(
            train.prepare([word for name, value in options.items() for word in (f"--{name}", str(value))])
        )
    return next(entry["train_runtime"] for entry in run.state.log_history if "train_runtime" in entry)


def main() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_conversations(folder / "data", 200)
        pixels = folder / "data" / "train.jsonl"
        precompute_latents.precompute(str(ROOT), str(pixels), "train", folder / "latents", 200, "float16")
        report = {"steps": STEPS, "turns": TURNS}
        for parts in ("projection", "language"):
            pairs = [
                [seconds(dataset, folder / "run", parts) for dataset in (pixels, folder / "latents")]
                for _ in range(TURNS)
            ]
            ratios = [from_pixels / from_latents for from_pixels, from_latents in pairs]
            report[parts] = {
                "ratio": round(statistics.median(ratios), 2),
                "least": round(min(ratios), 2),
                "greatest": round(max(ratios), 2),
                "seconds from pixels": round(statistics.median(pair[0] for pair in pairs), 2),
                "seconds from latents": round(statistics.median(pair[1] for pair in pairs), 2),
            }
    return report


if __name__ == "__main__":
    report = main()
    (ROOT / "results" / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
