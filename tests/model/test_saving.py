"""Tests that saved folders load in a fresh process, or are rejected in one sentence."""

import shutil

import pytest
from transformers import AutoModel, AutoProcessor

from tests.helpers import ROOT
from tests.helpers.fresh import run_fresh


PICTURE = ROOT / "assets" / "scene.png"

WITHOUT_THE_PACKAGE = """
import sys
sys.modules["theworld"] = None
from functools import partial
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, pipeline
"""
SAVES = {
    "a pipeline": """
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
pipe.save_pretrained(sys.argv[2])
""",
    "model and tokenizer": """
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
""",
    "a model of no checkpoint": """
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoModel.from_config(config, trust_remote_code=True).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
""",
}
ANSWERS = """
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "image": sys.argv[2]}, {"type": "text", "text": "How many circles are there?"}]
answer = pipe([{"role": "user", "content": content}], max_new_tokens=5, return_full_text=False)[0]["generated_text"]
print(ascii(answer), AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True).to_json_string())
"""
REFUSES = """
for load in (AutoProcessor.from_pretrained, partial(pipeline, "image-text-to-text")):
    try:
        load(sys.argv[1], trust_remote_code=True)
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("saved", ["a pipeline", "model and tokenizer"])
def test_a_model_saved_without_its_processor_loads(saved, convert_whole, tmp_path):
    folder = ROOT if saved == "a pipeline" else convert_whole("--latent-merge-size", "2")
    run_fresh("-c", WITHOUT_THE_PACKAGE + SAVES[saved], folder, tmp_path / "saved", cache=tmp_path / "saver")
    before, after = (
        run_fresh("-c", WITHOUT_THE_PACKAGE + ANSWERS, each, PICTURE, cache=tmp_path / f"user {number}")
        for number, each in enumerate((folder, tmp_path / "saved"))
    )
    assert before == after


def test_a_folder_without_a_processor_is_rejected_at_once(convert, tmp_path):
    code = WITHOUT_THE_PACKAGE + SAVES["a model of no checkpoint"]
    run_fresh("-c", code, convert("gemma2"), tmp_path / "saved", cache=tmp_path / "saver")
    messages = run_fresh("-c", WITHOUT_THE_PACKAGE + REFUSES, tmp_path / "saved", cache=tmp_path / "user").splitlines()
    assert len(messages) == 2 and messages[0] == messages[1]
    assert messages[0].startswith(f"{tmp_path / 'saved'} has no processor_config.json, which says how images become")


@pytest.mark.parametrize("first", ["processor", "model"])
def test_a_changed_processor_is_never_replaced(first, tmp_path):
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    processor.image_processor.size = {"height": 96, "width": 96}
    for each in (processor, model) if first == "processor" else (model, processor):
        each.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert dict(saved.image_processor.size) == {"height": 96, "width": 96}


def test_saving_works_after_the_source_is_deleted(convert, tmp_path):
    shutil.copytree(convert("gemma2"), tmp_path / "source")
    model = AutoModel.from_pretrained(tmp_path / "source", trust_remote_code=True)
    shutil.rmtree(tmp_path / "source")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "processor_config.json").is_file()
