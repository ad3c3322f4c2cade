"""Tests that every snippet on every page runs, and does what the page says."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModel

from tests.helpers import ROOT
from tests.helpers.commands import run_theworld
from tests.helpers.docs import PAGES, Snippet, all_snippets, read, snippets
from tests.helpers.fake_hub import Hub
from theworld import cli
from theworld.versions_theworld import CACHE_NAME


# What the snippets of a page need besides the bundled model: arguments of the fixture that converts.
WITH_VISION = {"docs/vision.md"}
# Its snippets talk to the Hub: each runs in a fresh process.
ON_THE_HUB = "docs/publishing.md"
LANGUAGES = {"python", "bash", "json", "yaml", "bibtex", "text"}


def here(language: str) -> list[Snippet]:
    """The snippets that no other test runs."""
    return [each for each in all_snippets(language) if each.test is None]


@pytest.fixture(scope="module")
def user_folder(convert, convert_whole, tmp_path_factory) -> Callable[[str], Path]:
    """
    Makes a folder as the snippets of a page assume it.

    It is the repo's folder as far as it is a checkpoint; with `my-theworld`, a converted checkpoint; and `aligned`, an
    adapter of it.
    """

    def make(page: str) -> Path:
        folder = tmp_path_factory.mktemp("user")
        checkpoint = convert_whole() if page in WITH_VISION else convert("gemma2", "--max-pixels", str(512**2))
        (folder / "my-theworld").symlink_to(checkpoint)
        for pattern in ("*_theworld.py", "*.json", "*.jinja", "*.safetensors", "assets", "demo"):
            for path in ROOT.glob(pattern):
                (folder / path.name).symlink_to(path)
        return folder

    return make


def save_adapter(checkpoint: Path, folder: Path) -> None:
    """What `theworld train --train lora` leaves, without training."""
    peft = pytest.importorskip("peft")
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    settings = peft.LoraConfig(target_modules=r".*\.language_model\.layers\..*_proj", init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(folder)


# Python


def run_python(snippet: Snippet, namespace: dict) -> None:
    # The cache's name on older versions of transformers, as the page says.
    code = re.sub(r"(generate\(.*?)\bcache=cache", rf"\1{CACHE_NAME}=cache", snippet.code)
    exec(compile(code, str(snippet), "exec"), namespace)
    for name, shape in snippet.shapes.items():
        assert tuple(namespace[name].shape) == shape, (str(snippet), name)


def check_loss(names: dict) -> None:
    assert names["model"].model.world_projection.linear_1.weight.grad.abs().sum() > 0
    assert AutoConfig.from_pretrained("my-tuned-theworld", trust_remote_code=True).model_type == "theworld"
    trained = names["processor"].decode(names["labels"][0][names["labels"][0] != -100])
    assert trained.endswith("opper") and "?" not in trained


def check_streaming(names: dict) -> None:
    whole = names["model"].model.world_encoder(names["video"])
    torch.testing.assert_close(torch.cat([names["first"], names["further"]], dim=1), whole, atol=1e-5, rtol=1e-5)


def check_switches(names: dict) -> None:
    inputs = {name: set(names[name]) for name in ("both", "world", "vision", "neither")}
    assert inputs["both"] - inputs["neither"] == {"pixel_values", "vision_pixel_values"}
    assert inputs["world"] - inputs["neither"] == {"pixel_values"}
    assert inputs["vision"] - inputs["neither"] == {"vision_pixel_values"}
    assert names["output"].shape[1] > names["both"]["input_ids"].shape[1]


def check_adapted(names: dict) -> None:
    assert names["adapted"].peft_config["default"].base_model_name_or_path == str(Path("my-theworld").resolve())


# What else holds after the snippet of a page that contains a word.
CHECKS = {
    ("docs/usage.md", ".backward()"): check_loss,
    ("docs/video.md", "VideoCache"): check_streaming,
    ("docs/vision.md", "vision=False"): check_switches,
    ("docs/finetuning.md", "PeftModel"): check_adapted,
}


@pytest.mark.parametrize("page", dict.fromkeys(each.page for each in here("python") if each.page != ON_THE_HUB))
def test_python_snippets_run_and_print_what_they_promise(page, user_folder, monkeypatch, capsys):
    folder = user_folder(page)
    monkeypatch.chdir(folder)
    if page == "docs/finetuning.md":
        save_adapter((folder / "my-theworld").resolve(), folder / "aligned")
    names, checked = {}, set()
    for snippet in (each for each in snippets(page, "python") if each.test is None):
        capsys.readouterr()
        run_python(snippet, names)
        printed = capsys.readouterr().out.strip()
        assert not snippet.promised or printed == "\n".join(snippet.promised), str(snippet)
        for (of_page, word), check in CHECKS.items():
            if of_page == page and word in snippet.code:
                check(names)
                checked.add(word)
    assert checked == {word for of_page, word in CHECKS if of_page == page}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the snippets upload what is committed")
def test_publishing_snippets_upload_complete_repos(convert, tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), clone], check=True)
    (clone / "my-theworld").symlink_to(convert("gemma2"))
    save_adapter(convert("gemma2"), clone / "aligned")
    (clone / "aligned" / "checkpoint-1").mkdir()
    (clone / "aligned" / "checkpoint-1" / "optimizer.bin").write_text("")
    committed = subprocess.run(["git", "ls-files"], cwd=clone, capture_output=True, text=True, check=True)
    with Hub() as hub:
        fresh = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
        online = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_the_tests"}
        environment = {**os.environ, **fresh, **online, "HF_HUB_DISABLE_XET": "1"}
        uploaded = []
        for snippet in (each for each in snippets(ON_THE_HUB, "python") if each.test is None):
            hub.repos.clear()
            subprocess.run(
                [sys.executable, "-c", snippet.code.replace("ORG/", "org/")], cwd=clone, env=environment, check=True
            )
            uploaded += [set(repo.commits[repo.resolve("main")]) - {".gitattributes"} for repo in hub.repos.values()]
    repo, converted, adapter, space = uploaded
    assert repo == set(committed.stdout.splitlines()) - {".gitattributes"}
    assert converted == {path.name for path in convert("gemma2").iterdir()}
    assert adapter == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert space == {"README.md", "app.py", "requirements.txt"}


# Shell


def check_parsed(command: str, arguments: list[str]) -> None:
    """Checks the arguments of a subcommand of `theworld`."""
    importlib.import_module(cli.COMMANDS[command].module).parse_arguments(arguments)


def check_run(command: str, arguments: list[str], folder: Path) -> None:
    finished = run_theworld(command, *arguments, folder=folder)
    assert finished.returncode == 0, finished.stderr


def check_command(words: list[str], folder: Path) -> None:
    """Runs a command if that takes seconds and no network; parses the others."""
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", read("Makefile"), flags=re.MULTILINE)
        case ["pip", "install", "-e", target]:
            extras = re.findall(r"\[(\w+)\]", target)
            assert all(f"\n{extra} = [" in read("pyproject.toml") for extra in extras)
        case ["theworld", "app"] | ["theworld", "evaluate", *_] | ["torchrun", _, _, _, _, "evaluate", *_]:
            pass  # only in the environments of test_web.py and test_evaluate.py
        case ["theworld", "ask", *arguments]:
            check_run("ask", arguments, folder)
        case ["theworld", "merge", adapter, *arguments]:
            save_adapter((folder / "my-theworld").resolve(), folder / adapter)
            check_run("merge", [adapter, *arguments], folder)
        case ["theworld", "verify", name]:
            check_run("verify", [name], folder)
        case ["theworld", "verify", name, *arguments]:
            check_parsed("verify", [name, *arguments])
        case ["theworld", subcommand, *arguments]:
            check_parsed(subcommand, arguments)
        case ["accelerate" | "torchrun", *_] if "-m theworld.cli train" in shlex.join(words):
            check_parsed("train", words[words.index("theworld.cli") + 2 :])
        case ["torchrun", _, _, _, _, "precompute-latents", *arguments]:  # test_distributed.py runs it
            check_parsed("precompute-latents", arguments)
        case _:
            pytest.fail(f"no test runs {shlex.join(words)!r}")


@pytest.mark.parametrize("snippet", all_snippets("bash"), ids=str)
def test_shell_commands_exist_and_take_their_options(snippet, user_folder):
    folder = user_folder(snippet.page)
    for words in map(shlex.split, snippet.commands):
        if snippet.test is None or words[0] in ("theworld", "accelerate", "torchrun", "pip"):
            check_command(words, folder)


# Data


@pytest.mark.parametrize("snippet", here("json"), ids=str)
def test_a_json_row_loads_as_a_dataset(snippet, bundled_processor, tmp_path):
    data = pytest.importorskip("theworld.training.data")
    (tmp_path / "train.jsonl").write_text(snippet.code)
    for name in json.loads(snippet.code)["images"]:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    collator = data.ConversationCollator(bundled_processor)
    dataset = data.load_conversations(str(tmp_path / "train.jsonl"), "train", collator)
    assert len(dataset) == len(snippet.code.splitlines())


@pytest.mark.parametrize("snippet", here("yaml"), ids=str)
def test_yaml_is_the_header_of_the_space(snippet):
    header = read("demo/space/README.md").split("---\n")[1]
    assert yaml.safe_load(snippet.code) == yaml.safe_load(header)
    assert yaml.safe_load(header)["sdk"] == "gradio"


def test_the_space_installs_and_starts_the_web_page():
    header = yaml.safe_load(read("demo/space/README.md").split("---\n")[1])
    assert "from theworld.demo.app import main\n" in read(f"demo/space/{header['app_file']}")
    (requirement,) = re.findall(
        r"^theworld\[(\w+)\] @ git\+https://", read("demo/space/requirements.txt"), flags=re.MULTILINE
    )
    assert f"\n{requirement} = [" in read("pyproject.toml")
    assert f"\ngradio=={header['sdk_version']}\n" in read("constraints/web.txt")


@pytest.mark.parametrize("snippet", here("bibtex"), ids=str)
def test_bibtex_says_what_the_citation_file_says(snippet):
    citation = yaml.safe_load(read("CITATION.cff"))
    fields = dict(re.findall(r"^  (\w+) = \{+(.*?)\}+,$", snippet.code, flags=re.MULTILINE))
    assert fields["title"] == citation["title"] and fields["version"] == citation["version"]
    assert fields["author"] == citation["authors"][0]["name"]
    assert fields["year"] == str(citation["date-released"].year)
    assert f'version = "{citation["version"]}"' in read("pyproject.toml")


# None is left out


@pytest.mark.parametrize("page", PAGES)
def test_no_snippet_is_left_out(page):
    """Text blocks are figures; every other block has a language that a test here runs, or names its test."""
    found = snippets(page)
    assert len(found) == len(re.findall(r"^```", read(page), flags=re.MULTILINE)) / 2
    assert {each.language for each in found} <= LANGUAGES
    assert read(page).count("\n*Tested by ") == sum(each.test is not None for each in found)


@pytest.mark.parametrize("snippet", [each for each in all_snippets() if each.test is not None], ids=str)
def test_other_tests_that_pages_name_exist_and_run(snippet):
    (file,) = (ROOT / "tests").rglob(snippet.test)
    target = re.search(rf"^{snippet.target}:.*\n\t(.*)$", read("Makefile"), flags=re.MULTILINE).group(1)
    assert snippet.target == "test" or snippet.test in target
    assert f"make {snippet.target}" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert snippet.page in file.read_text()
