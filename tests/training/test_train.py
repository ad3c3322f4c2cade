"""Tests `theworld train`: trained parts, labels, contents of saves, precomputed latents, and rejected inputs."""

import json
import re
import resource
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, List
from datasets import Image as ImageFeature
from packaging import version
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from recipe.evaluate import SceneEvaluation
from tests.helpers import ROOT
from tests.helpers.docs import command
from tests.helpers.fresh import load_fresh, run_fresh
from tests.helpers.training_runs import losses_of, run_train, turn, write_conversations
from theworld import TheWorldForConditionalGeneration
from theworld.checkpoints import verify
from theworld.convert_weights import MODEL_FILES
from theworld.evaluation.scenes import draw_scene
from theworld.training import precompute_latents, train
from theworld.training.data import ConversationCollator, load_conversations
from theworld.training.latents import load_latents


BUNDLED = load_file(ROOT / "model.safetensors")
EXACT = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture
def model():
    return TheWorldForConditionalGeneration.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("dataset"))


def precompute(dataset: Path, output: Path, *options: str, model: Path = ROOT) -> int:
    arguments = ["--model", str(model), "--dataset", str(dataset), "--output-dir", str(output), "--dtype", "float32"]
    return precompute_latents.main([*arguments, "--rows-per-shard", "6", *options])


