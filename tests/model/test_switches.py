"""Tests the switches `world` and `vision`: per call or saved, for images and videos, with Gemma 3 as the reference."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.helpers.fresh import load_fresh
from tests.helpers.modeling import QUESTION, generate, logits_of
from theworld import TheWorldProcessor


SWITCHES = [(True, True), (True, False), (False, True), (False, False)]
WORLD = "<start_of_world>" + 64 * "{}" + "<end_of_world>"
TOWER = "\n\n<start_of_image>" + 64 * "<image_soft_token>" + "<end_of_image>\n\n"


def noise(count: int, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (48, 80, 3), dtype=np.uint8)) for _ in range(count)]


CLIP = noise(9)  # 1.0 s: latent frames at 0.000, 0.500 and 1.000 s
LATENT_FRAMES = CLIP[::4]
TIMES = ("0.000s", "0.500s", "1.000s")


@pytest.fixture
def checkpoint(convert_whole):
    return convert_whole()


def block(token: str, world: bool, vision: bool) -> str:
    """The text of an image or of a latent frame."""
    return (WORLD.format(*[token] * 64) if world else "") + (TOWER if vision else "")


@pytest.mark.parametrize(("world", "vision"), SWITCHES)
def test_each_switch_decides_the_tokens_of_images_and_videos(processor, world, vision):
    inputs = processor(
        text="a<world>b<world_video>c",
        images=noise(1, seed=1),
        videos=[CLIP],
        world=world,
        vision=vision,
        return_tensors="pt",
    )
    video = "".join(time + block("<world_video>", world, vision) for time in TIMES) if world or vision else ""
    expected = f"<bos>a{block('<world>', world, vision)}b{video}c"
    assert processor.decode(inputs["input_ids"][0]) == expected
    assert ("pixel_values" in inputs, "pixel_values_videos" in inputs) == (world, world)
    assert len(inputs.get("vision_pixel_values", [])) == (4 if vision else 0)


def test_videos_without_the_world_equal_gemma_3(gemma, gemma_processor, model, processor):
    """The frame of each latent is one of Gemma 3's own image blocks."""
    inputs = processor(text=f"<world_video>{QUESTION}", videos=[CLIP], world=False, return_tensors="pt")
    text = "".join(f"{time}<start_of_image>" for time in TIMES) + QUESTION
    expected = gemma_processor(text=text, images=[LATENT_FRAMES], return_tensors="pt")
    assert torch.equal(inputs["vision_pixel_values"], expected["pixel_values"])
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(inputs[name], expected[name]), name
    assert torch.equal(logits_of(model, inputs), logits_of(gemma, expected))
    suppressed = model.generation_config.suppress_tokens
    assert torch.equal(generate(model, inputs), generate(gemma, expected, suppress_tokens=suppressed))


@pytest.mark.parametrize("text", ["<world>a<world_video>", "<world_video>a<world>"])
@pytest.mark.parametrize("options", [{}, {"do_pan_and_scan": True}], ids=["whole", "crops"])
def test_tower_reads_images_and_frames_in_prompt_order(processor, text, options):
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(64, 0)).convert("RGB").resize((768, 256))
    inputs = processor(text=text, images=[image], videos=[CLIP], return_tensors="pt", **options)
    of_image = processor(text="<world>", images=[image], return_tensors="pt", **options)["vision_pixel_values"]
    of_clip = processor(text="<world_video>", videos=[CLIP], return_tensors="pt")["vision_pixel_values"]
    ordered = [of_image, of_clip] if text.startswith("<world>") else [of_clip, of_image]
    assert torch.equal(inputs["vision_pixel_values"], torch.cat(ordered))


def test_batches_of_images_and_videos_answer_as_alone(model, processor):
    prompts = [f"<world_video>{QUESTION}", f"<world>{QUESTION}", QUESTION]
    images, videos = [[], noise(1, seed=1), []], [[CLIP], [], []]
    inputs = processor(text=prompts, images=images, videos=videos, padding=True, return_tensors="pt")
    together = generate(model, inputs)
    for row, prompt, image, video in zip(together, prompts, images, videos, strict=True):
        alone = processor(text=prompt, images=image or None, videos=video or None, return_tensors="pt")
        assert torch.equal(generate(model, alone)[0], row[-len(generate(model, alone)[0]) :])


@pytest.mark.parametrize(("world", "vision"), SWITCHES)
def test_saved_switches_are_the_defaults_of_a_call(checkpoint, processor, tmp_path, world, vision):
    processor.world, processor.vision = world, vision
    processor.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    prompt = {"text": "<world>a<world_video>", "images": noise(1), "videos": [CLIP], "return_tensors": "pt"}
    by_call = TheWorldProcessor.from_pretrained(checkpoint)(**prompt, world=world, vision=vision)
    by_setting = saved(**prompt)
    assert set(by_call) == set(by_setting)
    assert all(torch.equal(by_call[name], by_setting[name]) for name in by_call)


def test_a_folder_with_a_saved_switch_gives_its_logits_fresh(model, processor, tmp_path):
    processor.world = False
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = processor(text=f"<world>{QUESTION}", images=noise(1), return_tensors="pt")
    assert "pixel_values" not in inputs
    assert torch.equal(load_fresh(inputs, tmp_path)[0], logits_of(model, inputs))


def test_without_a_tower_world_false_leaves_nothing_of_images(convert):
    folder = convert("gemma3_text")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    expected = processor(text=QUESTION, return_tensors="pt")
    for options in ({"world": False}, {"images_kwargs": {"world": False}, "videos_kwargs": {"world": False}}):
        given = {"text": f"<world><world_video>{QUESTION}", "images": noise(1), "videos": [CLIP], **options}
        inputs = processor(**given, return_tensors="pt")
        assert set(inputs) == set(expected) and torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(logits_of(model, inputs), logits_of(model, expected))


def test_serving_engines_reject_world_false(processor):
    """vLLM asks for offsets; without world tokens it would wait for placeholders that are not there."""
    for options in ({"world": False}, {"images_kwargs": {"world": False}}):
        with pytest.raises(ValueError, match="A serving engine reads world tokens, but `world` is False"):
            processor(text="<world>", images=noise(1), return_text_replacement_offsets=True, **options)
    processor.world = False
    with pytest.raises(ValueError, match="A serving engine reads world tokens, but `world` is False"):
        processor._get_num_multimodal_tokens(image_sizes=[[64, 64]])
