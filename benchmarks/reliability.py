# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Stress tests (`make reliability`): counts the cases that held, in `results/reliability.json` and `.md`.

    python -m benchmarks.reliability bad_inputs
    python -m benchmarks.reliability web .venv-web/bin/python

Runs one part, a server with the given Python; the results of other parts are kept. The tests try the same with fewer
cases.
"""

import json
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from benchmarks.__main__ import describe_machine
from tests.helpers.bad_inputs import BAD_INPUTS, Given, damaged_files, read_file
from tests.helpers.checkpoints import TEXT_CONFIGS, make_gemma, make_multimodal_gemma, make_pipeline
from tests.helpers.generation import THREADS, answer
from tests.helpers.kill_process import kill
from tests.helpers.load_test import AT_ONCE
from tests.helpers.training_runs import write_conversations
from theworld import convert_weights
from theworld.evaluation.scenes import SPLITS, draw_scene


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "reliability.json"
KILLS = {"conversions": 200, "trainings": 110}
QUESTIONS = 200
DAMAGED = 250
REQUESTS = 1000


def make_sources(folder: Path) -> tuple[Path, Path]:
    return make_pipeline(folder / "vae"), make_gemma(folder / "gemma", TEXT_CONFIGS["gemma2"])


def convert_small(vae: Path, gemma: Path, output: Path, *options: str) -> None:
    sources = ["--vae", str(vae), "--gemma", str(gemma), "--output-dir", str(output)]
    if convert_weights.main([*sources, "--image-size", "64", "--dtype", "float32", *options]) != 0:
        raise SystemExit(1)


def load_given(folder: Path) -> Given:
    """Small checkpoints, without and with Gemma 3's vision tower."""
    vae, gemma = make_sources(folder)
    convert_small(vae, gemma, folder / "checkpoint")
    convert_small(vae, make_multimodal_gemma(folder / "gemma3"), folder / "with_vision", "--vision")
    return Given.load(folder / "checkpoint", folder, with_vision=Given.load(folder / "with_vision", folder))


def try_bad_inputs(folder: Path) -> dict[str, Any]:
    """All rows of the table of bad inputs."""
    given = load_given(folder)
    held = 0
    for row in tqdm(BAD_INPUTS, desc="bad inputs"):
        try:
            row.check(given)
            held += 1
        except AssertionError as error:
            print(f"{row.name}: {error}")
    return {"what": "bad inputs, accepted or clearly rejected", "tried": len(BAD_INPUTS), "held": held}


def try_damaged_files(folder: Path) -> dict[str, Any]:
    given, files = load_given(folder), list(damaged_files(DAMAGED))
    held = 0
    for form, content in tqdm(files, desc="damaged files"):
        try:
            read_file(given, form, content)
            held += 1
        except AssertionError as error:
            print(error)
    return {"what": "damaged files, read or clearly rejected", "tried": len(files), "held": held}


def try_conversions(folder: Path) -> dict[str, Any]:
    report = kill("conversions", *make_sources(folder), folder / "converted" / "out", KILLS["conversions"])
    what = "conversions killed, the old or the new folder complete"
    return {"what": what, "tried": report["killed"], "held": report["survived"]}


def try_trainings(folder: Path) -> dict[str, Any]:
    data = write_conversations(folder / "data")
    report = kill("trainings", ROOT, data, folder / "runs" / "run", KILLS["trainings"])
    what = "trainings killed, each checkpoint complete"
    return {"what": what, "tried": report["killed"], "held": report["survived"]}


def try_threads(folder: Path) -> dict[str, Any]:
    """Questions to the bundled model from many threads, compared with the answers in one thread."""
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    scenes = (draw_scene(seed) for seed in SPLITS["test"])
    asked = ((scene.image, question.text) for scene in scenes for question in scene.questions)
    asked = [next(asked) for _ in range(QUESTIONS)]
    alone = [answer(model, processor, each) for each in asked]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda each: answer(model, processor, each), asked))
    held = sum(one == other for one, other in zip(alone, together, strict=True))
    what = f"answers to {THREADS} threads that share a model, equal to those of one"
    return {"what": what, "tried": QUESTIONS, "held": held}


def try_server(server: str, title: str, python: str) -> dict[str, Any]:
    """Many requests to a server, which runs in the environment of `python`."""
    command = [python, "-W", "ignore", "-m", "tests.helpers.load_test", server, str(REQUESTS)]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(finished.stdout.splitlines()[-1])
    return {"what": f"requests to {title} ({report['version']}), {AT_ONCE} at once", **report}


PARTS = {
    "bad_inputs": try_bad_inputs,
    "damaged_files": try_damaged_files,
    "conversions": try_conversions,
    "trainings": try_trainings,
    "threads": try_threads,
    "web": lambda folder, python: try_server("web", "the web page", python),
    "vllm": lambda folder, python: try_server("vllm", "vLLM", python),
}


def as_table(report: dict[str, dict]) -> str:
    lines = ["| | tried | held | failed | memory at the end |", "|---|---|---|---|---|"]
    for each in (report[part] for part in PARTS if part in report):
        memory = f"{each['growth']:.1%} of that after {each['first']}".replace("%", " %") if "growth" in each else ""
        failed = each["tried"] - each["held"]
        lines.append(f"| {each['what']} | {each['tried']:,} | {each['held']:,} | {failed:,} | {memory} |")
    machines = dict.fromkeys(each["machine"] for each in report.values())
    return "\n".join([*lines, "", f"On {'; '.join(machines)}."])


def main(part: str, *arguments: str) -> None:
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        found = PARTS[part](Path(folder), *arguments)
    found |= {
        "seconds": round(time.monotonic() - started),
        "machine": f"{describe_machine()}, Pillow {PIL.__version__}",
    }
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    report[part] = found
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(as_table(report) + "\n")
    print(as_table(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