@pytest.fixture(scope="module")
def latents(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "train"
    assert precompute(dataset, folder) == 0
    return folder


def copy_of_the_bundled_model(folder: Path) -> Path:
    return shutil.copytree(ROOT, folder, ignore=lambda at, names: [n for n in names if (Path(at) / n).is_dir()])


@pytest.fixture
def rows() -> list[dict]:
    """Two images in two turns of three; one image; none."""
    one, other = (draw_scene(seed).image for seed in (1, 2))
    return [
        {
            "messages": [
                turn("user", one, "What shape is this?"),
                turn("assistant", "a star"),
                turn("user", "Sure?"),
                turn("assistant", "yes"),
                turn("user", "And this?", other),
                turn("assistant", "a circle"),
            ],
            "images": [one, other],
        },
        {
            "messages": [turn("system", "Be short."), turn("user", one, "Is it red?"), turn("assistant", "no")],
            "images": [one],
        },
        {"messages": [turn("user", "How many?"), turn("assistant", "three")], "images": []},
    ]


# What is trained on.


def test_only_what_the_assistant_says_is_trained_on(bundled_processor, rows):
    batch = ConversationCollator(bundled_processor)(rows)
    said = [bundled_processor.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert said == [
        "a star<end_of_turn>yes<end_of_turn>a circle<end_of_turn>",
        "no<end_of_turn>",
        "three<end_of_turn>",
    ]
    counted = batch["labels"] != -100
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
    assert (
        batch["pixel_values"].shape[0] == 3
        and (batch["input_ids"] == bundled_processor.image_token_id).sum() == 3 * 64
    )
    assert (batch["input_ids"] == 2).sum(-1).tolist() == [1, 1, 1]  # <bos>, once


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.18"), reason="TRL rejects it before transformers 5.18"
)
def test_trls_own_collator_makes_the_same_batch(bundled_processor, rows):
    theirs = DataCollatorForVisionLanguageModeling(bundled_processor, assistant_only_loss=True)(rows)
    ours = ConversationCollator(bundled_processor)(rows)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_latents_make_the_batch_of_their_pixels(bundled_processor, model, rows):
    pixels = ConversationCollator(bundled_processor)(rows)
    with torch.no_grad():
        encoded = model.get_world_latents(pixels.pop("pixel_values"))
    for row, of_row in zip(rows, encoded.split([2, 1, 0]), strict=True):
        row["world_latents"] = of_row
        del row["images"]
    batch = ConversationCollator(bundled_processor)(rows)
    assert torch.equal(batch.pop("world_latents"), encoded)
    assert batch.keys() == pixels.keys() and all(torch.equal(batch[name], pixels[name]) for name in batch)


def test_a_conversation_that_would_be_cut_is_rejected(bundled_processor, rows):
    longest = ConversationCollator(bundled_processor)(rows)["input_ids"].shape[1]
    ConversationCollator(bundled_processor, max_length=longest)(rows)
    with pytest.raises(
        ValueError, match=f"{longest} tokens, more than max_length={longest - 1}. Cutting it would lose"
    ):
        ConversationCollator(bundled_processor, max_length=longest - 1)(rows)


def test_a_conversation_longer_than_gemmas_context_is_rejected(dataset, tmp_path):
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    config = json.loads((ROOT / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tokens, more than max_length=32. Cutting it would lose"):
        run_train(model=tmp_path, dataset=dataset, output_dir=tmp_path / "run")


# Trained parts, and the contents of saves.

CHANGED = {
    "projection": {"world_projection", "embed_tokens"},
    "lora": {"world_projection", "embed_tokens", "layers"},
    "language": {"world_projection", "embed_tokens", "layers", "norm"},
    "all": {"world_projection", "embed_tokens", "layers", "norm", "world_encoder"},
}


def part_of(name: str) -> str:
    return next(
        part for part in ("world_encoder", "world_projection", "embed_tokens", "layers", "norm") if part in name
    )


@pytest.mark.parametrize("parts", CHANGED)
def test_a_run_changes_its_parts_only_and_reloads(parts, dataset, bundled_processor, tmp_path):
    trained = run_train(dataset=dataset, train=parts, output_dir=tmp_path / "run")
    folder = tmp_path / "run"
    inputs = bundled_processor(text="<world>What is it?", images=draw_scene(9).image, return_tensors="pt")
    with torch.no_grad():
        logits = trained.model.eval()(**inputs).logits
    # transformers 5.17 says that it misses parts of an adapter, and leaves them out.
    if parts in ("language", "all") or version.parse(transformers.__version__) >= version.parse("5.23"):
        torch.testing.assert_close(load_fresh(inputs, folder)[0], logits, atol=1e-4, rtol=1e-4)
    loaded = []
    assert verify.main([str(folder)]) == (parts in ("projection", "lora"))
    files = {path.name for path in folder.iterdir()}
    assert {"processor_config.json", "chat_template.jinja", "processing_theworld.py", "tokenizer.json"} <= files
    if parts in ("projection", "lora"):
        loaded.append(PeftModel.from_pretrained(TheWorldForConditionalGeneration.from_pretrained(ROOT), folder))
        size = (folder / "adapter_model.safetensors").stat().st_size
        assert size < (100e3 if parts == "projection" else 1e6)
        merged = trained.model.merge_and_unload()
        loaded.append(merged)
    else:
        merged = AutoModel.from_pretrained(folder, trust_remote_code=True)
        loaded.append(merged)
        assert files >= set(MODEL_FILES)
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == json.loads((ROOT / "config.json").read_text())["auto_map"]
        of_turns = bundled_processor.tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
        assert set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"]) == set(of_turns)
    for each in loaded:
        with torch.no_grad():
            torch.testing.assert_close(each.eval()(**inputs).logits, logits, atol=1e-4, rtol=1e-4)

    state = merged.state_dict()
    changed = {name for name, tensor in BUNDLED.items() if not torch.equal(state[name], tensor)}
    assert {part_of(name) for name in changed} == CHANGED[parts]
    embedding = "model.language_model.embed_tokens.weight"
    rows = (state[embedding] != BUNDLED[embedding]).any(-1).nonzero().flatten().tolist()
    if parts in ("projection", "lora"):
        assert rows == [6, 7]  # <start_of_world> and <end_of_world>
    else:
        assert len(rows) > 2


def test_an_adapter_loads_without_the_package(dataset, tmp_path):
    run_train(dataset=dataset, train="lora", output_dir=tmp_path / "run")
    code = """
import sys
sys.modules["theworld"] = None
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, type(processor).__name__, any("lora_A" in name for name, _ in model.named_parameters()))
"""
    out = run_fresh("-c", code, tmp_path / "run", cache=tmp_path / "cache")
    assert out.split() == ["TheWorldForConditionalGeneration", "TheWorldProcessor", "True"]


@pytest.mark.parametrize("parts", ["lora", "language"])
def test_a_resumed_run_has_the_same_losses(parts, dataset, bundled_processor, tmp_path):
    options = {"dataset": dataset, "train": parts, "max_steps": 4}
    whole = run_train(**options, output_dir=tmp_path / "whole", save_strategy="steps", save_steps=2)
    resumed = run_train(
        **options, output_dir=tmp_path / "resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2"
    )
    if parts == "language":
        assert verify.main([str(tmp_path / "whole" / "checkpoint-4")]) == 0
        inputs = bundled_processor(text="<world>What is it?", images=draw_scene(9).image, return_tensors="pt")
        with torch.no_grad():
            logits = whole.model.eval()(**inputs).logits
        assert torch.equal(load_fresh(inputs, tmp_path / "whole" / "checkpoint-4")[0], logits)
    history = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert losses_of(resumed.state.log_history) == losses_of(history)
    assert len(set(losses_of(history))) == 4


# Batches, memory, precision.


def test_accumulated_batches_give_the_losses_of_one_batch(dataset, tmp_path):
    losses = []
    for rows, steps in ((4, 1), (2, 2), (1, 4)):
        run = run_train(
            dataset=dataset,
            train="language",
            output_dir=tmp_path / f"{rows} rows",
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
        )
        losses.append(torch.tensor(losses_of(run.state.log_history)))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses[2], losses[0], atol=1e-4, rtol=1e-4)


def test_transformers_own_trainer_has_the_same_losses(dataset, bundled_processor, model, tmp_path):
    ours = run_train(dataset=dataset, train="all", output_dir=tmp_path, gradient_accumulation_steps=2)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
    )
    rows = load_conversations(str(dataset), "train", ConversationCollator(bundled_processor))
    theirs = transformers.Trainer(model, arguments, ConversationCollator(bundled_processor), train_dataset=rows)
    theirs.train()
    losses = (torch.tensor(losses_of(run.state.log_history)) for run in (ours, theirs))
    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)


