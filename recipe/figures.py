# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""The curves of the stages, as one picture."""

import json
from pathlib import Path

import matplotlib.pyplot as plt


STAGES = ["gemma", "theworld-frozen", "theworld-merged", "theworld"]
# A panel for each number that says how a stage goes, and the stages whose curves it shows.
PANELS = {
    "l1": ("Error of a reconstructed pixel value", ["vae"]),
    "loss": ("Training loss", STAGES),
    "accuracy": ("Answers begun right, training scenes", STAGES),
}


def draw_curves(recipe: Path, file: Path) -> None:
    """Draws the histories that the stages left in the folders of `recipe`, as far as they have got."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 4), layout="constrained")
    for axis, (number, (title, stages)) in zip(axes, PANELS.items(), strict=True):
        for stage in stages:
            if (history := recipe / stage / "history.jsonl").exists():
                rows = [json.loads(line) for line in history.read_text().splitlines()]
                axis.plot([row["step"] for row in rows], [row[number] for row in rows], label=stage)
        axis.set(title=title, xlabel="step", ylim=(0, 1 if number == "accuracy" else None))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(file, dpi=100)
    plt.close(figure)
