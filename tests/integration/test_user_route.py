"""Tests the user's route: a folder, the Auto classes, a fresh process, an empty cache."""

import json

import pytest

from tests.helpers import ROOT
from tests.helpers.fresh import run_fresh
from theworld.convert_weights import MODEL_FILES


STEPS = ROOT / "tests" / "helpers" / "user_route.py"


def test_generation_from_text_images_and_batches(checkpoint, tmp_path):
    run_fresh(STEPS, "answer", checkpoint, cache=tmp_path)


def test_a_tuned_copy_reloads_bit_for_bit_with_code(convert, tmp_path):
    output = tmp_path / "tuned"
    run_fresh(STEPS, "tune", convert("gemma2"), output, cache=tmp_path / "cache")
    original = json.loads((convert("gemma2") / "config.json").read_text())
    for form in ("float32", "bfloat16", "sharded"):
        saved = json.loads((output / form / "config.json").read_text())
        assert saved["auto_map"] == original["auto_map"]
        assert {path.name for path in (output / form).iterdir()} >= set(MODEL_FILES)
    assert len(list((output / "sharded").glob("*.safetensors"))) > 1
    # Another cache: what loads now is the code saved with the copy.
    run_fresh(STEPS, "check", output, cache=tmp_path / "another cache")


def test_the_installed_package_needs_no_remote_code(convert, tmp_path):
    code = """
import sys, theworld
from transformers import AutoModel, AutoProcessor
for auto_class, name in ((AutoModel, "TheWorldForConditionalGeneration"), (AutoProcessor, "TheWorldProcessor")):
    assert type(auto_class.from_pretrained(sys.argv[1])) is getattr(theworld, name)
assert not any(name.startswith("transformers_modules") for name in sys.modules)
"""
    run_fresh("-c", code, convert("gemma2"), cache=tmp_path)


@pytest.mark.parametrize("save_from", ["package", "remote code"])
def test_a_model_made_from_a_config_saves_its_code(save_from, convert, tmp_path):
    code = """
import sys
from transformers import AutoConfig, AutoModel
trust = sys.argv[3] == "remote code"
if not trust:
    import theworld
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=trust)
AutoModel.from_config(config, trust_remote_code=trust).save_pretrained(sys.argv[2])
"""
    run_fresh("-c", code, convert("gemma2"), tmp_path / "saved", save_from, cache=tmp_path / "cache")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForMultimodalLM"] == "modeling_theworld.TheWorldForConditionalGeneration"
    of_processor = {"processing_theworld.py", "images_theworld.py", "videos_theworld.py"}
    assert set(MODEL_FILES) - of_processor <= {path.name for path in (tmp_path / "saved").iterdir()}
