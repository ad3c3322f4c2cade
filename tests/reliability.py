"""
Tries what should break TheWorld, and writes down what was tried and what held (`make reliability`).

The tests try the same, at fewer moments.
"""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import PIL
import torch
import transformers
from bad_inputs import BAD_INPUTS, Given
from test_determinism import THREADS, answer
from test_files import kill
from tiny_sources import TEXT_CONFIGS, make_gemma, make_pipeline
from tqdm import tqdm
from training import write_conversations
from transformers import AutoModel, AutoProcessor

import convert_weights
from recipe.scenes import SPLITS, draw_scene
from theworld import TheWorldForConditionalGeneration, TheWorldProcessor


ROOT = Path(__file__).parent.parent
KILLS = {"conversions": 200, "trainings": 40}
QUESTIONS = 200


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


def as_table(report: dict) -> str:
    lines = ["| | tried | held |", "|---|---|---|"]
    lines += [f"| {name} | {each['tried']:,} | {each['held']:,} |" for name, each in report["counts"].items()]
    return "\n".join(lines)


def main() -> None:
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vae, gemma = make_pipeline(folder / "vae"), make_gemma(folder / "gemma", TEXT_CONFIGS["gemma2"])
        source = ["--vae", str(vae), "--gemma", str(gemma), "--image-size", "64", "--dtype", "float32"]
        if convert_weights.main([*source, "--output", str(folder / "checkpoint")]) != 0:
            raise SystemExit(1)
        (folder / "files").mkdir()
        counts = {
            "bad inputs, read as meant or refused in words": try_bad_inputs(folder / "checkpoint", folder / "files")
        }
        killed = {
            "conversions": kill("conversions", vae, gemma, folder / "converted" / "out", KILLS["conversions"]),
            "trainings": kill(
                "trainings", ROOT, write_conversations(folder / "data"), folder / "runs" / "run", KILLS["trainings"]
            ),
        }
    for name, each in killed.items():
        counts[f"{name} killed, the old or the new folder whole"] = {"tried": each["killed"], "held": each["survived"]}
    counts[f"answers to {THREADS} threads that share a model, as alone"] = try_threads()
    libraries = {each.__name__: each.__version__ for each in (torch, transformers, diffusers, PIL)}
    report = {"counts": counts, "threads": THREADS, "versions": libraries}
    (ROOT / "results" / "reliability.json").write_text(json.dumps(report, indent=2) + "\n")
    (ROOT / "results" / "reliability.md").write_text(as_table(report) + "\n")
    print(as_table(report))


if __name__ == "__main__":
    main()