def kept_for_backward(model, batch: dict) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a training step saves for its backward pass, and the gradients."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train().zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    return sum(kept.values()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("part", ["encoder", "Gemma"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(part, bundled_processor, model, rows):
    batch = ConversationCollator(bundled_processor)(rows)
    if part == "Gemma":
        model.model.world_encoder.requires_grad_(False)
    else:  # through the loss of the latents, so that Gemma's own memory is not counted
        batch = {"pixel_values": batch["pixel_values"]}
        model.forward = lambda pixel_values: type("Out", (), {"loss": model.get_world_latents(pixel_values).sum()})
    kept, gradients = kept_for_backward(model, batch)
    model.gradient_checkpointing_enable()
    kept_now, gradients_now = kept_for_backward(model, batch)
    assert kept_now < 0.6 * kept
    assert gradients.keys() == gradients_now.keys() and gradients
    for name in gradients:
        torch.testing.assert_close(gradients_now[name], gradients[name], msg=name, **EXACT)


def test_bfloat16_trains_an_adapter_in_float32(dataset, tmp_path):
    options = {"dataset": dataset, "train": "lora", "output_dir": tmp_path}
    exact = losses_of(run_train(**options).state.log_history)
    run = run_train(**options, dtype="bfloat16", bf16=True, overwrite=True)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    lora = [tensor for name, tensor in adapter.items() if "lora" in name]
    assert lora and all(tensor.dtype == torch.float32 for tensor in lora)
    assert run.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(*map(torch.tensor, (losses_of(run.state.log_history), exact)), atol=0.3, rtol=0.1)


def test_a_seed_reproduces_the_losses_of_an_adapter(latents, tmp_path):
    options = {"dataset": latents, "train": "lora", "max_steps": 2, "output_dir": tmp_path, "overwrite": True}
    one, same, other = (losses_of(run_train(**options, seed=seed).state.log_history) for seed in (1, 1, 2))
    assert one == same != other


def test_compiled_steps_have_the_same_losses(latents, tmp_path):
    options = {"dataset": latents, "train": "lora", "output_dir": tmp_path, "gradient_checkpointing": False}
    plain = losses_of(run_train(**options).state.log_history)
    compiled = run_train(**options, overwrite=True, torch_compile=True, torch_compile_backend="eager")
    torch.testing.assert_close(
        *map(torch.tensor, (losses_of(compiled.state.log_history), plain)), atol=1e-4, rtol=1e-4
    )


# Latents.


@pytest.mark.parametrize("parts", ["projection", "language"])
def test_training_on_latents_equals_training_on_pixels(parts, dataset, latents, bundled_processor, tmp_path):
    pixels = run_train(dataset=dataset, train=parts, output_dir=tmp_path / "pixels")
    run = run_train(dataset=latents, train=parts, output_dir=tmp_path / "latents")
    assert not any("world_encoder" in name for name, _ in run.model.named_parameters())
    torch.testing.assert_close(
        *map(torch.tensor, (losses_of(run.state.log_history), losses_of(pixels.state.log_history))), **EXACT
    )
    (file,) = (path.name for path in (tmp_path / "latents").glob("*.safetensors"))
    saved, expected = load_file(tmp_path / "latents" / file), load_file(tmp_path / "pixels" / file)
    assert saved.keys() == expected.keys()
    encoder = [name for name in saved if "world_encoder" in name]
    assert all(torch.equal(saved[name], BUNDLED[name]) for name in encoder)
    assert len(encoder) == (len([name for name in BUNDLED if "world_encoder" in name]) if parts == "language" else 0)
    if parts == "language":
        inputs = bundled_processor(text="<world>What is it?", images=draw_scene(9).image, return_tensors="pt")
        torch.testing.assert_close(*load_fresh(inputs, tmp_path / "latents", tmp_path / "pixels"), **EXACT)


def test_interrupted_precomputing_continues_after_its_last_shard(
    dataset, latents, bundled_processor, tmp_path, monkeypatch, capsys
):
    encode, calls = precompute_latents.encode, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("No space left on device")
        return encode(*arguments)

    monkeypatch.setattr(precompute_latents, "encode", interrupted)
    assert precompute(dataset, tmp_path / "cache") == 1
    assert "error: No space left on device" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lacks 2 of 3 shards: `theworld precompute-latents` was interrupted"):
        load_latents(tmp_path / "cache", str(ROOT), ConversationCollator(bundled_processor))
    assert precompute(dataset, tmp_path / "cache") == 0
    assert len(calls) == 4  # one shard, one that failed, and the two that were missing
    collator = ConversationCollator(bundled_processor)
    resumed, whole = (load_latents(folder, str(ROOT), collator) for folder in (tmp_path / "cache", latents))
    assert len(resumed) == len(whole) == 16
    for row in (0, 7, 15):
        again, before = (dataset[row]["world_latents"] for dataset in (resumed, whole))
        assert all(torch.equal(*pair) for pair in zip(again, before, strict=True)) and len(again) == 1
    assert precompute(dataset, tmp_path / "cache", "--rows-per-shard", "5") == 1
    assert "contains latents of another encoder, dataset or format" in capsys.readouterr().err


def test_latents_of_changed_rows_are_not_continued(tmp_path, capsys):
    file = written(tmp_path, {"messages": CONVERSATION, "images": ["a.png"]}, {"messages": PARTS, "images": ["a.png"]})
    assert precompute(file, tmp_path / "latents") == 0
    lines = file.read_text()
    file.write_text(lines.replace("a star", "a ring"))
    assert precompute(file, tmp_path / "latents") == 1
    file.write_text(lines)
    assert precompute(file, tmp_path / "latents") == 0
    draw_scene(1).image.save(tmp_path / "a.png")
    assert precompute(file, tmp_path / "latents") == 1
    assert capsys.readouterr().err.count("contains latents of another encoder, dataset or format") == 2


