"""Tests the docs' commands for two processes: the losses of one process, the shares of each, and the saves."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from PIL import Image
from safetensors.torch import load_file

from tests.helpers import ROOT
from tests.helpers.docs import command
from tests.helpers.fresh import load_fresh
from tests.helpers.training_runs import run_train, write_conversations
from theworld import TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.checkpoints import verify
from theworld.evaluation.scenes import draw_scene
from theworld.modeling_theworld import TheWorldModel
from theworld.training import precompute_latents
from theworld.training.data import ConversationCollator
from theworld.training.latents import load_latents
from theworld.training.train import Arguments, RemovedEncoder, check_heads


needs_5_23 = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="the Trainer takes models that from_pretrained shared out from transformers 5.23 on",
)
# By what the docs' command says: rows a process, of four in a step.
WAYS = [
    pytest.param("--num_processes 2", 2, id="DDP"),
    pytest.param("--fsdp-size 2", 2, id="FSDP2", marks=needs_5_23),
    pytest.param("--tp-size 2", 4, id="TP", marks=needs_5_23),
]
TOWER_WEIGHT = "model.multi_modal_projector.mm_input_projection_weight"
REPORTING = "-m tests.helpers.reporting_train"
# What the tests add to the docs' commands: few and comparable steps, and a checkpoint on the way.
ADDED = {
    "max_steps": 20,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "save_steps": 10,
    "bf16": False,
    "disable_tqdm": True,
}


def command_of(pattern: str) -> str:
    """The docs' command with these words; what it runs also reports."""
    return command("docs/finetuning.md", pattern).replace("-m theworld.cli train", REPORTING)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Callable[..., Path]:
    """Runs a command of the docs where there are `my-theworld` and `data`; gives `tuned`."""

    def run(command: str, folder: Path, **options) -> Path:
        launcher, *words = command.split()
        words += [word for name, value in {**ADDED, **options}.items() for word in (f"--{name}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [Path(sys.executable).parent / launcher, *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder / "tuned"

    return run


def make_folder(folder: Path) -> Path:
    write_conversations(folder / "data")
    (folder / "my-theworld").symlink_to(ROOT)
    return folder


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory) -> Callable[[str, int], Path]:
    """What a command of the docs saves; the same one runs once."""

    @functools.cache
    def run(command: str, rows: int) -> Path:
        return start(command, make_folder(tmp_path_factory.mktemp("run")), per_device_train_batch_size=rows)

    return run


def reports_of(output: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(output.glob("report-*.json"))]


def alone(command: str) -> str:
    """The same in one process."""
    return "python " + re.sub(r" --(fsdp|tp)-size 2", "", command[command.index(REPORTING) :])


@pytest.mark.parametrize(("pattern", "rows"), WAYS)
def test_two_processes_have_the_losses_of_one(pattern, rows, trained):
    command = command_of(pattern)
    reports = reports_of(trained(command, rows))
    (expected,) = reports_of(trained(alone(command), 4))
    assert len(reports) == 2 and len(expected["losses"]) == 20
    for report in reports:
        assert report["losses"] == pytest.approx(expected["losses"], abs=1e-4)

    held = reports[0]["held"]
    if "num_processes" in pattern:
        assert reports[0]["wrapper"] == "DistributedDataParallel" and not held
    elif "fsdp" in pattern:
        assert held.keys() == set(reports[0]["parameters"])
        assert sum(share <= 0.51 for share in held.values()) > 0.9 * len(held)  # but vectors of one number
    else:
        sharded = {name for name, share in held.items() if share == 0.5}
        for matrix in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            assert (
                f"model.language_model.layers.3.{'self_attn' if matrix[1] == '_' else 'mlp'}.{matrix}.weight"
                in sharded
            )


@pytest.mark.parametrize(("pattern", "rows"), WAYS)
def test_two_processes_save_an_ordinary_checkpoint(pattern, rows, trained):
    output, reference = trained(command_of(pattern), rows), trained(alone(command_of(pattern)), 4)
    processor = TheWorldProcessor.from_pretrained(ROOT)
    inputs = processor(text="<world>What is it?", images=draw_scene(9).image, return_tensors="pt")
    saved = [output / name for name in ("", "checkpoint-10", "checkpoint-20")]
    last, middle, same = load_fresh(inputs, *saved)
    assert torch.equal(last, same) and not torch.equal(last, middle)

    expected = load_file(reference / "model.safetensors")
    names = {file.name for file in (reference / "checkpoint-20").iterdir()}
    for folder in saved:
        assert verify.main([str(folder)]) == 0
        assert {file.name for file in folder.glob("*.py")} == {name for name in names if name.endswith(".py")}
        assert (folder / "config.json").read_text() == (reference / "config.json").read_text()
    weights = load_file(output / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-3, rtol=1e-2, msg=name)


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.20"),
    reason="transformers 5.17 loads the optimizer of several processes on CPUs to `cpu:0`, which torch does not know",
)
def test_two_processes_resume_as_an_uninterrupted_run(start, trained, tmp_path):
    command = command_of("--num_processes 2")
    whole, folder = trained(command, 2), make_folder(tmp_path)
    shutil.copytree(whole / "checkpoint-10", folder / "tuned" / "checkpoint-10")
    resumed = start(command, folder, per_device_train_batch_size=2, resume_from_checkpoint=True)
    for report, expected in zip(reports_of(resumed), reports_of(whole), strict=True):
        assert report["losses"] == expected["losses"]


