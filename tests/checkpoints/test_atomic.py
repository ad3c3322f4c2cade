"""Tests atomic folders (kills, full disks, concurrent runs) and that `theworld verify` names damaged files."""

import json
import os
import re
import resource
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.helpers import ROOT
from tests.helpers.kill_process import kill
from tests.helpers.training_runs import write_conversations
from theworld import convert_weights
from theworld.checkpoints import atomic, verify
from theworld.checkpoints.atomic import CHECKSUMS, WITHOUT_CHECKSUM, atomic_folder, verify_checksums, write_checksums
from theworld.training import train


def test_a_killed_conversion_leaves_a_complete_folder(sources, tmp_path):
    """A kill at any moment leaves the old folder or the new one."""
    report = kill("conversions", sources / "pipeline", sources / "gemma2", tmp_path / "out" / "theworld", 16)
    assert report["killed"] == report["survived"] > 8 and report["left beside"] == 0


def test_a_killed_training_keeps_its_checkpoints(tmp_path):
    report = kill("trainings", ROOT, write_conversations(tmp_path / "data"), tmp_path / "runs" / "run", 8)
    assert report["killed"] == report["survived"] > 4 and report["left beside"] == 0


def write(folder: Path, content: str) -> None:
    (folder / "content.txt").write_text(content)


def read(folder: Path) -> str:
    return (folder / "content.txt").read_text()


@pytest.mark.parametrize("swaps", [True, False], ids=["swapped in one step", "where there is no such step"])
def test_replacing_a_folder_leaves_no_other_folders(tmp_path, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "out", overwrite=True) as partial:
            write(partial, content)
        assert read(tmp_path / "out") == content and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_a_killed_run_moved_is_restored(tmp_path):
    with atomic_folder(tmp_path / "out", overwrite=False) as partial:
        write(partial, "old")
    (tmp_path / "out").rename(atomic.sibling(tmp_path / "out", "previous"))
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError("the next run fails as well")
    assert read(tmp_path / "out") == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_writers_of_one_folder_leave_it_complete(tmp_path, overwrite):
    output = tmp_path / "out"
    try:
        with atomic_folder(output, overwrite) as first:
            write(first, "first")
            with atomic_folder(output, overwrite) as second:
                assert first.is_dir()  # another run writes it
                write(second, "second")
            assert read(output) == "second"
    except FileExistsError as error:
        assert not overwrite and "Choose another --output-dir, or pass --overwrite" in str(error)
    assert read(output) == ("first" if overwrite else "second") and len(list(tmp_path.iterdir())) == 1


def test_an_unwritable_target_is_named_in_one_line(sources, capsys):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        user = os.geteuid()
        try:
            if user == 0:  # whom no permission stops
                os.seteuid(65534)
            arguments = ["--vae", str(sources / "pipeline"), "--gemma", str(sources / "gemma2")]
            with pytest.raises(PermissionError, match=folder), atomic_folder(Path(folder) / "out", False):
                pass
        finally:
            os.seteuid(user)
        assert not list(Path(folder).iterdir())
    file = sources / "gemma2" / "config.json"
    assert convert_weights.main([*arguments, "--output-dir", str(file / "out")]) == 1
    assert f"File exists: '{file}'" in capsys.readouterr().err.splitlines()[-1]


def test_a_disks_root_is_rejected_before_any_work(capsys):
    with pytest.raises(
        OSError, match="/dev/shm is the root of a disk, which cannot be replaced as a whole. Name a folder"
    ):
        train.train_and_save(train.prepare(["--dataset", "none", "--model", "none", "--output_dir", "/dev/shm"]))
    with pytest.raises(OSError, match="Name a folder in it"), atomic_folder(Path("/dev/shm"), True):
        pass