def test_latents_of_mixed_rows_make_the_same_batch(bundled_processor, tmp_path):
    """A shard of six rows without an image, and one whose placeholders are parts of the content."""
    text = {"messages": CONVERSATION, "images": []}
    two = [turn("user", PICTURE, "What is it?", PICTURE), turn("assistant", "a star")]
    file = written(
        tmp_path,
        *[text] * 6,
        {"messages": PARTS, "images": ["a.png"]},
        {"messages": two, "images": ["a.png"] * 2},
        text,
    )
    assert precompute(file, tmp_path / "latents") == 0
    collator = ConversationCollator(bundled_processor)
    pixels = load_conversations(str(file), "train", collator)
    latents = load_latents(tmp_path / "latents", str(ROOT), collator)
    for some in ([0], [5, 6], [0, 6, 7, 8]):
        of_pixels, of_latents = (collator([rows[number] for number in some]) for rows in (pixels, latents))
        assert torch.equal(of_pixels["input_ids"], of_latents["input_ids"])
        assert torch.equal(of_pixels["labels"], of_latents["labels"])
        assert len(of_pixels.get("pixel_values", ())) == len(of_latents.get("world_latents", ()))


def test_rows_of_latents_are_checked_before_training(dataset, latents, tmp_path):
    with pytest.raises(ValueError, match=r"Row 0 of the dataset cannot be trained on: A conversation has \d+ tokens"):
        run_train(dataset=latents, max_length=70, output_dir=tmp_path)


@pytest.mark.parametrize(
    "change", [{"size": {"shortest_edge": 1024, "longest_edge": 4096}}, {"do_resize": False}], ids=str
)
def test_latents_of_several_sizes_train_as_their_pixels(change, tmp_path):
    model = copy_of_the_bundled_model(tmp_path / "model")
    file = model / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"] |= change
    file.write_text(json.dumps(settings))
    for name, size in (("wide.png", (96, 40)), ("tall.png", (24, 64))):
        draw_scene(1).image.resize(size).save(tmp_path / name)
    two = [turn("user", PICTURE, "What is it?", PICTURE), turn("assistant", "a star")]
    rows = written(
        tmp_path,
        {"messages": two, "images": ["wide.png", "tall.png"]},
        {"messages": CONVERSATION, "images": []},
        {"messages": PARTS, "images": ["a.png"]},
        {"messages": PARTS, "images": ["wide.png"]},
    )
    assert precompute(rows, tmp_path / "latents", model=model) == 0
    options = {"model": model, "max_steps": 2, "per_device_train_batch_size": 4}
    pixels, latents = (
        run_train(dataset=dataset, output_dir=tmp_path / f"from-{dataset.name}", **options)
        for dataset in (rows, tmp_path / "latents")
    )
    losses = (torch.tensor(losses_of(run.state.log_history)) for run in (latents, pixels))
    torch.testing.assert_close(*losses, **EXACT)
    with pytest.raises(ValueError, match="were made with another encoder, image size or normalization"):
        run_train(dataset=tmp_path / "latents", output_dir=tmp_path / "other")


@pytest.mark.parametrize("change", ["weights", "size", "normalization"])
def test_latents_of_another_encoder_are_rejected(change, latents, tmp_path):
    other = copy_of_the_bundled_model(tmp_path / "other")
    if change == "weights":
        name = "model.world_encoder.quant_conv.bias"
        save_file({**BUNDLED, name: BUNDLED[name] + 1e-3}, other / "model.safetensors", metadata={"format": "pt"})
    else:
        file = other / {"size": "processor_config.json", "normalization": "config.json"}[change]
        fields = json.loads(file.read_text())
        if change == "size":
            fields["image_processor"]["size"]["height"] = 128
        else:
            fields["normalize_latents"] = False
        file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="were made with another encoder, image size or normalization"):
        run_train(dataset=latents, model=other, output_dir=tmp_path / "run")


def test_options_that_latents_cannot_serve_are_rejected(latents, tmp_path):
    with pytest.raises(ValueError, match="--train all trains the encoder, which needs images, not latents"):
        run_train(dataset=latents, train="all", output_dir=tmp_path)
    with pytest.raises(ValueError, match="contains the latents of one split"):
        run_train(dataset=latents, eval_split="validation", eval_strategy="steps", eval_steps=1, output_dir=tmp_path)
    with pytest.raises(ValueError, match="contains the latents of split 'train', got --split test"):
        run_train(dataset=latents, split="test", output_dir=tmp_path)


# Rejected inputs, and interrupted runs.


