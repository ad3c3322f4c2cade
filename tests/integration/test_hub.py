"""Tests the Hub: pushed, loaded by name and commit, offline, with changed code, over broken connections."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from transformers import AutoModel

from tests.helpers import ROOT
from tests.helpers.commands import run_theworld
from tests.helpers.docs import snippets
from tests.helpers.fake_hub import Hub, Repo
from tests.helpers.fresh import run_fresh
from theworld.convert_weights import MODEL_FILES


NAME = "org/theworld"
# The two ways in the docs to load a commit.
PINNED = [each.code for each in snippets("docs/publishing.md", "python") if "COMMIT" in each.code]

PUSH = """
import sys
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model.push_to_hub(sys.argv[2])
print(processor.push_to_hub(sys.argv[2]).oid)
"""

# Loads by name and revisions, without the package; prints each answer, and the note that a later code has.
ASK = """
import sys
sys.modules["theworld"] = None
from PIL import Image
from transformers import AutoModel, AutoProcessor
name, picture, *revisions = sys.argv[1:]
content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "How many circles are there?"}]
for revision in revisions:
    model = AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=5)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer, getattr(sys.modules[type(model).__module__], "NOTE", "first"))
"""
PICTURE = ROOT / "assets" / "scene.png"


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def online(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    hub.downloads.clear()
    hub.before_content = lambda path: None


@pytest.fixture(scope="module")
def first_commit(hub, tmp_path_factory):
    """The bundled model and its processor, pushed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.address)
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("HF_TOKEN", "hf_of_the_tests")
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        return run_fresh("-c", PUSH, ROOT, NAME, cache=tmp_path_factory.mktemp("pusher")).strip()


def weights_downloads(hub) -> list[str | None]:
    return [wanted for path, wanted in hub.downloads if path == "model.safetensors"]


def test_push_to_hub_uploads_a_complete_repo(hub, first_commit):
    tree = hub.repos[NAME].commits[first_commit]
    assert hub.repos[NAME].resolve("main") == first_commit
    assert set(tree) >= {*MODEL_FILES, "config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"}
    for name in MODEL_FILES:
        assert tree[name] == (ROOT / name).read_bytes()


def test_each_commit_loads_with_its_own_code(hub, first_commit, tmp_path, monkeypatch):
    """By name, then offline; a later commit has other code and the same weights."""
    assert run_fresh("-c", ASK, NAME, PICTURE, first_commit, cache=tmp_path).split() == ["2", "first"]
    assert weights_downloads(hub) == [None]

    tree = dict(hub.repos[NAME].commits[first_commit])
    tree["modeling_theworld.py"] += b'\nNOTE = "second"\n'
    second_commit = hub.commit(NAME, tree)
    revisions = ("main", first_commit, second_commit)
    answers = run_fresh("-c", ASK, NAME, PICTURE, *revisions, cache=tmp_path).splitlines()
    assert answers == ["2 second", "2 first", "2 second"]
    assert len(weights_downloads(hub)) == 1  # the same in both

    hub.downloads.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    answers = run_fresh("-c", ASK, NAME, PICTURE, "main", first_commit, cache=tmp_path).splitlines()
    assert answers == ["2 second", "2 first"]
    assert not hub.downloads


def test_pinned_commits_run_their_code_or_the_packages(hub, first_commit, tmp_path):
    """The docs' two snippets."""
    pinned = [code.replace("ORG/NAME", NAME).replace("COMMIT", first_commit) for code in PINNED]
    modules = [run_fresh("-c", f"{code}print(type(model).__module__)", cache=tmp_path).strip() for code in pinned]
    assert modules[0].startswith("transformers_modules.") and first_commit in modules[0]
    assert modules[1] == "theworld.modeling_theworld"


