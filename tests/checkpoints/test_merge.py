"""Tests `theworld merge`: a merged adapter is a whole checkpoint, and what cannot be merged is named in one line."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from tests.helpers.fresh import load_fresh
from theworld import TheWorldConfig, TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.checkpoints import merge, verify
from theworld.convert_weights import MODEL_FILES
from theworld.training.train import Arguments, freeze_untrained


def save_adapter(model: Path, folder: Path, train: str = "lora") -> Path:
    """What `theworld train` saves, with every trained weight moved, as steps would."""
    torch.manual_seed(0)
    whole = AutoModel.from_pretrained(model, dtype=torch.float32)
    adapted = freeze_untrained(whole, Arguments(model=str(model), dataset="", train=train))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("train", "dtype"), [("projection", "float32"), ("lora", "bfloat16")])
def test_a_merged_adapter_is_a_whole_checkpoint(train, dtype, convert, photo, tmp_path):
    base = convert("gemma3_text", "--dtype", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", train)
    assert merge.main([str(adapter), "--output-dir", str(tmp_path / "merged")]) == 0
    assert verify.verify(tmp_path / "merged").dtype == dtype
    assert {*MODEL_FILES, "processor_config.json", "generation_config.json", "SHA256SUMS"} <= {
        path.name for path in (tmp_path / "merged").iterdir()
    }
    inputs = TheWorldProcessor.from_pretrained(base)(text="<world>What is it?", images=photo, return_tensors="pt")
    (merged,) = load_fresh(inputs, tmp_path / "merged")
    with torch.no_grad():
        model = TheWorldForConditionalGeneration.from_pretrained(base)
        before = model(**inputs).logits
        adapted = PeftModel.from_pretrained(model, adapter).eval()(**inputs).logits
    exact = {"atol": 1e-4, "rtol": 1e-4} if dtype == "float32" else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(merged.float(), adapted.float(), **exact)
    assert (merged - before).abs().max() > 2 * (merged - adapted).abs().max()


def test_a_merge_changes_what_was_trained_only(convert_whole, tmp_path):
    adapter = save_adapter(convert_whole(), tmp_path / "adapter", "projection")
    merge.merge(str(adapter), tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (convert_whole(), tmp_path / "merged"))
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert before.keys() == after.keys()
    assert changed and all("world_projection" in name or "embed_tokens" in name for name in changed)


def test_a_base_that_moved_is_named(convert, tmp_path, capsys):
    moved = shutil.copytree(convert("gemma2"), tmp_path / "old")
    adapter = save_adapter(moved, tmp_path / "adapter")
    moved.rename(tmp_path / "new")
    words = [str(adapter), "--output-dir", str(tmp_path / "merged")]
    assert merge.main(words) == 1
    assert f"was trained on {moved}, which cannot be loaded. Run the command where it is found, or name it with" in (
        capsys.readouterr().err
    )
    assert merge.main([*words, "--model", str(tmp_path / "new")]) == 0


def fewer_layers(base: Path, folder: Path) -> Path:
    config = TheWorldConfig.from_pretrained(base)
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    TheWorldForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("no adapter", "is not an adapter: it has no adapter_config.json. Give the folder"),
        ("a Gemma", "is a gemma2 model, but the adapter needs a TheWorld. Name it with --model."),
        ("other shapes", "does not fit"),
        ("fewer layers", "does not fit"),
        ("output exists", "exists and holds something. Choose another --output-dir, or pass --overwrite."),
        ("output is read", "which the merge reads. Choose another folder."),
    ],
)
def test_what_cannot_be_merged_gives_one_line(case, error, convert, sources, tmp_path, capsys):
    base, adapter, output = convert("gemma2"), save_adapter(convert("gemma2"), tmp_path / "adapter"), tmp_path / "out"
    if case == "output exists":
        output.mkdir()
        (output / "notes.txt").touch()
    words = {
        "no adapter": [base, "--output-dir", output],
        "a Gemma": [adapter, "--output-dir", output, "--model", sources / "gemma2"],
        "other shapes": [adapter, "--output-dir", output, "--model", convert("gemma2", "--projector-type", "mlp")],
        "fewer layers": [adapter, "--output-dir", output, "--model", fewer_layers(base, tmp_path / "small")],
        "output exists": [adapter, "--output-dir", output],
        "output is read": [adapter, "--output-dir", base, "--overwrite"],
    }[case]
    kept = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert merge.main([str(word) for word in words]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("theworld merge: error: ") and error in line
    assert sorted(tmp_path.rglob("*")) == kept
