"""Pins the README: its snippets run, its commands exist, its options and files are the real ones."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from huggingface_hub import ModelCard
from reliability import PARTS
from reliability import RESULTS as RELIABILITY
from reliability import as_table as as_counts
from test_demo import run_demo
from test_hub import PINNED
from test_run_it import RUN_IT
from test_video import SECTION as VIDEO
from test_vision import SECTION as VISION
from test_vllm import COMMAND as VLLM_COMMAND
from transformers import AutoConfig, Gemma2Config

from benchmarks.__main__ import as_table
from recipe.evaluate import LAST_FRAME
from tests.helpers.bad_inputs import BAD_INPUTS
from theworld import convert_weights
from theworld.training import precompute_latents, train
from theworld.versions_theworld import CACHE_NAME, TESTED


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's snippets, but for those that test_run_it, _video, _vision, _vllm and _hub.py run."""
    others = (RUN_IT, VIDEO, VISION, PINNED) if language == "python" else ()
    text = README
    for other in others:
        text = text.replace(other, "")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def user_folder(convert, tmp_path, monkeypatch) -> Path:
    """A folder as the README assumes it: the pictures, and `my-theworld` as convert_weights.py writes it."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "my-theworld").symlink_to(convert("gemma2", "--image-size", "512"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_snippet_answers_as_it_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(blocks("python")[0], {})
    assert capsys.readouterr().out.strip() == re.search(r"# (.*)\n$", blocks("python")[0]).group(1)


def test_the_other_snippets_run_as_they_stand(user_folder, capsys):
    assert len(blocks("python")) == 6
    namespace = {}
    for block in blocks("python")[1:]:
        exec(block.replace("cache=cache", f"{CACHE_NAME}=cache"), namespace)
    assert capsys.readouterr().out
    assert namespace["latents"].shape == (1, 16, 64, 64)
    assert namespace["model"].model.world_projection.linear_1.weight.grad.abs().sum() > 0
    assert AutoConfig.from_pretrained("my-tuned-theworld", trust_remote_code=True).model_type == "theworld"
    trained = namespace["processor"].decode(namespace["labels"][0][namespace["labels"][0] != -100])
    assert trained.endswith("opper") and "?" not in trained


def test_the_shell_commands_exist(user_folder):
    makefile = (ROOT / "Makefile").read_text()
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    for command in filter(None, commands):
        match command.split():
            case ["make", target]:
                assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
            case ["pip", "install", "-e", target]:
                extras = re.findall(r'"?\.(?:\[(\w+)\])?"?', target)
                assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras if extra)
            case ["python", "convert_weights.py", "--verify", folder]:
                assert convert_weights.main(["--verify", folder]) == 0
            case ["python", "convert_weights.py", *arguments]:
                assert convert_weights.parse_arguments(arguments).output == Path("my-theworld")
            case ["vllm", "serve", *_]:
                assert command == VLLM_COMMAND
            case ["python", "app.py"]:
                assert '"app.py"' in (ROOT / "tests" / "test_web.py").read_text()  # which runs it
            case ["python", "precompute_latents.py", *arguments]:
                assert precompute_latents.parse_arguments(arguments).output == Path("latents")
            case ["python" | "accelerate" | "torchrun", *words] if (
                "train.py" in words
            ):  # test_distributed.py runs these
                arguments, _ = train.parse_arguments(words[words.index("train.py") + 1 :])
                assert arguments.model == "my-theworld"
            case ["lm_eval", *_] | ["python", "-m", "recipe.lm_eval_task"]:
                pass  # test_harness.py runs them
            case ["trl", "sft", *_]:
                pass  # test_training.py runs it
            case ["python", "demo.py", *_]:
                arguments = re.findall(r'"([^"]*)"|(\S+)', command)[2:]
                run_demo(*(quoted or plain for quoted, plain in arguments))
            case _:
                pytest.fail(f"no test runs {command!r}")


def test_the_options_are_those_of_the_converter():
    table = README.split("| option |")[1].split("\n\n")[0]
    first_and_last = re.findall(r"^\| (.*?) \|.*\| (.*?) \|$", table, flags=re.MULTILINE)
    documented = set(re.findall(r"`(--[a-z-]+)", " ".join(sum(first_and_last, ()))))
    arguments = convert_weights.parse_arguments(["--vae", "a", "--gemma", "b", "--output", "c"])
    real = {f"--{name.replace('_', '-')}" for name in vars(arguments)}
    assert documented == real
    for option, default in re.findall(r"^\| `--([a-z-]+)` \| `?(\w+)`? \|", table, flags=re.MULTILINE):
        value = getattr(arguments, option.replace("-", "_"))
        assert str(value) == default or (default == "off" and value is False), option


def test_the_parts_are_those_of_the_training_script():
    table = README.split("| `--train` |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == get_args(
        train.Arguments.__annotations__["train"]
    )


def test_the_training_numbers_are_those_of_a_run():
    card = " ".join(README.split())
    training = json.loads((ROOT / "results" / "training.json").read_text())
    for parts in ("projection", "language"):
        ratio = training[parts]
        assert f"{ratio['ratio']} times ({ratio['least']} to {ratio['greatest']})" in card
    learnt = json.loads((ROOT / "results" / "new_kind.json").read_text())
    before, after = learnt["before"], learnt["after"]
    assert learnt["question"] in card and learnt["adapter bytes"] < 1e6
    assert f"{before['new']['share']:.1%} to {after['new']['share']:.1%}".replace("%", " %") in card
    assert f"{before['old']['share']:.1%} and is at {after['old']['share']:.1%}".replace("%", " %") in card
    assert after["new"]["share"] >= 0.9 and after["old"]["share"] >= before["old"]["share"] - 0.02


def test_the_files_are_there():
    table = README.split("| file |")[1].split("\n\n")[0]
    for name in re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_the_limits_are_gemma_2s():
    config = Gemma2Config()
    assert (config.max_position_embeddings, config.sliding_window) == (2 * 4096, 4096)


def test_the_benchmarks_are_those_of_a_run():
    report = json.loads((ROOT / "results" / "benchmarks.json").read_text())
    table = as_table(report["rows"])
    assert table == (ROOT / "results" / "benchmarks.md").read_text().strip()
    assert table in README and report["machine"] in README and report["seconds"] < 15 * 60


def test_the_reliability_is_that_of_a_run():
    report = json.loads(RELIABILITY.read_text())
    table = as_counts(report)
    assert table == RELIABILITY.with_suffix(".md").read_text().strip() and table in README
    assert list(report) == list(PARTS) and all(each["tried"] == each["held"] > 0 for each in report.values())
    assert report["bad_inputs"]["tried"] == len(BAD_INPUTS)
    for server in (report["web"], report["vllm"]):
        assert server["tried"] == 1000 and server["growth"] < 1.05 and 100 < server["broken off"] < 300


def test_the_limits_of_the_web_page_are_its_own():
    app, card = (ROOT / "app.py").read_text(), " ".join(README.split())
    for limit, said in {
        "MAX_BYTES = 5_000_000": "A request may have 5 MB",
        "Image.MAX_IMAGE_PIXELS = 2**24": "a picture 16 megapixels",
        "MAX_CHARACTERS = 1000": "a question 1000 characters",
        "MAX_SECONDS = 60": "an answer ends after 60 seconds",
        "MAX_WAITING = 64": "64 may wait",
        "KEPT_SECONDS = 3600": "gone after an hour",
    }.items():
        assert f"\n{limit}\n" in app and said in card


def test_the_versions_are_those_of_the_tests():
    assert '"torch>=2.5"' in (ROOT / "pyproject.toml").read_text()
    for package, (oldest, newest) in TESTED.items():
        assert f"{package} {oldest} to {newest}" in README
        for name, expected in (("", newest), ("-oldest", oldest)):
            assert f"\n{package}=={expected}." in (ROOT / f"constraints{name}.txt").read_text()
    assert "torch 2.5 or later (tested with 2.13" in README
    assert "\ntorch==2.13." in (ROOT / "constraints.txt").read_text()


def test_the_card_has_valid_metadata():
    data = ModelCard.load(ROOT / "README.md").data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-text-to-text"
    assert data.license == "apache-2.0" and "custom_code" in data.tags and data.language == "en"
    assert data.model_name == "TheWorld, the bundled model"


def test_the_cards_results_are_those_of_the_evaluation():
    report = json.loads((ROOT / "results" / "evaluation.json").read_text())
    listed = {
        result.metric_name: result.metric_value for result in ModelCard.load(ROOT / "README.md").data.eval_results
    }
    scores = {
        name: round(100 * report["scores"][condition][part]["share"], 1)
        for name, (condition, part) in {
            "accuracy": ("world tokens", "overall"),
            "accuracy without an image": ("no image", "overall"),
            "accuracy on clips": ("world tokens", "clips"),
            "accuracy on clips by the last frame alone": (LAST_FRAME, "clips"),
        }.items()
    }
    assert listed == scores


def test_the_table_of_versions_is_that_of_the_environments():
    table = README.split("| transformers | diffusers |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| .*?`make (\S+)`", table, flags=re.MULTILINE)
    assert [target for *_, target in rows] == ["test", "test-vllm", "test-oldest"]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for (transformers, diffusers, target), name in zip(rows, ("", "-vllm", "-oldest"), strict=True):
        pinned = set((ROOT / f"constraints{name}.txt").read_text().split())
        assert {f"transformers=={transformers}", f"diffusers=={diffusers}"} <= pinned
        assert f"make {target}" in ci
