"""Tests that the wheel works where there is no clone: every module is imported, and the commands run."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT


# They need gradio or lm-eval, which this environment lacks; test_web.py and test_evaluate.py start them.
ELSEWHERE = {"theworld.demo.app", "theworld.evaluation.arms", "theworld.evaluation.evaluate"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the files that git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "clone" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, folder / "clone"]
    subprocess.run(command, check=True, timeout=300)
    shutil.rmtree(folder / "clone")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The `bin` of a fresh environment: the libraries of this one, and the wheel in place of the clone."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    # A folder that a .pth file adds has its own .pth files ignored, so that the clone is not found through it.
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, timeout=120)
    return python.parent


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_every_module_of_the_wheel_is_imported(wheel, environment, tmp_path):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    assert {name.split("/")[0] for name in names} == {"theworld"}
    modules = sorted({name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names})
    assert {"theworld.cli", "theworld.training.train", "theworld.checkpoints.verify"} <= set(modules)
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = run([environment / "python", "-c", code, *sorted(set(modules) - ELSEWHERE)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_wheel_has_the_model_and_no_repo_folders(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"theworld/model.safetensors", "theworld/chat_template.jinja"} <= set(names)
    assert {"theworld/evaluation/tasks/vsr.yaml", "theworld/evaluation/tasks/_question"} <= set(names)
    for folder in ("tests", "recipe", "benchmarks", "scripts", "docs", "constraints", "results"):
        assert not [name for name in names if f"/{folder}/" in f"/{name}"], folder


def test_commands_run_from_another_folder(environment, sources, tmp_path):
    theworld = environment / "theworld"
    listed = run([theworld, "--help"], tmp_path)
    assert listed.returncode == 0 and "precompute-latents" in listed.stdout
    for command in (["convert", "--help"], ["train", "--help"], ["precompute-latents", "--help"]):
        assert run([theworld, *command], tmp_path).returncode == 0, command
    given = ["--vae", sources / "pipeline", "--gemma", sources / "gemma2"]
    words = [*given, "--output-dir", "mine", "--image-size", "64"]
    for command in (["convert", *words], ["verify", "mine"], ["ask", ROOT / "assets" / "scene.png", "What is it?"]):
        done = run([theworld, *command], tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["fly"], "theworld: error: argument COMMAND: invalid choice: 'fly'"),
        (["convert", "--vae", "x"], "theworld convert: error: the following arguments are required: --gemma"),
        (["verify", "nothing"], "theworld verify: error: "),
        (["merge", "nothing"], "theworld merge: error: "),
        (["evaluate"], "theworld evaluate: error: lm_eval is not installed. In a clone, run"),
        (["train", "--model", "nothing"], "theworld train: error: "),
        (["precompute-latents"], "theworld precompute-latents: error: "),
        (["ask", "nothing.png", "What?"], "theworld ask: error: There is no file nothing.png"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_gives_one_line_and_exit_code_1(environment, words, error, tmp_path):
    done = run([environment / "python", "-m", "theworld.cli", *words], tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(error)
    assert "Traceback" not in done.stderr and "usage" not in done.stderr
