"""Pins quantised loading (`make test-quantized`): only Gemma's matrices lose bits, and the answers stay right."""

import json
from pathlib import Path

import pytest
import torch
from test_run_it import promised, snippet

from recipe.evaluate import held_out_cases


ROOT = Path(__file__).parent.parent
RESULTS = json.loads((ROOT / "results" / "quantized.json").read_text())

pytestmark = pytest.mark.quantized

# What each setting of recipe/quantized.py makes of a matrix.
CLASSES = {
    "torchao int8": "Int8Tensor",
    "torchao int4, groups of 32": "IntxUnpackedToInt8Tensor",
    "bitsandbytes int8": "Int8Params",
    "bitsandbytes nf4": "Params4bit",
}


@pytest.fixture(scope="module")
def quantized():
    """recipe/quantized.py, which imports what only this environment has."""
    import recipe.quantized

    return recipe.quantized


@pytest.mark.parametrize("setting", CLASSES)
def test_gemmas_matrices_are_quantised_and_nothing_else(quantized, setting):
    model = quantized.load(setting)
    changed = {
        name
        for name, parameter in model.named_parameters()
        if type(parameter).__name__ == CLASSES[setting] or type(parameter.data).__name__ == CLASSES[setting]
    }
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.language_model.layers")
    }
    assert len(matrices) == 7 * model.config.text_config.num_hidden_layers
    assert changed == matrices


@pytest.mark.parametrize("setting", CLASSES)
def test_it_still_answers_right(quantized, setting):
    assert quantized.share_right(setting, held_out_cases(23))["share"] >= 0.93


def test_every_setting_is_in_the_published_table(quantized):
    assert list(RESULTS["scores"]) == list(quantized.SETTINGS) == ["float32", *CLASSES]
    assert RESULTS["questions"] >= 2000
    table = quantized.table(RESULTS["scores"])
    assert table == (ROOT / "results" / "quantized.md").read_text().strip()
    assert table in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("word", ["Int8WeightOnlyConfig", "BitsAndBytesConfig"])
def test_the_readmes_snippets_load_what_answers(word, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    namespace = {}
    exec(snippet("Int8WeightOnlyConfig"), namespace)
    if word == "BitsAndBytesConfig":
        exec(snippet(word), namespace)
    model = namespace["model"]
    exec(snippet("pipe = "), namespace)
    namespace["pipe"].model = model
    exec(snippet("pipe = ").splitlines()[-1], namespace)
    assert capsys.readouterr().out.split() == [promised(snippet("pipe = "))] * 2
