# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Draws the training curves of the stages."""

import json
from pathlib import Path

import matplotlib.pyplot as plt


STAGES = ["gemma", "theworld-frozen", "theworld-merged", "theworld-images", "theworld"]
# A panel per logged number: its title, and the stages that log it.
PANELS = {
    "l1": ("Error of a reconstructed pixel value", ["vae", "motion"]),
    "loss": ("Training loss", STAGES),
    "accuracy": ("First token of answers right, training scenes", STAGES),
}


def draw_curves(recipe: Path, file: Path) -> None:
    """Draws the existing histories of the stages in the folders of `recipe`."""
    histories = {file.parent.name: file.read_text().splitlines() for file in recipe.glob("*/history.jsonl")}
    panels = {number: panel for number, panel in PANELS.items() if not histories.keys().isdisjoint(panel[1])}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (number, (title, stages)) in zip(axes[0], panels.items(), strict=True):
        for stage in (stage for stage in stages if stage in histories):
            rows = [json.loads(line) for line in histories[stage]]
            axis.plot([row["step"] for row in rows], [row[number] for row in rows], label=stage)
        axis.set(title=title, xlabel="step", ylim=(0, 1 if number == "accuracy" else None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=100)
    plt.close(figure)