def test_an_earlier_run_is_replaced_with_overwrite_only(dataset, bundled_processor, tmp_path):
    options = {"dataset": dataset, "output_dir": tmp_path / "run"}
    run_train(**options, train="language", max_steps=1, save_strategy="steps", save_steps=1)
    before = (tmp_path / "run" / "SHA256SUMS").read_text()
    for parts in ("projection", "language"):
        with pytest.raises(FileExistsError, match="run contains checkpoint-1, config.json of an earlier run. Ch"):
            run_train(**{**options, "dataset": "none"}, train=parts)
    with pytest.raises(ValueError, match="--output-dir is .*run, the --model that the run starts from"):
        run_train(**options, model=tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "SHA256SUMS").read_text() == before
    run = run_train(**options, train="projection", max_steps=1, overwrite=True)
    assert not (tmp_path / "run" / "config.json").exists() and (tmp_path / "run" / "adapter_config.json").is_file()
    assert (tmp_path / "run" / "checkpoint-1" / "config.json").is_file()
    if version.parse(transformers.__version__) >= version.parse("5.23"):
        inputs = bundled_processor(text="<world>What is it?", images=draw_scene(9).image, return_tensors="pt")
        with torch.no_grad():
            logits = run.model.eval()(**inputs).logits
        torch.testing.assert_close(load_fresh(inputs, tmp_path / "run")[0], logits, **EXACT)


def test_resuming_uses_the_newest_or_the_named_checkpoint(dataset, tmp_path):
    options = {"dataset": dataset, "output_dir": tmp_path / "run", "train": "projection"}
    for which, where in ((True, "in .*run"), (tmp_path / "none", "at .*none"), ("yes", "at yes")):
        with pytest.raises(ValueError, match=f"takes a folder `checkpoint-N` .* or `true` .* There is none {where}"):
            run_train(**options, resume_from_checkpoint=which)
    run_train(**options, save_strategy="steps", save_steps=1, resume_from_checkpoint=False)
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    resumed = run_train(**options, resume_from_checkpoint=True)
    assert resumed.args.resume_from_checkpoint.endswith("checkpoint-2") and resumed.state.global_step == 3


def test_a_checkpoint_that_cannot_be_resumed_is_rejected(dataset, tmp_path):
    options = {"dataset": "none", "output_dir": tmp_path, "resume_from_checkpoint": True}
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint-1 has no optimizer state .* with it as --model"):
        run_train(**options)
    (checkpoint / "optimizer.pt").touch()
    with pytest.raises(ValueError, match="is a whole model, but --train lora trains an adapter. Resume with"):
        run_train(**options, train="lora")
    (checkpoint / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="is an adapter, but --train all trains a whole model. Resume with"):
        run_train(**options, train="all")


def written(folder: Path, *rows: dict) -> Path:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    return file


CONVERSATION = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a star"}]
PICTURE = Image.new("RGB", (8, 8))
PARTS = [turn("user", PICTURE, "What is it?"), turn("assistant", "a star")]


def asked(*content: str | dict, answer: str = "a star", **fields) -> list[dict]:
    """A question and its answer; fields of the answer's message."""
    question = content[0] if isinstance(content[0], str) else list(content)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversation": CONVERSATION, "images": ["a.png"]}, "columns conversation, images, but no messages. A row"),
        ({"messages": CONVERSATION, "picture": "a.png"}, "but no images. A row needs `messages`"),
        (
            {"messages": CONVERSATION, "images": [], "videos": ["a.mp4"]},
            "Row 0 of the dataset has `videos`, but",
        ),
        ({"messages": CONVERSATION, "images": [], "video": "a.mp4"}, "Row 0 of the dataset has `video`, but training"),
        ({"messages": CONVERSATION, "images": [], "image": "a.png"}, "Row 0 of the dataset has `image`, but training"),
        ({"messages": CONVERSATION, "images": [], "tools": [{"name": "f"}]}, "Row 0 of the dataset has `tools`, but"),
    ],
    ids=["column", "picture column", "videos", "a video", "an image", "tools"],
)
def test_unread_columns_are_rejected(row, message, bundled_processor, tmp_path, capsys):
    file = written(tmp_path, row)
    with pytest.raises(ValueError, match=message):
        load_conversations(str(file), "train", ConversationCollator(bundled_processor))
    assert precompute(file, tmp_path / "latents") == 1
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "latents").exists()


