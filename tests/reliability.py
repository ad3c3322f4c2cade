"""
Tries what should break TheWorld, and writes down what was tried and what held (`make reliability`).

    python tests/reliability.py PYTHON_WITH_GRADIO PYTHON_WITH_VLLM

The tests try the same, at fewer moments.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import PIL
import torch
import transformers
from bad_inputs import BAD_INPUTS, Given
from load import AT_ONCE
from test_determinism import THREADS, answer
from test_files import kill
from tiny_sources import TEXT_CONFIGS, make_gemma, make_pipeline
from tqdm import tqdm
from training import write_conversations
from transformers import AutoModel, AutoProcessor

import convert_weights
from benchmarks.__main__ import describe_machine
from recipe.scenes import SPLITS, draw_scene
from theworld import TheWorldForConditionalGeneration, TheWorldProcessor


ROOT = Path(__file__).parent.parent
KILLS = {"conversions": 200, "trainings": 110}
QUESTIONS = 200
REQUESTS = 1000


def try_bad_inputs(folder: Path, files: Path) -> dict[str, int]:
    """Each row of the table on a checkpoint in `folder`."""
    model = TheWorldForConditionalGeneration.from_pretrained(folder).eval()
    given = Given(model, TheWorldProcessor.from_pretrained(folder), files)
    held = 0
    for row in tqdm(BAD_INPUTS, desc="bad inputs"):
        try:
            row.check(given)
            held += 1
        except AssertionError as error:
            print(f"{row.name}: {error}")
    return {"tried": len(BAD_INPUTS), "held": held}


def try_threads() -> dict[str, int]:
    """Questions to the bundled model from many threads, against the answers that each gets alone."""
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    scenes = (draw_scene(seed) for seed in SPLITS["test"])
    asked = ((scene.image, question.text) for scene in scenes for question in scene.questions)
    asked = [next(asked) for _ in range(QUESTIONS)]
    alone = [answer(model, processor, each) for each in asked]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda each: answer(model, processor, each), asked))
    return {"tried": QUESTIONS, "held": sum(one == other for one, other in zip(alone, together, strict=True))}


def try_server(python: str, server: str) -> dict[str, Any]:
    """Loads a server, in the environment that has it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONWARNINGS": "ignore"}
    command = [python, ROOT / "tests" / "load.py", server, str(REQUESTS)]
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def as_table(report: dict) -> str:
    lines = ["| | tried | held | failed | memory at the end |", "|---|---|---|---|---|"]
    for name, each in report["counts"].items():
        memory = f"{each['growth']:.1%} of that after {each['first']}".replace("%", " %") if "growth" in each else ""
        failed = each["tried"] - each["held"]
        lines.append(f"| {name} | {each['tried']:,} | {each['held']:,} | {failed:,} | {memory} |")
    return "\n".join(lines)


def main(web_python: str, vllm_python: str) -> None:
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vae, gemma = make_pipeline(folder / "vae"), make_gemma(folder / "gemma", TEXT_CONFIGS["gemma2"])
        source = ["--vae", str(vae), "--gemma", str(gemma), "--image-size", "64", "--dtype", "float32"]
        if convert_weights.main([*source, "--output", str(folder / "checkpoint")]) != 0:
            raise SystemExit(1)
        (folder / "files").mkdir()
        bad_inputs = try_bad_inputs(folder / "checkpoint", folder / "files")
        conversions = kill("conversions", vae, gemma, folder / "converted" / "out", KILLS["conversions"])
        trainings = kill(
            "trainings", ROOT, write_conversations(folder / "data"), folder / "runs" / "run", KILLS["trainings"]
        )
    counts = {
        "bad inputs, read as meant or refused in words": bad_inputs,
        "conversions killed, the old or the new folder whole": survived(conversions),
        "trainings killed, each checkpoint whole": survived(trainings),
        f"answers to {THREADS} threads that share a model, as alone": try_threads(),
        f"requests to the web page, {AT_ONCE} at once": try_server(web_python, "web"),
        f"requests to vLLM, {AT_ONCE} at once": try_server(vllm_python, "vllm"),
    }
    report = {
        "counts": counts,
        "threads": THREADS,
        "versions": {each.__name__: each.__version__ for each in (torch, transformers, diffusers, PIL)},
        "machine": describe_machine(),
        "seconds": round(time.monotonic() - started),
    }
    (ROOT / "results" / "reliability.json").write_text(json.dumps(report, indent=2) + "\n")
    (ROOT / "results" / "reliability.md").write_text(as_table(report) + "\n")
    print(as_table(report))


def survived(killed: dict[str, int]) -> dict[str, int]:
    return {"tried": killed["killed"], "held": killed["survived"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
