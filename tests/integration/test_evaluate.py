"""Tests `theworld evaluate` (`make test-harness`): arms, tasks and tables, and the docs' own commands, on lm-eval."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, replicas
from tests.helpers.docs import command, sentences, snippets
from theworld import TheWorldProcessor
from theworld.checkpoints.atomic import sha256


pytestmark = pytest.mark.harness
pytest.importorskip("lm_eval")

from theworld.evaluation import arms, evaluate, questions  # noqa: E402
from theworld.evaluation.arms import ARMS, TheWorldLM  # noqa: E402


def run(model: Path, output: Path, *options: str | Path) -> dict:
    """The command's JSON."""
    words = ["--model", model, "--output-dir", output, *options]
    assert evaluate.main([str(word) for word in words]) == 0
    return json.loads((output / "results.json").read_text())


# Tasks


WRITERS = {
    "blink": lambda folder: replicas.write_blink(folder, questions.BLINK_TASKS),
    "cv_bench": replicas.write_cv_bench,
    "embspatial": replicas.write_embspatial,
    "mmsi_bench": replicas.write_mmsi,
    "spatialrgpt_bench": replicas.write_spatialrgpt,
    "vsibench": replicas.write_vsibench,
    "vsr": replicas.write_vsr,
}
CATEGORIES = {
    "blink": set(questions.BLINK_TASKS),
    "cv_bench": {"2D Count", "2D Relation", "3D Depth", "3D Distance"},
    "embspatial": {"above", "under", "left", "right"},
    "mmsi_bench": {"MSR", "Motion (Cam.)", "Positional Relationship (Cam.–Obj.)"},
    "spatialrgpt_bench": {"below_predicate", "left_choice", "width_data", "direction"},
    "vsibench": {kind for kind, *_ in replicas.VIDEO_QUESTIONS},
    "vsr": {"projective", "topological", "orientation", "unallocated"},
}
REPLIES = {
    "letter": "({}).",
    "yes or no": "{}, it is.",
    "region": "Region [{}]",
    "hour": "{} o'clock",
    "length": "{} m",
    "number": "{}",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small copy of every benchmark, in a folder named like its Hub repo."""
    folder = tmp_path_factory.mktemp("data")
    for name, write in WRITERS.items():
        write(folder / questions.BENCHMARKS[name].repo)
    return folder


@pytest.mark.parametrize("task", WRITERS)
def test_a_benchmark_runs_in_every_arm(task, data, convert_whole, tmp_path):
    options = ["--tasks", task, "--data-dir", data, "--limit", "3", "--num-frames", "5"]
    report = run(convert_whole(), tmp_path / "out", *options)
    result = report["tasks"][task]
    assert list(result["arms"]) == list(result["seconds"]) == list(ARMS)
    assert len(result["differences"]) == len(ARMS) * (len(ARMS) - 1) / 2
    for scores in result["arms"].values():
        assert scores["all"]["total"] == 3 and scores.keys() - {"all"} <= CATEGORIES[task]


@pytest.mark.parametrize("task", WRITERS)
def test_the_expected_answers_are_right(task, data, convert_whole, tmp_path, monkeypatch):
    """In the arm `neither` every reply is empty."""

    def answer(model, requests, pictures):
        if model.arm == "neither":
            return [""] * len(requests)
        videos = task == "vsibench"
        inputs = model.encode([request.args[0] for request in requests], pictures, room=1, videos=videos)
        assert ("pixel_values_videos" if videos else "pixel_values") in inputs
        assert all(request.doc["text"].splitlines()[0] in request.args[0] for request in requests)
        return [REPLIES[request.doc["rule"]].format(request.doc["answer"]) for request in requests]

    monkeypatch.setattr(TheWorldLM, "answer", answer)
    report = run(convert_whole(), tmp_path / "out", "--tasks", task, "--data-dir", data, "--arms", "world,neither")
    assert report["tasks"][task]["arms"]["world"].keys() - {"all"} == CATEGORIES[task]
    world, neither = (report["tasks"][task]["arms"][arm]["all"] for arm in ("world", "neither"))
    assert (world["accuracy"], world["unparsed"]) == (1, 0)
    assert (neither["accuracy"], neither["unparsed"]) == (0, neither["total"])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["vsr", "--data-dir", "here"], "has no cambridgeltl/vsr_zeroshot. Omit --data-dir, or download it with `hf "),
        (["vsibench"], "nyu-visionx/VSI-Bench has videos in zip files. Download and unpack it, and give --data-dir."),
        (["vsibench", "--data-dir", "zipped"], "There is no zipped/nyu-visionx/VSI-Bench/scannet/scene"),
    ],
)
def test_a_missing_dataset_is_named_with_its_download(options, error, tmp_path, monkeypatch, capsys):
    replicas.write_vsibench(tmp_path / "zipped" / "nyu-visionx" / "VSI-Bench")
    shutil.rmtree(tmp_path / "zipped" / "nyu-visionx" / "VSI-Bench" / "scannet")
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--model", str(ROOT), "--output-dir", "out", "--tasks", *options]) == 1
    assert error in capsys.readouterr().err.splitlines()[-1]


# Arms


@pytest.fixture(scope="module")
def model(convert_whole) -> TheWorldLM:
    return TheWorldLM(str(convert_whole()), device="cpu", batch_size=2)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "shuffled"])
def test_an_arms_prompts_are_those_of_a_chat(arm, model, photo):
    """Of two questions of different length, about a picture each."""
    model.arm, questions = arm, ("How many circles are there?", "What is it?")
    text = [model.apply_chat_template([{"role": "user", "content": f"<image>{each}"}]) for each in questions]
    inputs = model.encode(text, [[photo], [photo]], room=8)
    pictures = [] if arm == "neither" else [{"type": "image", "image": photo}]
    expected = TheWorldProcessor.from_pretrained(model.model.name_or_path).apply_chat_template(
        [[{"role": "user", "content": [*pictures, {"type": "text", "text": each}]}] for each in questions],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", **(ARMS[arm] or {})},
    )
    assert inputs.keys() == expected.keys() and all(torch.equal(inputs[name], expected[name]) for name in expected)
    of_arm = {"both": 2, "world": 1, "vision": 1, "neither": 0}[arm]
    assert len({"pixel_values", "vision_pixel_values"} & inputs.keys()) == of_arm


class Asked:
    """A request about pictures."""

    def __init__(self, category: str, *pictures: str):
        self.doc, self.args = {"category": category}, ("", {}, {"visual": list(pictures)})


def test_shuffled_pictures_are_of_the_same_category(model):
    requests = [
        Asked("a", "1"),
        Asked("a", "1"),
        Asked("a", "2"),
        Asked("b", "3"),
        Asked("b", "4"),
        Asked("c", "5", "6"),
    ]
    swapped = arms.pictures_of_others(requests, seed=0)
    assert swapped[:5] == [["2"], ["2"], ["1"], ["4"], ["3"]]
    assert len(swapped[5]) == 2 and not {"5", "6"} & set(swapped[5])
    with pytest.raises(ValueError, match="needs questions about two pictures or more. Raise --limit."):
        arms.pictures_of_others(requests[:2], seed=0)


def test_an_answer_ends_with_the_turn(model, monkeypatch):
    """Also where the checkpoint's generation config names `<eos>` alone."""
    end = model.tokenizer.get_vocab()["<end_of_turn>"]
    assert end in model.end_ids

    def generate(eos_token_id, input_ids, **_):
        assert end in eos_token_id
        said = model.tokenizer("a", add_special_tokens=False)["input_ids"]
        return torch.cat([input_ids, torch.tensor([[*said, end]])], dim=1)

    monkeypatch.setattr(model.model, "generate", generate)
    model.arm, request = "neither", Asked("a")
    request.args = ("What?", {"until": ["<end_of_turn>"], "max_gen_toks": 4}, {"visual": []})
    assert model.answer([request], [[]]) == ["a"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--tasks", "chess"], "There is no task 'chess'. Choose from blink, cv_bench, embspatial, "),
        (["--arms", "world,ears"], "There is no arm 'ears'. Choose from both, world, vision, neither, shuffled."),
        (["--arms", "both"], "has no `vision_config`. Choose from world, neither, shuffled."),
        (["--limit", "0"], "argument --limit: must be a whole number of 1 or more, got '0'"),
        (["--model", "adapter"], "adapter is an adapter. Merge it first: `theworld merge adapter --output-dir DIR`."),
        (["--model", "gemma"], "gemma is a gemma3 model, not a TheWorld. Convert it with `theworld convert`."),
        (["--output-dir", "full"], "exists and holds something. Choose another --output-dir, or pass --overwrite."),
    ],
)
def test_bad_options_are_refused_before_work(options, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_tasks", lambda *_: pytest.fail("work began"))
    for folder, file in (("adapter", "adapter_config.json"), ("full", "notes.txt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    words = ["--model", str(ROOT), "--tasks", "theworld_scenes", "--output-dir", "out", *options]
    assert evaluate.main(words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("theworld evaluate: error: ") and error in line and not (tmp_path / "out").exists()


# The table


def run_docs_command(word: str, *options: str | Path) -> None:
    words = shlex.split(command("docs/evaluation.md", word))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([*words, *options], cwd=ROOT, env=environment, check=True, timeout=600)


def test_the_docs_commands_take_their_options():
    found = [line for each in snippets("docs/evaluation.md", "bash") for line in each.commands]
    evaluated = [shlex.split(line.split(" evaluate ")[1]) for line in found if " evaluate " in line]
    assert len(evaluated) == 4
    for words in evaluated:
        arguments = evaluate.parse_arguments(words)
        assert evaluate.choose(arguments.tasks, evaluate.known_tasks(), "task")


def test_a_repeated_run_has_the_same_table(tmp_path):
    """Of the bundled model, by the docs' own command in one process, and in this one."""
    run_docs_command("--limit 90", "--output-dir", tmp_path / "one")
    report = json.loads((tmp_path / "one" / "results.json").read_text())
    again = run(ROOT, tmp_path / "two", "--tasks", "theworld_scenes", "--limit", "90", "--batch-size", "30")
    tables = [
        re.sub(r"\| seconds, .*", "", (tmp_path / name / "results.md").read_text().split("\n", 1)[1])
        for name in ("one", "two")
    ]
    assert tables[0] == tables[1] and again["weights"] == report["weights"]
    assert (tmp_path / "one" / "answers.jsonl").read_bytes() == (tmp_path / "two" / "answers.jsonl").read_bytes()
    assert report["weights"] == {"model.safetensors": sha256(ROOT / "model.safetensors")} and report["commit"]
    shares = {arm: of["all"]["accuracy"] for arm, of in report["tasks"]["theworld_scenes"]["arms"].items()}
    assert shares["world"] > 0.95 and shares["neither"] < 0.4 and shares["shuffled"] < 0.4
    world_and_neither = report["tasks"]["theworld_scenes"]["differences"][0]
    assert world_and_neither["p"] < 1e-10 and world_and_neither["interval"][0] > 0.4


def test_two_processes_give_the_answers_of_one(tmp_path):
    options = ["--model", ROOT, "--tasks", "theworld_scenes", "--arms", "neither,world", "--limit", "9"]
    run(*options[1:2], tmp_path / "one", *options[2:])
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "theworld.cli",
        "evaluate",
    ]
    subprocess.run([*launcher, *options, "--output-dir", tmp_path / "two"], cwd=ROOT, check=True, timeout=600)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert (tmp_path / "one" / "answers.jsonl").read_bytes() == (tmp_path / "two" / "answers.jsonl").read_bytes()


def test_lm_evals_own_command_counts_the_same(tmp_path):
    run_docs_command("lm_eval --model", "--device", "cpu", "--output_path", tmp_path)
    (report,) = tmp_path.rglob("results_*.json")
    right = json.loads(report.read_text())["results"]["theworld_scenes"]["acc,none"]
    page = sentences("docs/evaluation.md")
    stated, total = map(int, re.search(r"(\d+) of (\d+) right \(`make test-harness`\)", page).groups())
    assert round(right * total) == stated


def test_the_first_scenes_ask_every_kind():
    """The same ones, however many are needed."""
    asked, more = (list(questions.load_scenes(limit=limit)["test"]) for limit in (18, 40))
    assert [question["text"] for question in asked] == [question["text"] for question in more[:18]] and len(more) == 45
    assert [question["category"] for question in asked] == 2 * list(questions.KINDS)
    assert len({question["id"] for question in asked}) == 18
    assert all(question["images"][0].size == (64, 64) for question in asked)