BAD_ROWS = {
    "no answer": (CONVERSATION[:1], ["a.png"], r"ends without an answer: the last of its 1 message\(s\)"),
    "no message": ([], [], "ends without an answer: the last of its 0"),
    "null messages": (None, [], "`messages` must be a list of {role, content}, got None"),
    "two questions": (CONVERSATION[:1] + CONVERSATION, [], "Turns must alternate user, assistant"),
    "two answers": (CONVERSATION + CONVERSATION[1:], [], "Turns must alternate user, assistant"),
    "a tool": (
        [*CONVERSATION, {"role": "tool", "content": "3"}, CONVERSATION[1]],
        [],
        "Turns must alternate user, assistant, .* got 'tool'",
    ),
    "LLaVA's roles": (
        [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}],
        [],
        "Invalid role .* human",
    ),
    "LLaVA's keys": (
        [{"from": "human", "value": "a"}],
        [],
        "Message 1 must have `role` and `content`, got from, value",
    ),
    "LLaVA's placeholder": (asked("<image>\nWhat is it?"), ["a.png"], "text of message 1 contains '<image>'"),
    "LLaVA's placeholder, no image": (asked("What is it?\n<image>"), [], "text of message 1 contains '<image>'"),
    "a placeholder in a sentence": (asked("What is <image> here?"), ["a.png"], "text of message 1 contains '<image>'"),
    "LLaVA's video": (asked("<video>\nWhat is it?"), [], "text of message 1 contains '<video>'"),
    "a typed placeholder": (asked("<world>What is it?"), ["a.png"], "holds <world>, which stands for an image"),
    "a typed end of a turn": (asked("a", answer="b<end_of_turn>"), [], "text of message 2 contains '<end_of_turn>'"),
    "a typed beginning": (asked("<bos>a"), [], "text of message 1 contains '<bos>'"),
    "a video": (asked({"type": "video"}, {"type": "text", "text": "a"}), [], "A part of message 1 must be .*'video'"),
    "an image in its part": (
        asked({"type": "image", "path": "a.png"}, {"type": "text", "text": "a"}),
        ["a.png"],
        "A part of message 1 must be .* with the image in `images`, got .*a.png",
    ),
    "images out of order": (
        asked({"type": "image", "index": 1}, {"type": "image", "index": 0}),
        ["a.png", "a.png"],
        "Image placeholder 0 has another `index`",
    ),
    "no placeholder": (
        asked({"type": "text", "text": "a"}),
        ["a.png"],
        r"images provided \(1\) does not match .* \(0\)",
    ),
    "no image": (PARTS, [], r"images provided \(0\) does not match number of image placeholders \(1\)"),
    "a number as content": (
        [{"role": "user", "content": 3}, CONVERSATION[1]],
        [],
        "content of message 1 must be text or a list of parts, got 3",
    ),
    "no text": (asked({"type": "text"}), [], "A part of message 1 must be"),
    "an empty answer": (asked("a", answer=" \n"), [], "Message 2, of the assistant, is empty"),
    "an empty question": (asked(" "), [], "Message 1, of the user, is empty"),
    "tool calls": (asked("a", answer=None, tool_calls=[{"name": "f"}]), [], "got role, tool_calls"),
    "a weight": (asked("a", weight=0), [], "Message 2 must have `role` and `content`, got role, content, weight"),
    "null images": (CONVERSATION, None, r"`images` must be a list of images, got None. A row without images has \[\]"),
    "a null image": (CONVERSATION, ["a.png", None], "An image must be a path, got None"),
    "an image elsewhere": (CONVERSATION, ["../a.png"], "is outside the dataset's folder"),
    "a missing image": (CONVERSATION, ["b.png"], "The image .*b.png does not exist. Image paths are relative"),
    "a text file as image": (
        CONVERSATION,
        ["train.jsonl"],
        "train.jsonl cannot be decoded: its format is unknown",
    ),
    "half an image": (CONVERSATION, ["half.png"], "The image .*half.png cannot be decoded: .*truncated"),
    "a long one": (asked("a" * 200), ["a.png"], r"has \d+ tokens, more than max_length=150"),
    "an image too many": (CONVERSATION, ["a.png"] * 2, r"has \d+ tokens, more than max_length=150"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_rejected_by_its_number(name, bundled_processor, tmp_path):
    messages, images, message = BAD_ROWS[name]
    good = [{"messages": CONVERSATION, "images": ["a.png"]}, {"messages": PARTS, "images": ["a.png"]}]
    file = written(tmp_path, *good, {"messages": messages, "images": images})
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"(?s)Row 2 of the dataset cannot be trained on: .*{message}"):
        load_conversations(str(file), "train", ConversationCollator(bundled_processor, max_length=150))


def test_a_bad_row_is_rejected_before_loading_the_model(bundled_processor, tmp_path, monkeypatch, capsys):
    file = written(tmp_path, {"messages": CONVERSATION, "images": ["a.png"]}, {"messages": [], "images": []})
    for script in (train, precompute_latents):
        monkeypatch.setattr(script, "AutoModel", None)
    with pytest.raises(ValueError, match="Row 1 of the dataset cannot be trained on"):
        run_train(dataset=file, output_dir=tmp_path / "run")
    assert precompute(file, tmp_path / "latents") == 1
    assert "error: Row 1 of the dataset cannot be trained on" in capsys.readouterr().err


def test_a_damaged_image_in_a_parquet_file_is_rejected(bundled_processor, tmp_path):
    whole = BytesIO()
    draw_scene(1).image.save(whole, "PNG")
    for content, message in (
        (b"no image", "in this row cannot be decoded: its format"),
        (whole.getvalue()[:-30], "truncated"),
    ):
        rows = Dataset.from_dict({"messages": [CONVERSATION] * 2, "images": [[], [{"bytes": content, "path": None}]]})
        rows.cast_column("images", List(ImageFeature())).to_parquet(tmp_path / "train-00000.parquet")
        with pytest.raises(ValueError, match=f"Row 1 of the dataset cannot be trained on: .*{message}"):
            load_conversations(str(tmp_path), "train", ConversationCollator(bundled_processor))


def test_the_longest_conversation_that_passes_fits_its_batch(bundled_processor, rows):
    """The tokens counted before training are those of the batch."""
    for row in rows:
        length = ConversationCollator(bundled_processor)([row])["input_ids"].shape[1]
        sizes = [image.size[::-1] for image in row["images"]]
        ConversationCollator(bundled_processor, max_length=length).check(row["messages"], sizes)
        with pytest.raises(ValueError, match=f"{length} tokens, more than max_length={length - 1}"):
            ConversationCollator(bundled_processor, max_length=length - 1).check(row["messages"], sizes)


