"""Tests quantized loading (`make test-quantized`): only Gemma's layers lose bits, and the answers stay right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.helpers import ROOT
from tests.helpers.docs import read, snippet
from tests.helpers.fresh import run_fresh
from theworld import TheWorldForConditionalGeneration
from theworld.evaluation.held_out import held_out_cases


RESULTS = json.loads((ROOT / "results" / "quantized.json").read_text())

with_libraries = pytest.mark.quantized

# What each setting of recipe/quantized.py makes of a matrix.
CLASSES = {
    "torchao int8": "Int8Tensor",
    "torchao int4, groups of 32": "IntxUnpackedToInt8Tensor",
    "bitsandbytes int8": "Int8Params",
    "bitsandbytes nf4": "Params4bit",
}


def of_gemmas_layers(model) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".language_model.layers." in f".{name}"
    }


@pytest.mark.parametrize("skipped", [None, ["lm_head"]])
@pytest.mark.parametrize("head", ["with a head", "without"])
def test_every_quantizer_leaves_all_but_gemmas_layers(head, skipped, convert_whole):
    """As the quantizers of transformers decide it, for AWQ, FP8 and others that no CPU runs too."""
    model = TheWorldForConditionalGeneration.from_pretrained(convert_whole("--projector-type", "mlp"))
    model = model if head == "with a head" else model.model
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in linear if should_convert_module(name, kept)} == of_gemmas_layers(model)


def test_float16_holds_every_part_in_float16(convert_whole):
    model = AutoModel.from_pretrained(convert_whole(), trust_remote_code=True, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


@pytest.fixture(scope="module")
def quantized():
    """recipe/quantized.py, whose imports exist only in this environment."""
    import recipe.quantized

    return recipe.quantized


@with_libraries
@pytest.mark.parametrize("setting", CLASSES)
def test_gemmas_layers_are_quantized_and_nothing_else(quantized, setting):
    model = quantized.load(setting)
    changed = {
        name
        for name, parameter in model.named_parameters()
        if type(parameter).__name__ == CLASSES[setting] or type(parameter.data).__name__ == CLASSES[setting]
    }
    matrices = {f"{name}.weight" for name in of_gemmas_layers(model)}
    assert len(matrices) == 7 * model.config.text_config.num_hidden_layers
    assert changed == matrices


@with_libraries
@pytest.mark.parametrize("setting", CLASSES)
def test_quantized_models_answer_right(quantized, setting):
    assert quantized.share_right(setting, held_out_cases(23))["share"] >= 0.93


@with_libraries
@pytest.mark.parametrize("setting", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_features_keep_their_bits(quantized, setting, dtype, convert_whole):
    folder = convert_whole("--latent-merge-size", "2", "--projector-type", "mlp")
    options = {"trust_remote_code": True, "dtype": dtype}
    whole = AutoModel.from_pretrained(folder, **options).eval()
    model = AutoModel.from_pretrained(folder, **options, quantization_config=quantized.SETTINGS[setting]()).eval()
    noise = torch.Generator().manual_seed(0)
    pixels, video = (torch.rand(1, *shape, generator=noise) * 2 - 1 for shape in ((3, 64, 64), (5, 3, 64, 64)))
    for method, values in (
        ("get_image_features", pixels),
        ("get_video_features", video),
        ("get_vision_features", pixels[..., :32, :32].to(dtype)),
    ):
        expected, got = (getattr(each, method)(values) for each in (whole, model))
        assert got.pooler_output.dtype == dtype and got.pooler_output.any()
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(got.pooler_output, expected.pooler_output)


@with_libraries
def test_a_projection_in_4_bits_still_sees():
    """Loaders never do this, but users can: weights are stored as integers and computed in floating point."""
    import bitsandbytes

    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
    pixels = torch.rand(1, 3, 128, 128) * 2 - 1
    expected = model.get_image_features(pixels).pooler_output
    for name, layer in list(model.model.world_projection.named_children()):
        if isinstance(layer, torch.nn.Linear):
            smaller = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
            smaller.load_state_dict(layer.state_dict())
            setattr(model.model.world_projection, name, smaller.to("cpu"))
    assert model.model.world_projection.linear_1.weight.dtype == torch.uint8
    got = model.get_image_features(pixels).pooler_output
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.9


SAVES = """
import sys, torch
sys.modules["theworld"] = None
from transformers import AutoModel
settings = {"quantization_config": torch.load(sys.argv[2], weights_only=False)}
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, **settings).save_pretrained(sys.argv[3])
"""
SCORES = """
import sys, torch
sys.modules["theworld"] = None
from transformers import AutoModel
settings = {"quantization_config": torch.load(sys.argv[2], weights_only=False)} if sys.argv[2] else {}
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, **settings).eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[3])).logits, sys.argv[4])
"""


@with_libraries
@pytest.mark.parametrize("setting", CLASSES)
def test_a_saved_quantized_model_reloads_with_equal_logits(quantized, setting, photo, tmp_path):
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    torch.save(dict(processor(text="<world>what is it?", images=photo, return_tensors="pt")), tmp_path / "inputs")
    torch.save(quantized.SETTINGS[setting](), tmp_path / "settings")
    run_fresh("-c", SAVES, ROOT, tmp_path / "settings", tmp_path / "saved", cache=tmp_path / "cache")
    for folder, settings, logits in ((ROOT, tmp_path / "settings", "before"), (tmp_path / "saved", "", "after")):
        run_fresh("-c", SCORES, folder, settings, tmp_path / "inputs", tmp_path / logits, cache=tmp_path / logits[:1])
    assert torch.equal(torch.load(tmp_path / "before"), torch.load(tmp_path / "after"))
    assert sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors")) < 6_000_000


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    from tests.helpers.training_runs import write_conversations
    from theworld.training.data import ConversationCollator, load_conversations

    collator = ConversationCollator(AutoProcessor.from_pretrained(ROOT, trust_remote_code=True))
    return load_conversations(str(write_conversations(tmp_path_factory.mktemp("dataset"))), "train", collator)


@with_libraries
@torch.no_grad()
def test_trl_trains_a_4_bit_model_that_sees(rows, convert, tmp_path):
    from peft import LoraConfig
    from trl import ModelConfig, SFTConfig, SFTTrainer, get_quantization_config

    folder = convert("gemma2", "--latent-merge-size", "2")
    settings = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="float32"))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, quantization_config=settings)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            tmp_path, max_steps=2, use_cpu=True, bf16=False, max_length=None, report_to="none", save_strategy="no"
        ),
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(folder, trust_remote_code=True),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    shown = []
    model.model.register_forward_hook(lambda module, _, output: shown.append(output.image_hidden_states))
    with torch.enable_grad():
        trainer.train()
    assert len(shown) == 2 and all(tokens.std() > 0.01 for tokens in shown)


@with_libraries
@pytest.mark.parametrize("bits", ["4", "8"])
def test_trls_own_command_line_trains_quantized(bits, rows, tmp_path):
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train-00000.parquet")
    options = {
        "model_name_or_path": ROOT,
        "trust_remote_code": "true",
        "dataset_name": tmp_path / "data",
        "assistant_only_loss": "true",
        "max_length": 8192,
        "output_dir": tmp_path / "run",
        f"load_in_{bits}bit": "true",
        "use_peft": "true",
        "lora_target_modules": "all-linear",
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([Path(sys.executable).parent / "trl", "sft", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] < 4


@with_libraries
def test_every_setting_is_in_the_published_table(quantized):
    assert list(RESULTS["scores"]) == list(quantized.SETTINGS) == ["float32", *CLASSES]
    assert RESULTS["questions"] >= 2000
    table = quantized.table(RESULTS["scores"])
    assert table == (ROOT / "results" / "quantized.md").read_text().strip()
    assert table in read("docs/quantization.md")


@with_libraries
@pytest.mark.parametrize("word", ["Int8WeightOnlyConfig", "BitsAndBytesConfig"])
def test_the_docs_snippets_load_models_that_answer(word, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    namespace = {}
    exec(snippet("docs/quantization.md", word).code, namespace)
    model, pipe = namespace["model"], snippet("docs/usage.md", "pipe = ")
    exec(pipe.code, namespace)
    namespace["pipe"].model = model
    exec(pipe.code.splitlines()[-1], namespace)
    assert capsys.readouterr().out.split() == pipe.promised * 2