@pytest.fixture(scope="module")
def trained_on_few_images(start, tmp_path_factory) -> Callable[[str, int], dict]:
    """The report of a run in which every other conversation has no image; a step is of two conversations."""
    # With plain SGD, a missing gradient and a zero gradient have the same effect; with momentum they differ.
    options = {"train": "all", "optim": "sgd", "learning_rate": 1e-2, "max_steps": 8, "save_strategy": "no"}
    options |= {"eval_split": "validation", "eval_strategy": "steps", "eval_steps": 8, "per_device_eval_batch_size": 1}

    @functools.cache
    def run(command: str, rows: int) -> dict:
        folder = make_folder(tmp_path_factory.mktemp("few images"))
        data = folder / "data" / "train.jsonl"
        conversations = [json.loads(line) for line in data.read_text().splitlines()]
        for conversation in conversations[::2]:
            conversation["images"] = []
        lines = [json.dumps(conversation) + "\n" for conversation in conversations]
        data.write_text("".join(lines))
        (folder / "data" / "validation.jsonl").write_text("".join(lines[:6]))
        ddp = {"ddp_find_unused_parameters": False}
        return reports_of(start(command, folder, per_device_train_batch_size=rows, **options, **ddp))[0]

    return run


@pytest.mark.parametrize(("pattern", "rows"), WAYS)
def test_processes_without_images_keep_in_step(pattern, rows, trained_on_few_images):
    report = trained_on_few_images(command_of(pattern), rows // 2)
    expected = trained_on_few_images(alone(command_of("--fsdp-size 2")), 2)
    assert report["losses"] == pytest.approx(expected["losses"], abs=1e-4) and len(report["losses"]) == 8
    assert report["eval_losses"] == pytest.approx(expected["eval_losses"], abs=1e-4) and report["eval_losses"]


@needs_5_23
def test_processes_with_images_of_several_sizes_keep_in_step(start, tmp_path):
    """A process with one size, and another with several, gather the encoder's weights equally often."""

    def losses_of(command: str, rows: int) -> list[float]:
        folder = make_folder(tmp_path / str(rows))
        (folder / "my-theworld").unlink()
        model = folder / "my-theworld"
        shutil.copytree(ROOT, model, ignore=lambda at, names: [name for name in names if (Path(at) / name).is_dir()])
        settings = json.loads((model / "processor_config.json").read_text())
        settings["image_processor"]["size"] = {"shortest_edge": 64, "longest_edge": 4096}
        (model / "processor_config.json").write_text(json.dumps(settings))
        for number, path in enumerate(sorted((folder / "data" / "images").iterdir())):
            Image.open(path).resize([(64, 64), (96, 40), (24, 80)][number % 4 % 3]).save(path)
        return reports_of(start(command, folder, per_device_train_batch_size=rows, max_steps=3))[0]["losses"]

    command = command_of("--fsdp-size 2")
    assert losses_of(command, 2) == pytest.approx(losses_of(alone(command), 4), abs=1e-4)


@needs_5_23
def test_training_on_latents_saves_the_encoder_too(start, tmp_path):
    folder = make_folder(tmp_path)
    arguments = ["--model", str(ROOT), "--dataset", str(folder / "data" / "train.jsonl"), "--dtype", "float32"]
    assert precompute_latents.main([*arguments, "--output-dir", str(folder / "latents")]) == 0
    command = command_of("--fsdp-size 2").replace("--train all", "--train language")
    output = start(command, folder, dataset="latents", max_steps=2, per_device_train_batch_size=2)
    assert verify.main([str(output)]) == 0
    saved, before = load_file(output / "model.safetensors"), load_file(ROOT / "model.safetensors")
    encoder = [name for name in before if "world_encoder" in name]
    assert encoder and all(torch.equal(saved[name], before[name]) for name in encoder)


# In this process.

FORMS = {
    "images and videos": {},
    "a token a channel": {"token_layout": "channel", "image_size": 32},
    "four positions a token": {"latent_merge_size": 2, "projector_type": "mlp"},
    "latents": {},
}


@pytest.mark.parametrize("form", FORMS)
def test_absent_images_reach_every_weight_and_change_no_number(form, monkeypatch):
    config = TheWorldForConditionalGeneration.config_class.from_pretrained(ROOT)
    model = TheWorldForConditionalGeneration(config.__class__(**{**config.to_dict(), **FORMS[form]})).train()
    if form == "latents":
        model.model.world_encoder = RemovedEncoder()
    ids = torch.tensor([[2, 30, 31, 32]])
    expected = model(input_ids=ids, labels=ids)
    monkeypatch.setattr(TheWorldModel, "is_in_step", True)
    outputs = model(input_ids=ids, labels=ids)
    assert torch.equal(outputs.logits, expected.logits)
    outputs.loss.backward()
    for part in (model.model.world_encoder, model.model.world_projection):
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in part.parameters())