def test_other_forms_of_a_conversation_make_equal_batches(bundled_processor):
    image = draw_scene(1).image
    plain = {"messages": CONVERSATION, "images": [image]}
    nulls = [
        {"type": "image", "text": None, "index": 0},
        {"type": "text", "text": "What is it?", "index": None},
    ]
    others = [
        {"messages": PARTS, "images": [image]},
        {"messages": asked(*nulls, name=None), "images": [image]},  # as Parquet files have them
        {"messages": [PARTS[0], CONVERSATION[1]], "images": [image]},
    ]
    collator = ConversationCollator(bundled_processor)
    expected = collator([plain])
    for row in others:
        batch = collator([row])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_later_question_as_text_gets_no_image(bundled_processor):
    batch = ConversationCollator(bundled_processor)([{"messages": PARTS + CONVERSATION, "images": [PICTURE]}])
    prompt = bundled_processor.decode(batch["input_ids"][0])
    assert prompt.index("<world>") < prompt.index("What is it?") and prompt.count("<start_of_world>") == 1


@pytest.mark.parametrize("form", ["file", "folder"])
def test_answers_that_are_json_stay_text(form, bundled_processor, tmp_path):
    answers = ["3", "3.10", "null", "true", '"a"', "[1]", '{"a": 1}', "three"]
    rows = [{"messages": asked({"type": "text", "text": "a"}, answer=answer), "images": []} for answer in answers]
    source = written(tmp_path, *rows) if form == "file" else written(tmp_path, *rows).parent
    loaded = load_conversations(str(source), "train", ConversationCollator(bundled_processor))
    assert [row["messages"][1]["content"] for row in loaded] == answers


def test_image_tags_of_other_formats_are_plain_text(bundled_processor, tmp_path):
    told = asked("How does <video> differ from <image> in HTML?", answer="<image> is no tag.")
    file = written(tmp_path, {"messages": told, "images": [], "videos": [], "tools": None, "image": ""})
    assert len(load_conversations(str(file), "train", ConversationCollator(bundled_processor))) == 1


def test_a_column_that_is_not_read_is_named(bundled_processor, tmp_path):
    file = written(tmp_path, {"messages": CONVERSATION, "images": [], "source": "here", "id": 3})
    with pytest.warns(UserWarning, match=r"Training does not read the column\(s\) id, source of"):
        load_conversations(str(file), "train", ConversationCollator(bundled_processor))


def test_folders_and_parquet_load_too(dataset, bundled_processor, tmp_path):
    collator = ConversationCollator(bundled_processor)
    rows = load_conversations(str(dataset), "train", collator)
    from_folder = load_conversations(str(dataset.parent), "train", collator)
    rows.to_parquet(tmp_path / "train-00000.parquet")
    from_parquet = load_conversations(str(tmp_path), "train", collator)
    for each in (from_folder, from_parquet):
        assert each[3]["messages"] == rows[3]["messages"] and len(each) == len(rows)
        assert each[3]["images"][0].tobytes() == rows[3]["images"][0].tobytes()


# Splits and options.


def test_parts_of_a_file_train_and_evaluate_apart(dataset, bundled_processor, tmp_path):
    options = {"split": "train[:75%]", "eval_split": "train[75%:]", "eval_strategy": "steps", "eval_steps": 1}
    run = run_train(dataset=dataset, output_dir=tmp_path, max_steps=1, **options)
    whole = load_conversations(str(dataset), "train", ConversationCollator(bundled_processor))["messages"][:]
    assert run.train_dataset["messages"][:] == whole[:12] and run.eval_dataset["messages"][:] == whole[12:]


