# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Scores a checkpoint on tasks, with and without each of its arms, on lm-eval's engine: the command `theworld evaluate`.

    theworld evaluate --model MODEL --tasks theworld_scenes --output-dir DIR
    torchrun --nproc-per-node 2 -m theworld.cli evaluate ...    each process answers a share of the questions
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from importlib.metadata import version as version_of
from pathlib import Path

import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.tasks import TaskManager

from theworld import TheWorldConfig
from theworld.checkpoints.atomic import already_there, atomic_folder, check_replaceable, sha256
from theworld.checkpoints.sources import Source, download_source
from theworld.cli import ArgumentParser, run_command
from theworld.evaluation.arms import ARMS, NUM_FRAMES, TheWorldLM, arms_of
from theworld.evaluation.judge import judge
from theworld.evaluation.table import Answer, page, score_task


TASKS = Path(__file__).parent / "tasks"
RESULTS = "results.json"
PACKAGES = ("theworld", "transformers", "diffusers", "torch", "lm_eval", "datasets", "pillow")


def choose(given: str, known: tuple[str, ...], what: str) -> list[str]:
    """The names in a comma-separated list; raises a `ValueError` for one that is not `known`."""
    names = list(dict.fromkeys(given.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"There is no {what} {name!r}. Choose from {', '.join(known)}.")
    return names


def choose_arms(given: str | None, source: Source) -> list[str]:
    """
    The arms to compare; by default all that the checkpoint has.

    Raises:
        ValueError: For an arm that does not exist, or that the checkpoint cannot have.
    """
    if (source.folder / "adapter_config.json").is_file() and not (source.folder / "config.json").is_file():
        raise ValueError(
            f"{source.name} is an adapter. Merge it first: `theworld merge {source.name} --output-dir DIR`."
        )
    model_type = source.read_config().get("model_type")
    if model_type != "theworld":
        raise ValueError(f"{source.name} is a {model_type} model, not a TheWorld. Convert it with `theworld convert`.")
    possible = arms_of(TheWorldConfig.from_pretrained(source.folder))
    if given is None:
        return list(possible)
    arms = choose(given, tuple(ARMS), "arm")
    for arm in arms:
        if arm not in possible:
            raise ValueError(
                f"There is no arm {arm!r} here, because {source.name} has no `vision_config`. Choose from "
                f"{', '.join(possible)}."
            )
    return arms


def known_tasks() -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in TASKS.glob("*.yaml")))


def load_tasks(names: list[str], data_dir: Path | None, limit: int | None) -> dict[str, Task]:
    """lm-eval's tasks, with their questions."""
    metadata = {"data_dir": None if data_dir is None else str(data_dir), "limit": limit}
    return TaskManager(include_path=TASKS, include_defaults=False, metadata=metadata).load(names)["tasks"]


def ask(model: TheWorldLM, task: Task, limit: int | None) -> list[Answer]:
    """The model's answers to a task's questions, in its arm; none in all processes but the first."""
    name = task.config.task
    results = run_lm_eval(
        model, {"tasks": {name: task}}, limit=limit, apply_chat_template=True, bootstrap_iters=0, log_samples=True
    )
    samples = results["samples"][name] if results else []
    return [make_answer(sample["doc"], sample["filtered_resps"][0]) for sample in samples]


def make_answer(question: dict, reply: str) -> Answer:
    parsed, score = judge(reply, question["choices"], question["answer"], question["rule"])
    return Answer(question["id"], question["category"], reply, parsed, score)


def ask_arms(model: TheWorldLM, task: Task, arms: list[str], limit: int | None) -> tuple[dict, dict[str, float]]:
    """The answers of each arm, sorted by question, and the seconds that they took."""
    answers, seconds = {}, {}
    for arm in arms:
        model.arm, start = arm, time.perf_counter()
        answers[arm] = sorted(ask(model, task, limit), key=lambda answer: answer.id)
        seconds[arm] = round(time.perf_counter() - start, 1)
    return answers, seconds


