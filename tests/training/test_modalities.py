"""Tests `theworld train --modalities`: what is trained and labeled with world tokens, Gemma 3's tower, or both."""

import json

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.helpers.fresh import load_fresh
from tests.helpers.training_runs import losses_of, run_train, turn, write_conversations
from theworld import TheWorldForConditionalGeneration
from theworld.checkpoints.merge import merge
from theworld.evaluation.scenes import draw_scene
from theworld.training.data import ConversationCollator
from theworld.training.precompute_latents import main as precompute


PROJECTION = "--train projection trains what makes world tokens, which --modalities vision does not use"
SWITCHES = {"world,vision": (True, True), "world": (True, False), "vision": (False, True)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("dataset") / "scenes", 8)


@pytest.fixture
def checkpoint(convert_whole):
    return convert_whole()


def encode(checkpoint, dataset, folder) -> None:
    arguments = ["--model", checkpoint, "--dataset", dataset, "--output-dir", folder, "--dtype", "float32"]
    assert precompute([str(word) for word in arguments]) == 0


def rows() -> list[dict]:
    """Two images in two turns of three; none."""
    one, other = (draw_scene(seed).image for seed in (1, 2))
    conversation = [
        turn("user", one, "What is it?"),
        turn("assistant", "a star"),
        turn("user", "Sure?"),
        turn("assistant", "yes"),
        turn("user", "And this?", other),
        turn("assistant", "a circle"),
    ]
    text = [turn("user", "How many?"), turn("assistant", "three")]
    return [{"messages": conversation, "images": [one, other]}, {"messages": text, "images": []}]