EVALUATE = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"eval_split": "validation", **EVALUATE},
            "is one file, whose only split is 'train', got 'validation'",
        ),
        ({"split": "test"}, "is one file, whose only split is 'train', got 'test'"),
        ({"eval_split": "train", **EVALUATE}, "--eval-split train contains rows of --split train"),
        ({"eval_split": "train[8:]", **EVALUATE}, r"--eval-split train\[8:\] contains rows of --split train"),
        ({"eval_split": "train[8:]", "split": "train[:8]"}, "is never evaluated without --eval_strategy"),
        (EVALUATE, "need --eval-split, the split to evaluate on"),
        ({"eval_on_start": True}, "need --eval-split, the split to evaluate on"),
        ({"lora_rank": 4, "train": "language"}, "--lora-rank is for --train lora, got --train language"),
    ],
    ids=repr,
)
def test_a_split_or_option_without_effect_is_rejected(options, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_train(dataset=dataset, output_dir=tmp_path, **options)


GIVEN = {"chat_template_path": "chat_template.jinja", "dataset_kwargs": "{}", "model_init_kwargs": "{}"}
GIVEN |= {"dataset_num_proc": 2, "pad_to_multiple_of": 8, "pad_token": "<pad>", "dataset_text_field": "messages"}


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated")
@pytest.mark.parametrize("name", train.WITHOUT_EFFECT)
def test_an_option_that_the_collator_ignores_is_rejected(name, dataset, tmp_path):
    with pytest.raises(ValueError, match=f"--{name} would have no effect: the loss is that of the assistant's"):
        given = GIVEN.get(name, not train.WITHOUT_EFFECT[name])
        run_train(dataset=dataset, output_dir=tmp_path, **{name: given})


def test_the_evaluation_split_and_scenes_are_evaluated(dataset, bundled_processor, tmp_path):
    folder = tmp_path / "data"
    rows = load_conversations(str(dataset), "train", ConversationCollator(bundled_processor))
    folder.mkdir()
    rows.to_parquet(folder / "train-00000.parquet")
    rows.select(range(4)).to_parquet(folder / "validation-00000.parquet")
    options = {"eval_split": "validation", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    run = run_train([SceneEvaluation(per_kind=5)], dataset=folder, output_dir=tmp_path / "run", **options)
    logged = {name: value for entry in run.state.log_history for name, value in entry.items() if "eval" in name}
    assert logged["eval_loss"] > 0 and 0.8 < logged["eval_scenes"] <= 1


@pytest.mark.parametrize("of", [transformers.Trainer, SFTTrainer], ids=["transformers", "TRL"])
def test_metrics_include_batches_without_images(of, bundled_processor, model, rows, tmp_path):
    options = {
        "per_device_eval_batch_size": 1,
        "use_cpu": True,
        "report_to": "none",
        "bf16": False,
        "disable_tqdm": True,
    }
    if of is SFTTrainer:
        arguments = SFTConfig(tmp_path, dataset_kwargs={"skip_prepare_dataset": True}, **options)
    else:
        arguments = TrainingArguments(tmp_path, **options)
    arguments.remove_unused_columns = False
    collator, dataset = ConversationCollator(bundled_processor), Dataset.from_list(rows)
    seen = []

    def metrics(prediction) -> dict:
        seen.append(prediction)
        return {"answers": int((prediction.label_ids != -100).sum())}

    trainer = of(
        model,
        arguments,
        collator,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=bundled_processor,
        compute_metrics=metrics,
    )
    measured = trainer.evaluate()
    assert measured["eval_answers"] == (collator(rows)["labels"] != -100).sum()
    if of is transformers.Trainer:
        with torch.no_grad():
            alone = model(**collator(rows[2:])).logits.numpy()
        assert seen[0].predictions.shape[::2] == (3, model.config.text_config.vocab_size)
        assert seen[0].predictions[2, : alone.shape[1]] == pytest.approx(alone[0], abs=1e-4)


class FillDisk(TrainerCallback):
    """After the first checkpoint no file can grow beyond 50 kB, as on a disk that is nearly full."""

    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_last_good_checkpoint(dataset, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"dataset": dataset, "train": "lora", "output_dir": tmp_path, "save_strategy": "steps", "save_steps": 1}
    try:
        with pytest.raises(OSError, match="checkpoint-2 could not be written .* there is checkpoint-1"):
            run_train([FillDisk()], **options, save_total_limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = run_train(**{**options, "save_strategy": "no"}, resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert resumed.state.global_step == 3


# Without any of our scripts.


def test_trls_collator_trains_on_completions_alone(bundled_processor, rows):
    row = {"prompt": rows[1]["messages"][:-1], "completion": rows[1]["messages"][-1:], "images": rows[1]["images"]}
    (labels,) = DataCollatorForVisionLanguageModeling(bundled_processor, completion_only_loss=True)([row])["labels"]
    assert bundled_processor.decode(labels[labels != -100]) == "no<end_of_turn>\n"


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_trls_own_command_line_trains_the_bundled_model(form, dataset, bundled_processor, tmp_path):
    """On transformers 5.17 TRL masks prompts of the second form alone."""
    rows = load_conversations(str(dataset), "train", ConversationCollator(bundled_processor))
    columns = {"images": rows["images"]}
    if form == "messages":
        if version.parse(transformers.__version__) < version.parse("5.18"):
            pytest.skip("TRL masks the prompts of `messages` with images from transformers 5.18 on")
        columns["messages"] = rows["messages"]
    else:
        columns |= {"prompt": [m[:-1] for m in rows["messages"]], "completion": [m[-1:] for m in rows["messages"]]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns, features=None).cast_column("images", rows.features["images"]).to_parquet(
        tmp_path / "data" / "train-00000.parquet"
    )
    (tmp_path / "my-theworld").symlink_to(ROOT)
    program, *words = command("docs/finetuning.md", "trl sft").split()
    if form == "prompt and completion":
        words[words.index("--assistant_only_loss")] = "--completion_only_loss"
    few = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 3,
    }
    few |= {"use_cpu": "true", "report_to": "none", "bf16": "false"}
    words += [word for name, value in few.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [Path(sys.executable).parent / program, *words], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / "tuned" / "checkpoint-3" / "trainer_state.json").read_text())
    losses = losses_of(state["log_history"])
    assert len(losses) == 3 and losses[-1] < losses[0]
    if form == "messages":
        ours = run_train(dataset=dataset, train="all", output_dir=tmp_path / "ours")
        assert losses == pytest.approx(losses_of(ours.state.log_history), abs=1e-2)
    load_fresh(bundled_processor(text="How many?", return_tensors="pt"), tmp_path / "tuned")
