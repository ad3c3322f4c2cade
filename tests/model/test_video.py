"""Tests how videos reach the model: which frames, their timestamps, their placeholders, and rejected inputs."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from tests.helpers.generation import chat_inputs
from theworld import TheWorldConfig
from theworld.videos_theworld import Clip, Sampling, flatten_videos, open_clip, open_file


QUESTION = "what is it?"
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def frames(count: int, seed: int = 0, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def save_gif(folder, pictures: list[Image.Image], milliseconds: list[int]):
    path = folder / "clip.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds)
    return path


def fives(texts: str, times: int = 64) -> str:
    """What a processed prompt reads, with each latent frame's placeholders as [N]."""
    return texts.replace("<start_of_world>" + "<world_video>" * times + "<end_of_world>", f"[{times}]")


@pytest.fixture
def checkpoint(convert):
    return convert("gemma2")


def ask(processor, video, question=QUESTION, **options):
    return processor(text=f"<world_video>{question}", videos=video, return_tensors="pt", **options)


# Which frames


@pytest.mark.parametrize(("num_frames", "num_latents"), [(1, 1), (2, 2), (5, 2), (6, 3), (9, 3), (17, 5)])
def test_each_four_frames_give_a_latent_frame(processor, num_frames, num_latents):
    inputs = ask(processor, frames(num_frames))
    assert inputs["pixel_values_videos"].shape == (1, 1 + 4 * (num_latents - 1), 3, 64, 64)
    assert inputs["pixel_values_videos"].dtype == torch.float32
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 64 * num_latents


def test_a_remainder_is_filled_up_with_the_last_frame(processor):
    video = frames(7)
    filled, whole = (ask(processor, clip)["pixel_values_videos"] for clip in (video, [*video, video[-1], video[-1]]))
    assert torch.equal(filled, whole)


def test_latent_frames_have_times_of_their_last_frames(processor):
    text = processor.decode(ask(processor, frames(9))["input_ids"][0])
    assert fives(text) == f"<bos>0.000s[64]0.500s[64]1.000s[64]{QUESTION}"
    # Frames that are repeated are no later than the last.
    assert fives(processor.decode(ask(processor, frames(7))["input_ids"][0])).startswith(
        "<bos>0.000s[64]0.500s[64]0.750s"
    )
    faster = ask(processor, frames(9), fps=16, video_metadata={"fps": 16})
    assert "0.250s" in processor.decode(faster["input_ids"][0])


def test_frames_are_sampled_at_the_given_rate(processor):
    video = frames(33)
    all_frames = ask(processor, video)["pixel_values_videos"]
    at_24 = ask(processor, video, video_metadata={"fps": 24})["pixel_values_videos"]  # 4/3 s: 0, 3, ... 30, filled up
    assert torch.equal(at_24, all_frames[:, [*range(0, 33, 3), 30, 30]])
    slower = ask(processor, video, fps=2, video_metadata=[{"fps": 24}])["pixel_values_videos"]
    assert torch.equal(slower, all_frames[:, [0, 12, 24, 24, 24]])


def on_screen(begins: list[float], **sampling) -> list[int]:
    """The numbers of the frames that are read of a video whose frames begin at these seconds."""
    numbered = Clip(
        torch.tensor(begins, dtype=torch.float64),
        lambda: nullcontext(zip(begins, range(len(begins)), strict=True)),
        int,
    )
    times = Sampling(**{"fps": 8, "num_frames": None, "max_frames": 321, **sampling}).times(numbered)
    return [number for number, count in numbered.frames_at(times) for _ in range(count)]


def test_a_slower_videos_frames_stand_longer():
    assert on_screen([0, 0.5, 1.0], fps=4) == [0, 0, 1, 1, 2]
    assert on_screen([0, 0.1, 0.7], fps=10) == [0, 1, 1, 1, 1, 1, 1, 2]