def test_a_broken_download_resumes_where_it_stopped(hub, first_commit, tmp_path):
    # In float64, because the client keeps whole chunks, and one of those is more than the bundled weights.
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float64)
    model.save_pretrained(tmp_path / "float64")
    large = {name: (tmp_path / "float64" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    commit = hub.commit(NAME, {**hub.repos[NAME].commits[first_commit], **large})
    breaks = iter([DOWNLOAD_CHUNK_SIZE + 1_000_000])
    hub.before_content = lambda path: next(breaks, None) if path == "model.safetensors" else None
    assert run_fresh("-c", ASK, NAME, PICTURE, commit, cache=tmp_path).split() == ["2", "first"]
    assert weights_downloads(hub) == [None, f"bytes={DOWNLOAD_CHUNK_SIZE}-"]


def test_a_killed_download_is_not_trusted_later(hub, first_commit, tmp_path):
    half_way, killed = threading.Event(), threading.Event()

    def hold(path: str) -> int | None:
        if path != "model.safetensors" or killed.is_set():
            return None
        half_way.set()
        killed.wait(60)
        return 3_000_000

    hub.before_content = hold
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.Popen([sys.executable, "-c", ASK, NAME, str(PICTURE), first_commit], env=environment)
    assert half_way.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed.set()
    assert run_fresh("-c", ASK, NAME, PICTURE, first_commit, cache=tmp_path).split() == ["2", "first"]


def test_an_unknown_revision_is_named(hub, first_commit, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ASK, NAME, str(PICTURE), "no-such-revision"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode and "no-such-revision" in finished.stderr


def test_conversion_reads_from_and_pushes_to_the_hub(hub, sources, tmp_path):
    upload = """
import sys
from huggingface_hub import HfApi
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    HfApi().create_repo(name)
    print(HfApi().upload_folder(repo_id=name, folder_path=folder).oid)
"""
    folders = (sources / "pipeline", "org/pipeline", sources / "gemma2", "org/gemma")
    vae_commit, _ = run_fresh("-c", upload, *folders, cache=tmp_path / "uploader").split()
    convert = ["--vae", "org/pipeline", "--vae-revision", vae_commit, "--gemma", "org/gemma"]
    options = ["--image-size", "64", "--output-dir", tmp_path / "converted", "--push-to-hub", "org/converted"]
    run_fresh("-m", "theworld.cli", "convert", *convert, *options, cache=tmp_path / "converter")

    assert not hub.repos["org/converted"].private
    pushed = hub.repos["org/converted"].commits[hub.repos["org/converted"].resolve("main")]
    written = {
        path.relative_to(tmp_path / "converted").as_posix(): path.read_bytes()
        for path in (tmp_path / "converted").rglob("*")
        if path.is_file()
    }
    assert pushed == {**written, ".gitattributes": pushed[".gitattributes"]}
    assert vae_commit.encode() in pushed["README.md"]
    answer = run_fresh("-c", ASK, "org/converted", PICTURE, "main", cache=tmp_path / "user")
    assert answer.strip().endswith("first")


def test_a_private_push_makes_a_private_repo(hub, sources, tmp_path):
    paths = ("--vae", sources / "pipeline", "--gemma", sources / "gemma2", "--output-dir", tmp_path / "converted")
    options = ("--image-size", "64", "--push-to-hub", "org/secret", "--private")
    run_fresh("-m", "theworld.cli", "convert", *paths, *options, cache=tmp_path / "converter")
    assert hub.repos["org/secret"].private and "config.json" in list(hub.repos["org/secret"].commits.values())[-1]


def test_a_private_push_to_a_public_repo_is_rejected(hub, sources, tmp_path):
    hub.repos["org/public"] = Repo()
    commit = hub.repos["org/public"].commit({})
    paths = ("--vae", sources / "pipeline", "--gemma", sources / "gemma2", "--output-dir", tmp_path / "converted")
    finished = run_theworld("convert", *paths, "--push-to-hub", "org/public", "--private")
    assert finished.returncode == 1
    assert "org/public is a public repo already. Make it private on the Hub" in finished.stderr
    assert not (tmp_path / "converted").exists() and list(hub.repos["org/public"].commits) == [commit]


def test_pushing_a_model_keeps_the_repos_processor(hub, tmp_path):
    code = """
import sys
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
processor.image_processor.size = {"height": 96, "width": 96}
processor.push_to_hub(sys.argv[2])
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub(sys.argv[2])
print(AutoProcessor.from_pretrained(sys.argv[2], trust_remote_code=True).image_processor.size["height"])
"""
    assert run_fresh("-c", code, ROOT, "org/larger", cache=tmp_path).strip() == "96"