@pytest.mark.parametrize("modalities", SWITCHES)
@pytest.mark.parametrize("options", [(), ("--vision-first",)], ids=["world first", "vision first"])
def test_only_answers_are_labeled_with_each_modality(convert_whole, modalities, options):
    processor = AutoProcessor.from_pretrained(convert_whole(*options), trust_remote_code=True)
    processor.world, processor.vision = SWITCHES[modalities]
    batch = ConversationCollator(processor)(rows())
    said = [processor.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert said == ["a star<end_of_turn>yes<end_of_turn>a circle<end_of_turn>", "three<end_of_turn>"]
    counted = batch["labels"] != -100
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
    assert ("pixel_values" in batch, "vision_pixel_values" in batch) == SWITCHES[modalities]


@pytest.mark.parametrize("modalities", SWITCHES)
def test_rows_are_measured_exactly_before_training(processor, modalities):
    processor.world, processor.vision = SWITCHES[modalities]
    (row, _) = rows()
    length = ConversationCollator(processor)([row])["input_ids"].shape[1]
    sizes = [(image.height, image.width) for image in row["images"]]
    ConversationCollator(processor, length).check(row["messages"], sizes)
    with pytest.raises(ValueError, match=f"A conversation has {length} tokens"):
        ConversationCollator(processor, length - 1).check(row["messages"], sizes)


def parts_that_changed(before: dict, after: dict) -> set[str]:
    others = ("vision_tower", "multi_modal_projector", "world_encoder", "world_projection")
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    return {next((part for part in others if part in name), "language_model") for name in changed}


CHANGED = {
    "projection": {"world_projection", "language_model"},  # the embeddings of the start and end tokens
    "lora": {"world_projection", "language_model"},
    "language": {"world_projection", "language_model"},
    "all": {"world_projection", "language_model", "world_encoder"},
}


@pytest.mark.parametrize(
    ("train", "modalities"),
    [(train, modalities) for train in CHANGED for modalities in SWITCHES if "world" in modalities]
    + [("lora", "vision"), ("language", "vision")],
)
def test_every_stage_trains_its_parts_with_each_modality(checkpoint, dataset, tmp_path, train, modalities):
    run = tmp_path / "run"
    options = {"max_steps": 2, "train": train, "modalities": modalities}
    trainer = run_train(model=checkpoint, dataset=dataset, output_dir=run, **options)
    assert all(loss > 0 for loss in losses_of(trainer.state.log_history))
    settings = json.loads((run / "processor_config.json").read_text())
    assert (settings["world"], settings["vision"]) == SWITCHES[modalities]

    if train in ("projection", "lora"):
        merge(str(run), tmp_path / "merged", str(checkpoint))
        run = tmp_path / "merged"
    before = TheWorldForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    trained = TheWorldForConditionalGeneration.from_pretrained(run).eval()
    expected = CHANGED[train] if "world" in modalities else {"language_model"}
    assert parts_that_changed(before, trained.state_dict()) == expected

    processor = AutoProcessor.from_pretrained(run, trust_remote_code=True)
    assert (processor.world, processor.vision) == SWITCHES[modalities]
    inputs = processor(text="<world>What is it?", images=draw_scene(9).image, return_tensors="pt")
    with torch.no_grad():
        logits = trained(**inputs).logits
    if train in ("lora", "language") and modalities != "world":  # a process of its own takes seconds
        torch.testing.assert_close(load_fresh(inputs, run)[0], logits, atol=1e-4, rtol=1e-4)


def test_latents_train_the_world_of_a_checkpoint_with_a_tower(checkpoint, dataset, tmp_path):
    encode(checkpoint, dataset, tmp_path / "latents")
    options = {"model": checkpoint, "max_steps": 2, "train": "language", "modalities": "world"}
    pixels, latents = (
        run_train(dataset=source, output_dir=tmp_path / name, **options)
        for name, source in (("of pixels", dataset), ("of latents", tmp_path / "latents"))
    )
    expected = losses_of(pixels.state.log_history)
    assert losses_of(latents.state.log_history) == pytest.approx(expected, abs=1e-4)


def test_an_adapter_of_vision_leaves_the_projection(checkpoint, dataset, tmp_path):
    run_train(model=checkpoint, dataset=dataset, output_dir=tmp_path, max_steps=1, train="lora", modalities="vision")
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(checkpoint, trust_remote_code=True), tmp_path)
    trained = {name for name in adapted.state_dict() if "lora_" in name or "modules_to_save" in name}
    assert trained and all(".language_model.layers." in name for name in trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": "world,ears"}, "--modalities world,ears is not in this checkpoint, which has world, vision"),
        ({"modalities": "vision"}, PROJECTION),
        ({"modalities": "vision", "train": "all"}, "--train all trains what makes world tokens"),
    ],
)
def test_modalities_that_cannot_be_trained_are_rejected(checkpoint, dataset, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_train(model=checkpoint, dataset=dataset, output_dir=tmp_path, **options)


def test_a_checkpoint_without_a_tower_rejects_vision(dataset, tmp_path):
    with pytest.raises(ValueError, match="--modalities world,vision is not in this checkpoint, which has world"):
        run_train(dataset=dataset, output_dir=tmp_path, modalities="world,vision")


def test_latents_are_rejected_for_the_tower(checkpoint, dataset, tmp_path):
    encode(checkpoint, dataset, tmp_path / "latents")
    with pytest.raises(ValueError, match="contains latents, which Gemma 3's tower does not read"):
        run_train(model=checkpoint, dataset=tmp_path / "latents", output_dir=tmp_path / "run")


def test_an_image_in_an_answer_is_rejected_for_the_tower(processor):
    answer = {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "this"}]}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}, answer]
    with pytest.raises(ValueError, match="Message 2 is the assistant's and has an image"):
        ConversationCollator(processor).check(messages, [(64, 64)])
    processor.vision = False
    ConversationCollator(processor).check(messages, [(64, 64)])
    batch = ConversationCollator(processor)([{"messages": messages, "images": [Image.new("RGB", (64, 64))]}])
    assert processor.decode(batch["labels"][0][batch["labels"][0] != -100]).strip() == "this<end_of_turn>"