def test_a_gif_keeps_its_own_time(processor, tmp_path):
    video = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    path = save_gif(tmp_path, video, [250, 500, 250])
    expected = ask(processor, [video[index] for index in (0, 0, 1, 1, 1, 1, 2)])
    for given in (path, str(path), Image.open(path)):
        assert torch.equal(ask(processor, given)["pixel_values_videos"], expected["pixel_values_videos"])
    clip = open_clip(open_file(str(path)), 4, {})
    times = Sampling(fps=4, num_frames=None, max_frames=321).times(clip)
    assert clip.begins.tolist() == [0, 0.25, 0.75] and times.tolist() == [0, 0.25, 0.5, 0.75]


def test_videos_are_lists_or_arrays_in_any_batch(processor):
    video = frames(5)
    expected = ask(processor, video)["pixel_values_videos"]
    array = np.stack([np.asarray(frame) for frame in video])
    forms = (array, torch.from_numpy(array), list(array), tuple(video), [video], [[video]], [array], array[None])
    for form in forms:
        assert torch.equal(ask(processor, form)["pixel_values_videos"], expected)
    assert len(flatten_videos([[video], [], [array, video]])) == 3


def test_a_frame_gives_the_numbers_of_an_image(processor):
    video = frames(5, size=(50, 30))
    images = processor(text="<world>" * 5, images=video, return_tensors="pt")["pixel_values"]
    assert torch.equal(ask(processor, video)["pixel_values_videos"][0], images)
    size = {"height": 32, "width": 16}
    assert ask(processor, video, size=size)["pixel_values_videos"].shape == (1, 5, 3, 32, 16)