@pytest.mark.parametrize("links", [True, False], ids=["linked", "where there are no links"])
def test_other_files_in_a_replaced_folder_are_kept(tmp_path, monkeypatch, links):
    def reject(*paths):
        raise OSError

    if not links:
        monkeypatch.setattr(os, "link", reject)
    output, partial = tmp_path / "out", tmp_path / "partial"
    for folder, files in ((output, ["model", "old"]), (partial, ["model"])):
        folder.mkdir()
        for file in files:
            (folder / file).write_text(f"{file} of {folder.name}")
        write_checksums(folder)
    (output / "checkpoint-1").mkdir()
    (output / "checkpoint-1" / "model").write_text("of a checkpoint")
    (output / "log").symlink_to(tmp_path)
    atomic.carry_over(output, partial)
    atomic.replace_folder(partial, output, overwrite=True)
    assert {path.name for path in output.iterdir()} == {"SHA256SUMS", "model", "checkpoint-1", "log"}
    assert verify_checksums(output) == ["model"] and (output / "model").read_text() == "model of partial"
    assert (output / "checkpoint-1" / "model").read_text() == "of a checkpoint"
    assert (output / "log").readlink() == tmp_path and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_keeps_the_old_folder(convert, sources, tmp_path, capfd):
    output = Path(shutil.copytree(convert("gemma2"), tmp_path / "out"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ["--vae", sources / "pipeline", "--gemma", sources / "gemma2"]
    arguments += ["--output-dir", output, "--image-size", 64]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        code = convert_weights.main([*map(str, arguments), "--overwrite"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and "File too large" in capfd.readouterr().err.splitlines()[-1]
    assert (
        len(verify_checksums(output)) == len(list(output.iterdir())) - len(WITHOUT_CHECKSUM)
        and len(list(tmp_path.iterdir())) == 1
    )


def verify_folder(capsys, *arguments: Path | str) -> tuple[int, str]:
    """The exit code of `theworld verify`, and the line that it printed."""
    code = verify.main([*map(str, arguments)])
    printed = capsys.readouterr()
    return code, (printed.err if code else printed.out).splitlines()[-1]


def test_a_complete_checkpoint_is_verified_against_its_sources(convert, sources, capsys):
    code, line = verify_folder(capsys, convert("gemma2"))
    files = len(list(convert("gemma2").iterdir())) - len(WITHOUT_CHECKSUM)
    assert code == 0 and line.startswith(f"{files} files match their checksums; ")
    assert line.endswith("that the config describes.")
    both = ["--vae", sources / "pipeline", "--gemma", sources / "gemma2"]
    code, line = verify_folder(capsys, convert("gemma2"), *both)
    from_sources = len(load_file(convert("gemma2") / "model.safetensors")) - 2  # but the projection's
    assert code == 0 and line.endswith(f"; {from_sources} tensors equal to their sources.")
    for options in ([], ["--dtype", "bfloat16"], ["--token-layout", "channel"], ["--latent-merge-size", "2"]):
        assert verify_folder(capsys, convert("gemma2", *options), *both)[0] == 0
    subprocess.run(["sha256sum", "--check", "--quiet", CHECKSUMS], cwd=convert("gemma2"), check=True)


def test_a_tuned_checkpoint_differs_from_its_sources(convert, sources, tmp_path, capsys):
    folder = spoiled(convert("gemma2"), tmp_path, tensor("model.language_model.norm.weight", lambda each: each + 1))
    assert verify_folder(capsys, folder)[0] == 0
    code, line = verify_folder(capsys, folder, "--vae", sources / "pipeline", "--gemma", sources / "gemma2")
    assert code == 1 and "'model.language_model.norm.weight' differs from its source. It" in line


def spoiled(folder: Path, tmp_path: Path, spoil, sums: bool = True) -> Path:
    """A damaged copy of a checkpoint; unless `sums` is False, its checksums are those of the damaged files."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(copy)
    if sums:
        write_checksums(copy)
    return copy


def edit(name: str, change):
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def fields(name: str, **values):
    return edit(name, lambda content: json.dumps({**json.loads(content), **values}).encode())


def tensor(name: str, change):
    """Changes a tensor, or, if it becomes None, removes it."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        new = change(tensors.pop(name, None))
        tensors |= {} if new is None else {name: new}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def index(**weight_map: str):
    """The tensors by an index, which names another file for some."""

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        names = dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors")
        content = json.dumps({"metadata": {}, "weight_map": {**names, **weight_map}})
        (folder / "model.safetensors.index.json").write_text(content)

    return spoil


def listed_twice(content: bytes) -> bytes:
    """A safetensors file whose header lists its last tensor twice."""
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].decode().rstrip()
    last = header.rindex(',"model.')
    header = header[:-1] + header[last:]
    return struct.pack("<Q", len(header)) + header.encode() + content[8 + length :]


NORM = "model.language_model.norm.weight"
SPOILED = {
    "no sums": (lambda folder: (folder / CHECKSUMS).unlink(), f"has no {CHECKSUMS}, which"),
    "a file less": (lambda folder: (folder / "config.json").unlink(), "lacks config.json, which its"),
    "a bit flipped": (
        edit("model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        "model.safetensors is not the original file: its SHA-256 differs",
    ),
    "a shard more": (
        lambda folder: (folder / "model-2.safetensors").write_bytes(b""),
        "contains unexpected file model-2.safetensors",
    ),
    "a pickle": (lambda folder: (folder / "a.bin").write_bytes(b""), "contains unexpected file a.bin"),
}
SPOILED_WITH_SUMS = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "has no config.json. If it is an adapter, merge it",
    ),
    "cut off": (edit("model.safetensors", lambda content: content[:-99]), "is not a complete safetensors file"),
    "empty": (edit("model.safetensors", lambda content: b""), "is not a complete safetensors file"),
    "a tensor listed twice": (edit("model.safetensors", listed_twice), r"lists 'model\.[\w.]+' twice"),
    "NaN": (tensor(NORM, lambda each: each * torch.nan), f"'{NORM}' contains NaN or infinity"),
    "another dtype": (
        tensor(NORM, lambda each: each.half()),
        f"'{NORM}' is torch.float16, but config.json says torch.float32",
    ),
    "another shape": (
        tensor(NORM, lambda each: each[:5]),
        rf"'{NORM}' is \[5\], but its config.json describes \[64\]",
    ),
    "a tensor less": (
        tensor(NORM, lambda each: None),
        f"1 tensor.s. are missing from the checkpoint, such as '{NORM}'",
    ),
    "a tensor more": (
        tensor("extra", lambda each: torch.ones(1)),
        "1 tensor.s. are not part of the model, such as 'extra'",
    ),
    "tied weights twice": (
        tensor("lm_head.weight", lambda each: torch.ones(512, 64)),
        "1 tensor.s. are not part of the model, such as 'lm_head.weight'",
    ),
    "another vocabulary": (
        lambda folder: fields(
            "config.json",
            text_config={**json.loads((folder / "config.json").read_text())["text_config"], "vocab_size": 576},
        )(folder),
        r"embed_tokens.weight' is \[512, 64\], but its config.json describes \[576, 64\]",
    ),
    "fields that contradict": (fields("config.json", latent_merge_size=0), "`latent_merge_size` must be 1 or more"),
    "another token id": (
        fields("config.json", image_token_id=11),
        "<world> is 7 in the processor, but 11 in config.json",
    ),
    "another patch size": (
        fields("processor_config.json", patch_size=16),
        "patch_size is 16 in the processor, but 8 in config.json",
    ),
    "an index that names a missing shard": (
        index(extra="model-2.safetensors"),
        "names model-2.safetensors, which is missing",
    ),
    "an index that names a missing tensor": (
        index(extra="model-1.safetensors"),
        "differ on 1 tensor.s., such as 'extra'",
    ),
    "an index that leads elsewhere": (
        index(extra="../../a.safetensors"),
        "names '../../a.safetensors', which is not a file",
    ),
    "an index that is none": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "is not a safetensors index",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_checksums_name_the_changed_file(convert, tmp_path, capsys, spoil, message):
    code, line = verify_folder(capsys, spoiled(convert("gemma2"), tmp_path, spoil, sums=False))
    assert code == 1 and message in line


@pytest.mark.parametrize(("spoil", "message"), SPOILED_WITH_SUMS.values(), ids=SPOILED_WITH_SUMS)
def test_verify_names_the_fault(convert, tmp_path, capsys, spoil, message):
    code, line = verify_folder(capsys, spoiled(convert("gemma2"), tmp_path, spoil))
    assert code == 1 and re.search(message, line), line


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            edit("model.safetensors", lambda content: content[:-99]),
            OSError,
            "damaged or incomplete .* Download it again",
        ),
        (
            tensor(NORM, lambda each: None),
            ValueError,
            f"lacks 1 of the model's tensors, such as '{NORM}'. Download it",
        ),
        (index(extra="model-2.safetensors"), OSError, "No such file or directory: .*model-2.safetensors"),
        (tensor(NORM, lambda each: each[:5]), RuntimeError, "`ignore_mismatched_sizes`"),
    ],
    ids=["cut off", "a tensor less", "a shard less", "another shape"],
)
def test_a_damaged_checkpoint_is_not_loaded(convert, tmp_path, spoil, error, message):
    folder = spoiled(convert("gemma2"), tmp_path, spoil)
    with pytest.raises(error, match=message):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_missing_tensors_load_if_loading_info_is_requested(convert, tmp_path):
    folder = spoiled(convert("gemma2"), tmp_path, tensor(NORM, lambda each: None))
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert info["missing_keys"] == {NORM} and model.get_parameter(NORM).isfinite().all()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (convert_weights, ["--output-dir", "a"], "the following arguments are required: --vae, --gemma"),
        (verify, ["a", "--vae", "b"], "--vae and --gemma are compared together: give both or neither"),
    ],
    ids=["convert", "verify"],
)
def test_missing_arguments_are_named(command, arguments, message, capsys):
    assert command.main(arguments) == 1
    assert message in capsys.readouterr().err
