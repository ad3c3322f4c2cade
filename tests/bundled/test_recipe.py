"""Tests the recipe: what a training row shows and asks, how a run resumes, and every stage in a few steps."""

from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recipe import sequences, trainer, video
from recipe.pipeline import Length, train_all
from recipe.sequences import IGNORE_INDEX, AnswerLoss, RowMaker
from recipe.vae import pixels_of
from tests.helpers.generation import chat
from theworld import TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.evaluation.clips import make_clip
from theworld.evaluation.scenes import COLOURS, SHAPES, SPLITS, draw_scene


SHORT = Length(vae=2, gemma=2, scenes=100, align=3, fine_tune=2, motion=2, clips=40, watch=6)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Every stage, a few steps each."""
    folder = tmp_path_factory.mktemp("recipe")
    train_all(folder, SHORT)
    return folder


@pytest.fixture(scope="module")
def processor(recipe):
    return TheWorldProcessor.from_pretrained(recipe / "theworld")


@pytest.fixture(scope="module")
def model(recipe):
    return TheWorldForConditionalGeneration.from_pretrained(recipe / "theworld").eval()


@pytest.fixture(scope="module")
def rows(processor):
    return RowMaker(processor.tokenizer, num_world_tokens=64)


@pytest.mark.parametrize("kind", ["alone", "conversation"])
def test_a_row_gives_the_logits_of_a_users_prompt(kind, rows, model, processor, monkeypatch):
    """At the start of an answer, the logits are those of the user's prompt, alone or after earlier turns."""
    monkeypatch.setattr(sequences, "CONVERSATION_SHARE", kind == "conversation")
    scenes = [draw_scene(0), draw_scene(1)]
    batch = rows.batch(scenes, Random(0))
    del batch["labels"]
    pixel_values = processor.image_processor([scene.image for scene in scenes], return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(**batch, pixel_values=pixel_values).logits
    for row, scene in enumerate(scenes):
        token_ids = batch["input_ids"][row].tolist()
        places = {}
        for question in scene.questions:
            asked, labels = rows.encode(question)
            for start in range(len(token_ids)):
                if token_ids[start : start + len(asked)] == asked:
                    places[start + labels.count(IGNORE_INDEX) - 1] = question
        assert len(places) == min(sequences.QUESTIONS_PER_ROW, len(scene.questions)) > 0
        turns = []
        for place, question in sorted(places.items()):
            if kind == "alone":
                turns = []
            with torch.no_grad():
                expected = model(**chat(processor, scene.image, *turns, question.text)).logits[0, -1]
            turns += [question.text, question.answer]
            torch.testing.assert_close(logits[row, place], expected, atol=1e-4, rtol=1e-4)


def test_world_token_labels_name_the_object_at_their_place(rows):
    for seed in range(20):
        scene = draw_scene(seed)
        batch = rows.batch([scene], Random(seed))
        is_world = batch["input_ids"][0] == rows.tokenizer.convert_tokens_to_ids("<world>")
        # The model shifts labels: a token's own label is the one after it.
        labels = batch["labels"][0].roll(-1)[is_world].view(8, 8)
        named = set()
        for row, column in (labels != IGNORE_INDEX).nonzero().tolist():
            name = rows.tokenizer.convert_ids_to_tokens(labels[row, column].item())
            named.add(name)
            patch = scene.image.crop((column * 8 - 4, row * 8 - 4, column * 8 + 12, row * 8 + 12))
            colours = [name] if name in COLOURS else [thing.colour for thing in scene.things if thing.shape == name]
            differences = [np.abs(np.asarray(patch, dtype=int) - COLOURS[colour]).max(-1) for colour in colours]
            assert np.min(differences) < 25, (seed, row, column, name)
        assert named & set(COLOURS) and named & set(SHAPES)


def test_the_accuracy_counts_answers_and_not_world_tokens():
    class Parrot(nn.Module):
        """Always says token 3."""

        def forward(self, input_ids, labels):
            logits = nn.functional.one_hot(torch.full_like(input_ids, 3), 8).float()
            return type("Output", (), {"loss": logits.sum(), "logits": logits})

    input_ids = torch.tensor([[1, 7, 7, 2, 3, 5, 2, 4, 5]])  # 7 is a world token; the answers are 3 5 and 4 5
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 3, IGNORE_INDEX, 3, 5, IGNORE_INDEX, 4, 5]])
    assert AnswerLoss(Parrot())(input_ids, labels)["accuracy"] == 0.5


