"""Tests that loading uses no network, unpickles nothing and reads no other folder, and that it checks versions."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.helpers import ROOT
from theworld import versions_theworld
from theworld.training.data import resolve_image_path


WITHOUT_NETWORK = """
import socket, sys

def reject(*args, **kwargs):
    raise AssertionError(f"reached for the network: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = reject
if sys.argv[2] == "package":
    import theworld
from transformers import AutoModel, AutoProcessor
trust = sys.argv[2] == "remote code"
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=trust)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=trust)
model.generate(**processor(text="a", return_tensors="pt"), max_new_tokens=1)
remote = {name.rpartition(".")[2] for name in sys.modules if name.startswith("transformers_modules")}
print(*sorted(name for name in remote if name.endswith("_theworld")))
"""


@pytest.mark.parametrize("route", ["package", "remote code"])
def test_loading_uses_no_network_and_runs_only_remote_code(convert, tmp_path, route):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_NETWORK, convert("gemma2"), route]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    ran = set(finished.stdout.split())
    assert ran == ({path.stem for path in ROOT.glob("*_theworld.py")} if route == "remote code" else set())


def test_a_pickle_is_not_read(convert, tmp_path):
    folder = shutil.copytree(convert("gemma2"), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="reads safetensors only, got use_safetensors=False"):
        AutoModel.from_pretrained(folder, trust_remote_code=True, use_safetensors=False)


@pytest.mark.parametrize("image", ["../secret.png", "/etc/hostname", "images/../../secret.png", "images/link.png"])
def test_dataset_paths_outside_their_folder_are_rejected(tmp_path, image):
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="is outside the dataset's folder .* Put it there"):
        resolve_image_path(tmp_path / "data", image)


def test_dataset_paths_inside_their_folder_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    for image in ("images/a.png", "images/../images/a.png", str(tmp_path / "images" / "a.png")):
        assert resolve_image_path(Path("."), image) == str(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="does not exist"):
        resolve_image_path(Path("."), "b.png")


def test_requirements_are_the_oldest_tested_versions_unbounded():
    for package, (oldest, _) in versions_theworld.TESTED.items():
        (bounds,) = (requirement for requirement in requires("theworld") if re.match(rf"{package}\b", requirement))
        assert bounds == f"{package}>={oldest}"
    assert not [requirement for requirement in requires("theworld") if "<" in requirement]


@pytest.mark.parametrize("package", versions_theworld.TESTED)
def test_versions_outside_the_tested_are_named_in_one_line(monkeypatch, package, recwarn):
    oldest, newest = versions_theworld.TESTED[package]
    for tested in versions_theworld.TESTED[package]:
        installed = {name: oldest for name, (oldest, _) in versions_theworld.TESTED.items()} | {package: f"{tested}.7"}
        monkeypatch.setattr(versions_theworld, "version", installed.get)
        versions_theworld.check_versions()
    assert not recwarn
    major, minor = newest.split(".")
    for newer in (f"{major}.{int(minor) + 1}.0", f"{major}.{int(minor) + 1}.0.dev0"):
        installed[package] = newer
        expected = f"tested with {package} {oldest} to {newest}, and {newer} is installed."
        with pytest.warns(UserWarning, match=re.escape(expected)):
            versions_theworld.check_versions()
    installed[package] = "0.1"
    with pytest.raises(ImportError, match=f"{package} {oldest} to {newest}, and 0.1 is installed. Run `pip install"):
        versions_theworld.check_versions()