def code_commit() -> str | None:
    """The commit of this code, if it is a clone, or was installed from a repo."""
    folder = Path(__file__).parents[1]
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    installed = json.loads(distribution("theworld").read_text("direct_url.json") or "{}")
    return installed.get("vcs_info", {}).get("commit_id")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            continue
    return found


def describe(source: Source, model: TheWorldLM, args: argparse.Namespace) -> dict:
    """What the numbers depend on."""
    cuda = model.device.type == "cuda"
    return {
        "model": args.model,
        "model_commit": source.commit,
        "weights": {file.name: sha256(file) for file in sorted(source.folder.glob("*.safetensors"))},
        "settings": {
            "limit": args.limit,
            "seed": args.seed,
            "batch size": args.batch_size,
            "frames of a video": args.num_frames,
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(model.device) if cuda else model.device.type,
            "processes": model.world_size,
        },
        "versions": versions(),
        "commit": code_commit(),
    }


def check_output(output: Path, overwrite: bool) -> None:
    """Raises an `OSError`, before any work is done, if the results could not be written to `output`."""
    if output.exists() and not (output.is_dir() and (overwrite or not any(output.iterdir()))):
        raise already_there(output)
    check_replaceable(output)


def write(report: dict, answers: dict[str, dict[str, list[Answer]]], output: Path, overwrite: bool) -> None:
    """Writes the report as JSON and Markdown, and a line for each answer."""
    lines = [
        json.dumps({"task": task, "arm": arm, **vars(answer)})
        for task, arms in answers.items()
        for arm, of_arm in arms.items()
        for answer in of_arm
    ]
    with atomic_folder(output, overwrite) as folder:
        (folder / RESULTS).write_text(json.dumps(report, indent=2) + "\n")
        (folder / "results.md").write_text(page(report))
        (folder / "answers.jsonl").write_text("".join(f"{line}\n" for line in lines))


def evaluate(args: argparse.Namespace) -> None:
    """
    Asks every question in every arm, and writes the results.

    Raises:
        ValueError, OSError: For a wrong option, a checkpoint or a dataset that cannot be read, or an output that
            cannot be written.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names, output = choose(args.tasks, known_tasks(), "task"), args.output_dir.absolute()
    check_output(output, args.overwrite)
    source = download_source(args.model, None, ["*"])
    arms = choose_arms(args.arms, source)
    tasks = load_tasks(names, args.data_dir, args.limit)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type == "cpu":  # else processes do not find each other
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    options = {"seed": args.seed, "num_frames": args.num_frames, "batch_size": args.batch_size}
    model = TheWorldLM(str(source.folder), device=device.type, **options)
    asked = {name: ask_arms(model, tasks[name], arms, args.limit) for name in names}
    if model.rank == 0:
        results = {name: {**score_task(answers), "seconds": seconds} for name, (answers, seconds) in asked.items()}
        report = {**describe(source, model, args), "tasks": results}
        write(report, {name: answers for name, (answers, _) in asked.items()}, output, args.overwrite)
        print(page(report))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="theworld evaluate", description="Score a checkpoint on tasks, with and without its arms."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_REPO", help="folder or Hub repo of a checkpoint")
    add("--tasks", required=True, metavar="TASK[,TASK]", help=f"any of {', '.join(known_tasks())}")
    add("--arms", metavar="ARM[,ARM]", help=f"any of {', '.join(ARMS)} (all that the checkpoint has)")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--limit", type=positive, metavar="N", help="ask the first N questions of each task (all)")
    add("--batch-size", type=positive, default=8, metavar="N", help="questions answered at once (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="which other pictures the arm shuffled shows (%(default)s)")
    add(
        "--num-frames",
        type=positive,
        default=NUM_FRAMES,
        metavar="N",
        help="frames that are read of a video, evenly (%(default)s)",
    )
    add("--data-dir", type=Path, metavar="DIR", help="local datasets, each in DIR/ORG/NAME (the Hub's)")
    add("--overwrite", action="store_true", help="replace the contents of --output-dir")
    return parser.parse_args(arguments)


def run(arguments: list[str]) -> None:
    """Runs the command with the given command-line arguments."""
    evaluate(parse_arguments(arguments))


def main(arguments: list[str] | None = None) -> int:
    return run_command("theworld evaluate", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