class Line(nn.Module):
    """Fits y = w x + b with noise, so that the random state matters too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x):
        return {"loss": (self.linear(x) - 3 * x + 0.1 * torch.randn_like(x)).square().mean()}


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_EVERY", 4)
    monkeypatch.setattr(trainer, "LOG_EVERY", 2)

    def fit(folder, stop_at=None):
        def make_batch(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return {"x": torch.randn(4, 1, generator=torch.Generator().manual_seed(step))}

        torch.manual_seed(0)
        trainer.train(line := Line(), make_batch, 10, 1e-2, folder, matrices=[line.linear.weight])
        return line.state_dict()

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "interrupted", stop_at=7)
    resumed = fit(tmp_path / "interrupted")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    histories = [(tmp_path / name / "history.jsonl").read_text() for name in ("whole", "interrupted")]
    assert histories[0] == histories[1] and histories[0].count("\n") == 5


def test_each_stage_changes_its_own_weights_only(recipe, model):
    before = load_file(recipe / "joined-1" / "model.safetensors")
    aligned, tuned = (load_file(recipe / f"theworld-{stage}" / "model.safetensors") for stage in ("frozen", "images"))
    for name, weights in before.items():
        in_encoder = "world_encoder" in name
        assert torch.equal(aligned[name], weights) == in_encoder, name
        if "time_conv" not in name:
            assert not torch.equal(tuned[name], aligned[name]), name
    merged = TheWorldForConditionalGeneration.from_pretrained(recipe / "theworld-merged")
    assert merged.config.latent_merge_size == 2 and model.config.normalize_latents


def test_the_cached_latents_are_those_of_the_frozen_encoder(recipe, processor):
    model = TheWorldForConditionalGeneration.from_pretrained(recipe / "theworld-frozen")
    cached = load_file(recipe / "latents.safetensors")["latents"]
    scene = draw_scene(SPLITS["train"][7])
    with torch.no_grad():
        latents = model.get_world_latents(
            processor(text="<world>", images=scene.image, return_tensors="pt").pixel_values
        )
    torch.testing.assert_close(cached[7:8], latents, atol=1e-5, rtol=1e-5)


def test_the_vae_trains_on_the_processors_pixels(processor):
    scene = draw_scene(0)
    pixel_values = processor(text="<world>", images=scene.image, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels_of(range(1)), pixel_values)


def test_finished_stages_are_not_repeated(recipe):
    times = {path: path.stat().st_mtime_ns for path in recipe.rglob("*")}
    train_all(recipe, SHORT)
    assert {path: path.stat().st_mtime_ns for path in recipe.rglob("*")} == times


def test_motion_training_changes_past_frames_weights_only(recipe, model):
    before = load_file(recipe / "theworld-images" / "model.safetensors")
    after = load_file(recipe / "motion" / "model.safetensors")
    for name, weights in before.items():
        if "time_conv" in name:
            continue
        if "world_encoder" in name and weights.dim() == 5 and weights.shape[2] == 3:
            assert torch.equal(after[name][:, :, -1], weights[:, :, -1]) and after[name][:, :, :-1].any(), name
        else:
            assert torch.equal(after[name], weights), name
    watched = model.state_dict()
    for name, weights in after.items():
        assert torch.equal(watched[name], weights) == ("world_encoder" in name), name


@torch.no_grad()
def test_an_inflated_encoder_sees_each_latents_last_frame(recipe):
    model = TheWorldForConditionalGeneration.from_pretrained(recipe / "theworld-images").model
    video.inflate(model.world_encoder)
    frames = video.frames_of(range(1))
    latents, images = model.get_world_latents(frames), model.get_world_latents(frames[0, ::4])
    torch.testing.assert_close(latents[0], images, atol=1e-5, rtol=1e-5)


def test_a_clips_row_equals_the_processors_inputs(rows, processor):
    clip = make_clip(0)
    batch = rows.batch([clip], Random(0))
    content = [{"type": "video", "video": list(clip.frames)}, {"type": "text", "text": clip.questions[0].text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    start = 3 * 64  # the clip's part: the turn's opening, times and places
    assert torch.equal(batch["input_ids"][0, :start], inputs["input_ids"][0, :start])
    torch.testing.assert_close(video.frames_of(range(1)), inputs["pixel_values_videos"])
