"""Tests that the training commands report unreadable input in one line."""

from pathlib import Path

import pytest

from theworld.training import precompute_latents, train


ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken(tmp_path) -> Path:
    (tmp_path / "broken.jsonl").write_text('{"messages": [\n')
    (tmp_path / "broken.yaml").write_text("learning_rate: [1\n: :")
    return tmp_path


def last_line(capsys) -> str:
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.splitlines()[-1]


def test_a_broken_dataset_is_reported_with_its_name(broken, capsys):
    file = broken / "broken.jsonl"
    options = ["--model", str(ROOT), "--dataset", str(file)]
    assert train.main([*options, "--output_dir", str(broken / "run")]) == 1
    assert f"theworld train: error: {file} cannot be read as a dataset: " in last_line(capsys)
    assert precompute_latents.main([*options, "--output-dir", str(broken / "latents")]) == 1
    assert f"theworld precompute-latents: error: {file} cannot be read as a dataset: " in last_line(capsys)


def test_a_missing_dataset_is_reported_as_a_missing_file(tmp_path, capsys):
    options = ["--model", str(ROOT), "--dataset", "none.jsonl", "--output_dir", str(tmp_path / "run")]
    assert train.main(options) == 1
    assert "error: There is no file or folder none.jsonl, and no dataset of that name" in last_line(capsys)


def test_a_broken_config_file_is_reported(broken, capsys):
    options = ["--model", str(ROOT), "--dataset", "none", "--output_dir", str(broken / "run")]
    assert train.main([*options, "--config", str(broken / "broken.yaml")]) == 1
    assert last_line(capsys).startswith("theworld train: error: The --config file is not valid YAML: ")


@pytest.mark.parametrize("rows", ["0", "-1"])
def test_a_shard_needs_a_row(rows, tmp_path, capsys):
    options = ["--model", str(ROOT), "--dataset", "none", "--output-dir", str(tmp_path / "latents")]
    assert precompute_latents.main([*options, "--rows-per-shard", rows]) == 1
    assert f"--rows-per-shard must be at least 1, got {rows}." in last_line(capsys)
