# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Runs all benchmarks, and writes `results/benchmarks.json`, `.md` and two plots.

    python -m benchmarks

Run it alone: processes that share cores slow each other down several times.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import diffusers
import matplotlib.pyplot as plt
import torch
import transformers

from .encoder import measure_memory, measure_shapes, measure_speed
from .language import Stages, measure_language
from .loading import measure_files, measure_processing, measure_start
from .measure import Row
from .sources import ROOT


RESULTS = ROOT / "results"


def describe_machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    return f"{processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def as_table(rows: list[dict]) -> str:
    lines = ["| | baseline | speed-up or cost | range | TheWorld | baseline's | goal | |", f"|{'---|' * 8}"]
    for row in rows:
        spread = " to ".join(f"{end:.2f}" for end in row["spread"])
        ours, theirs = (f"{row[side]:,.{0 if row[side] > 100 else 3}f} {row['unit']}" for side in ("ours", "theirs"))
        ratio = f"{row['ratio']:.2f}x{' faster' if row['faster'] else ''}"
        cells = (row["what"], row["peer"], ratio, spread, ours, theirs, row["verdict"], row["note"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_json(row: Row) -> dict:
    """A row, with medians for its measurements."""
    medians = {side: sorted(getattr(row, side))[len(getattr(row, side)) // 2] for side in ("ours", "theirs")}
    derived = {"ratio": row.ratio, "spread": row.spread, "verdict": row.verdict, "turns": len(row.ours)}
    return asdict(row) | medians | derived


def draw_encoder(rows: list[dict], file: Path) -> None:
    rows = [row for row in rows if row["what"].startswith("encode")]
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    ratios = [row["ratio"] for row in rows]
    errors = [[abs(row["spread"][side] - row["ratio"]) for row in rows] for side in (0, 1)]
    places = range(len(rows))
    axis.bar(places, ratios, 0.6, yerr=errors, error_kw={"linewidth": 0.8})
    axis.hlines([row["goal"] for row in rows], [p - 0.4 for p in places], [p + 0.4 for p in places], "black", ":")
    axis.set_xticks(places, [row["what"].removeprefix("encode ").replace(", ", "\n") for row in rows])
    axis.set(ylabel="times as fast as diffusers", title="Encoder; bars end in the spread, dots: goal")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_stages(stages: Stages, file: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
    for place, seconds in enumerate(stages.values()):
        left = 0.0
        for number, (stage, width) in enumerate(seconds.items()):
            axis.barh(place, width, 0.6, left, color=f"C{number}", label=stage if place == 0 else None)
            left += width
    axis.set_yticks(range(len(stages)), stages)
    axis.invert_yaxis()
    axis.set(xlabel="seconds", title="One answer about 512 x 512 pixels, Gemma 3 270M in float32")
    axis.legend()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    start = perf_counter()
    torch.manual_seed(0)
    rows = []

    def add(row: Row) -> None:
        rows.append(as_json(row))
        print(as_table(rows).splitlines()[-1], flush=True)

    for measure in (measure_speed, measure_memory, measure_shapes, measure_files, measure_processing, measure_start):
        for row in measure():
            add(row)
    language_rows, stages = measure_language()
    for row in language_rows:
        add(row)

    report = {"machine": describe_machine(), "seconds": round(perf_counter() - start), "rows": rows, "stages": stages}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "benchmarks.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (RESULTS / "benchmarks.md").write_text(as_table(rows) + "\n")
    draw_encoder(rows, RESULTS / "benchmarks-encoder.png")
    draw_stages(stages, RESULTS / "benchmarks-answer.png")


if __name__ == "__main__":
    main()