def test_chats_take_videos_beside_images(processor):
    video = frames(5)
    content = [
        {"type": "video", "video": video},
        {"type": "text", "text": "and"},
        {"type": "image", "image": video[0]},
        {"type": "text", "text": QUESTION},
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    text = fives(processor.decode(inputs["input_ids"][0]))
    assert "user\n0.000s[64]0.500s[64]and<start_of_world><world>" in text
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert torch.equal(inputs["pixel_values_videos"], ask(processor, video)["pixel_values_videos"])


# Rejected inputs


@pytest.mark.parametrize(
    ("text", "videos", "options", "error", "message"),
    [
        ("<world_video>", None, {}, ValueError, r"1 `<world_video>`, but 0 video\(s\) are given"),
        ("no placeholder", frames(5), {}, ValueError, r"0 `<world_video>`, but 1 video\(s\) are given"),
        (["<world_video>"] * 2, [[frames(5)] * 2, []], {}, ValueError, r"\[1, 1\], the videos are \[2, 0\]"),
        ("<world_video>", frames(1)[0], {}, TypeError, "A single picture is an image"),
        ("<world_video>", 5, {}, TypeError, "A video is a list of PIL images .* got int"),
        ("<world_video>", frames(5), {"fps": 0}, ValueError, "`fps` must be positive, got 0"),
        ("<world_video>", frames(5), {"video_metadata": [{}, {}]}, ValueError, r"each of 1 video\(s\), got 2"),
    ],
    ids=lambda value: None,
)
def test_the_processor_rejects_bad_videos(processor, text, videos, options, error, message):
    with pytest.raises(error, match=message):
        processor(text=text, videos=videos, **options)


def test_the_model_rejects_bad_videos(model, processor):
    inputs = ask(processor, frames(5))
    with pytest.raises(ValueError, match="`<world_video>` placeholders but no video is given"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="`pixel_values_videos` must have 5 dimensions"):
        model(input_ids=inputs["input_ids"], pixel_values_videos=inputs["pixel_values_videos"][0])
    with pytest.raises(ValueError, match=r"1 video\(s\) of 64 world tokens need 64 `<world_video>` placeholders"):
        model(input_ids=inputs["input_ids"], pixel_values_videos=inputs["pixel_values_videos"][:, :1])
    with pytest.raises(ValueError, match=r"1 \+ 4k frames, got 4"):
        model(input_ids=inputs["input_ids"], pixel_values_videos=inputs["pixel_values_videos"][:, :4])


def test_a_checkpoint_from_before_videos_says_so(model, processor):
    """It was converted with three special tokens: it has no `video_token_id`, and its tokenizer no `<world_video>`."""
    inputs = ask(processor, frames(5))
    model.config.video_token_id = None
    with pytest.raises(ValueError, match="Got world tokens of videos, but this model has no `video_token_id`"):
        model(**inputs)
    assert TheWorldConfig().video_token_id is None
    processor.video_token_id = None
    with pytest.raises(ValueError, match="tokenizer has no `<world_video>`"):
        ask(processor, frames(5))


# What the model makes of it


def test_latents_replace_placeholders_in_order(model, processor):
    inputs = ask(processor, frames(9))
    features = model.get_video_features(inputs["pixel_values_videos"])
    assert features.last_hidden_state.shape == (1, 3, 16, 8, 8) and features.pooler_output.shape == (1, 192, 64)
    assert torch.equal(features.last_hidden_state, model.get_world_latents(inputs["pixel_values_videos"]))
    for number in range(3):
        of_frame = model.model.world_projection(features.last_hidden_state[:, number])
        assert torch.allclose(features.pooler_output[:, number * 64 : (number + 1) * 64], of_frame, **TOLERANCE)
    outputs = model(**inputs)
    assert torch.equal(outputs.video_hidden_states, features.pooler_output) and outputs.image_hidden_states is None
    del inputs["pixel_values_videos"]
    latents = model(**inputs, world_latents_videos=features.last_hidden_state)
    assert torch.equal(latents.logits, outputs.logits)


@torch.no_grad()
def test_one_frame_equals_its_image_at_time_zero(model, processor):
    video = frames(1)
    inputs = ask(processor, video)
    image = processor(text=f"0.000s<world>{QUESTION}", images=video, return_tensors="pt")
    assert torch.allclose(model(**inputs).logits, model(**image).logits, **TOLERANCE)


@torch.no_grad()
def test_order_of_frames_changes_the_answer(model, processor):
    video = frames(9)
    forwards, shuffled = (ask(processor, clip) for clip in (video, [*video[7::-1], video[8]]))
    assert torch.equal(forwards["input_ids"], shuffled["input_ids"])
    assert (model(**forwards).logits[:, -1] - model(**shuffled).logits[:, -1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_batches_of_videos_and_images_answer_as_each_alone(model, processor, options):
    images, videos = frames(2, seed=1), [frames(5, seed=seed) for seed in (2, 3)]
    prompts = [f"<world_video>{QUESTION}", f"<world>and<world_video>{QUESTION}", f"<world>{QUESTION}"]
    of_images, of_videos = [[], [images[0]], [images[1]]], [[videos[0]], [videos[1]], []]

    def generate(rows: slice) -> list[str]:
        some_images, some_videos = of_images[rows], of_videos[rows]
        inputs = processor(
            text=prompts[rows],
            images=some_images if any(some_images) else None,
            videos=some_videos if any(some_videos) else None,
            padding=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])

    assert generate(slice(0, 3)) == [text for row in range(3) for text in generate(slice(row, row + 1))]


def test_gradients_reach_what_the_encoder_remembers(model, processor):
    inputs = ask(processor, frames(5))
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in model.named_parameters()} - reached == set()


def test_the_pipeline_takes_a_video(checkpoint, processor, model):
    video = frames(5)
    content = [{"type": "video", "video": video}, {"type": "text", "text": QUESTION}]
    pipe = pipeline("image-text-to-text", model=str(checkpoint), trust_remote_code=True)
    answers = pipe(
        text=[{"role": "user", "content": content}], max_new_tokens=6, do_sample=False, return_full_text=False
    )
    inputs = chat_inputs(processor, [{"role": "user", "content": content}])
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[0]["generated_text"] == expected