def test_absent_images_reach_gemmas_own_vision_too(convert_whole, monkeypatch):
    model = TheWorldForConditionalGeneration.from_pretrained(convert_whole()).train()
    monkeypatch.setattr(TheWorldModel, "is_in_step", True)
    ids = torch.tensor([[2, 30, 31, 32]])
    model(input_ids=ids, labels=ids).loss.backward()
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in part.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_size": 2, "train": "lora"}, "--train lora trains an adapter, which --fsdp-size and --tp-size cannot"),
        ({"tp_size": 2, "train": "projection"}, "--train projection trains an adapter, .* choose --train language"),
        ({"fsdp_size": 2, "train": "all", "resume_from_checkpoint": True}, "Omit --resume_from_checkpoint"),
        ({"fsdp_size": 2, "tp_size": 2, "train": "all"}, "--fsdp-size 2 and --tp-size 2 cannot be combined"),
        ({"fsdp_size": 3, "train": "all"}, "--fsdp-size 3 with --tp-size 1 needs 3 processes, got 1. Start them"),
    ],
)
def test_what_a_sharded_run_cannot_do_is_rejected(options, message, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers, "__version__", "5.23.0")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").touch()
    with pytest.raises(ValueError, match=message):
        run_train(**options, dataset="none", model="none", output_dir=tmp_path)


def test_shares_need_transformers_5_23_and_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(transformers, "__version__", "5.22.1")
    with pytest.raises(ValueError, match="need transformers 5.23 or later, and 5.22.1 is installed. Upgrade"):
        run_train(fsdp_size=2, train="all", dataset="none", model="none", output_dir=tmp_path)


@needs_5_23
def test_processes_with_a_tower_have_the_losses_of_one(start, convert_whole, tmp_path):
    """One row of four has no image, so in some steps one process has none."""
    folders = [tmp_path / name for name in ("two", "one")]
    for folder in folders:
        dataset = write_conversations(folder / "data", 8)
        rows = [json.loads(line) for line in dataset.read_text().splitlines()]
        for row in rows[::4]:
            row["images"] = []
        dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "my-theworld").symlink_to(convert_whole())
    command = command_of("--fsdp-size 2")
    options = {"max_steps": 4, "save_strategy": "no"}
    two = start(command, folders[0], per_device_train_batch_size=1, **options)
    one = start(alone(command), folders[1], per_device_train_batch_size=2, **options)
    (expected,) = reports_of(one)
    for report in reports_of(two):
        assert report["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert torch.equal(*(load_file(run / "model.safetensors")[TOWER_WEIGHT] for run in (one, two)))


def test_tp_rejects_heads_that_it_cannot_split():
    args = Arguments(model="my-theworld", dataset="data", tp_size=2)
    check_heads(args, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"--tp-size 2 does not divide the 1 key-value head\(s\)"):
        check_heads(args, num_key_value_heads=1)


def test_two_processes_make_the_latents_of_one(tmp_path):
    """They are killed after the first shard, and continue as three."""
    dataset = write_conversations(tmp_path / "data", 10)
    (tmp_path / "my-theworld").symlink_to(ROOT)

    def start(processes: int, folder: str) -> subprocess.Popen:
        words = command("docs/finetuning.md", "theworld.cli precompute-latents").split()
        words[0] = str(Path(sys.executable).parent / words[0])
        changed = {"--nproc-per-node": processes, "--output-dir": folder, "--rows-per-shard": 1}
        for option, value in changed.items():
            words[words.index(option) + 1] = str(value)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(words, cwd=tmp_path, env=environment, start_new_session=True)

    killed = start(2, "latents")
    while killed.poll() is None and not list((tmp_path / "latents").glob("shard-*")):
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert start(3, "latents").wait(timeout=120) == 0
    arguments = ["--model", str(ROOT), "--dataset", str(dataset), "--output-dir", str(tmp_path / "alone")]
    assert precompute_latents.main([*arguments, "--rows-per-shard", "1"]) == 0
    collator = ConversationCollator(TheWorldProcessor.from_pretrained(ROOT))
    together, alone = (load_latents(tmp_path / name, str(ROOT), collator) for name in ("latents", "alone"))
    assert together["messages"][:] == alone["messages"][:]
    for of_row, expected in zip(together["world_latents"], alone["world_latents"], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(of_row, expected, strict=True))


def test_precomputing_loads_the_encoder_only():
    loaded = precompute_latents.load_encoder(str(ROOT))
    held = {name.split(".")[1] for name, parameter in loaded.named_parameters() if not parameter.is_meta}
    assert held == {"world_encoder"}
